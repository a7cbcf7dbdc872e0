"""Paths in a `pyarrow.fs` file system, which puts an object whole or not at all by itself."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import operator
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ebft_study import paths
from ebft_study.storage import filesystems
from ebft_study.storage.filesystems import storage_errors

_PART_BYTES = 2**23
_WITHOUT_FOLDERS = ("s3", "gcs", "abfs")


class ObjectStorePath:
    """A path in an object store, with the methods that `LocalPath` describes."""

    local = None

    def __init__(self, url: str, query: str, store: Any, path: str) -> None:
        """Name the object `path` of the file system `store`; `url` and `query` name it for other processes."""
        self._url, self._query, self._store, self._path = url, query, store, path

    @classmethod
    def from_url(cls, url: str, query: str) -> ObjectStorePath:
        return cls(url, query, *filesystems.open_store(url, query))

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStorePath.from_url, (self._url, self._query)

    def __str__(self) -> str:
        return self._url + (f"?{self._query}" if self._query else "")

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return str(other) == str(self) if isinstance(other, ObjectStorePath) else NotImplemented

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> ObjectStorePath:
        return ObjectStorePath(f"{self._url}/{name}", self._query, self._store, f"{self._path}/{name}")

    @property
    def parent(self) -> ObjectStorePath:
        url, path = self._url.rpartition("/")[0], self._path.rpartition("/")[0]
        return ObjectStorePath(url, self._query, self._store, path)

    @property
    def name(self) -> str:
        return self._path.rpartition("/")[2]

    @property
    def local_dir(self) -> Path:
        digest = hashlib.sha256(str(self).encode()).hexdigest()[:12]
        return paths.cache_folder() / "stores" / f"{self.name}-{digest}"

    @property
    def for_ray(self) -> dict[str, Any]:
        return {"storage_path": self._path, "storage_filesystem": self._store}

    def exists(self) -> bool:
        return self._type() != "NotFound"

    def open(self, mode: str) -> io.BufferedReader:
        """A file to read in parts; `mode` is 'rb'."""
        with storage_errors(self, "read"):
            return io.BufferedReader(self._store.open_input_file(self._path), _PART_BYTES)

    def read_bytes(self) -> bytes:
        with storage_errors(self, "read"):
            while True:
                with self._store.open_input_file(self._path) as file:
                    # In one request: several might see different versions of a file that is being replaced.
                    size = file.size()
                    content = bytes(file.read_at(size, 0))
                if len(content) == size == self._store.get_file_info(self._path).size:
                    return content

    def write_bytes(self, data: bytes) -> None:
        self._write(io.BytesIO(data))

    def subfolder(self, *names: str) -> ObjectStorePath:
        return functools.reduce(operator.truediv, names, self)

    def names(self) -> list[str]:
        from pyarrow.fs import FileSelector

        with storage_errors(self, "listed"):
            infos = self._store.get_file_info(FileSelector(self._path, allow_not_found=True))
        return sorted(info.base_name for info in infos)

    def delete(self) -> None:
        with storage_errors(self, "removed"):
            match self._type():
                case "Directory":
                    self._store.delete_dir(self._path)
                case "File":
                    self._store.delete_file(self._path)

    def upload(self, folder: Path, *, last: str) -> None:
        (self / last).delete()
        for path in sorted(folder.iterdir(), key=lambda path: (path.name == last, path.name)):
            with path.open("rb") as file:
                (self / path.name)._write(file)

    @contextlib.contextmanager
    def on_disk(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="ebft-study-") as folder:
            for name in self.names():
                path = self / name
                with storage_errors(path, "read"), path.open("rb") as source, Path(folder, name).open("wb") as target:
                    shutil.copyfileobj(source, target, _PART_BYTES)
            yield Path(folder)

    def changed_at(self) -> float | None:
        with storage_errors(self, "read"):
            moment = self._store.get_file_info(self._path).mtime
        return moment.timestamp() if moment else None

    def _type(self) -> str:
        with storage_errors(self, "read"):
            return str(self._store.get_file_info(self._path).type.name)

    def _write(self, source: Any) -> None:
        with storage_errors(self):
            if self._store.type_name not in _WITHOUT_FOLDERS:
                self._store.create_dir(self._path.rpartition("/")[0], recursive=True)
            with self._store.open_output_stream(self._path, compression=None) as target:
                shutil.copyfileobj(source, target, _PART_BYTES)
