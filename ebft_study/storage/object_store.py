"""Places in a `pyarrow.fs` file system, which puts an object whole or not at all by itself."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ebft_study import paths
from ebft_study.storage import filesystems
from ebft_study.storage.base import StoragePath, storage_errors

_READ_BYTES = 2**23


class ObjectStorePath(StoragePath):
    """A path in a `pyarrow.fs` file system. `url` names it for people and for other processes, without its query."""

    def __init__(self, url: str, query: str, path: str) -> None:
        self._url, self._query, self._path = url, query, path

    @property
    def _store(self) -> Any:
        return filesystems.open_store(self._url, self._query)[0]

    @property
    def name(self) -> str:
        return PurePosixPath(self._path).name

    @property
    def local(self) -> None:
        return None

    @property
    def local_dir(self) -> Path:
        known = hashlib.sha256(str(self).encode()).hexdigest()[:12]
        return paths.cache_folder() / "stores" / f"{self.name}-{known}"

    @property
    def for_ray(self) -> dict[str, Any]:
        return {"storage_path": self._path, "storage_filesystem": self._store}

    def __truediv__(self, name: str) -> ObjectStorePath:
        return ObjectStorePath(f"{self._url}/{name}", self._query, f"{self._path}/{name}")

    @property
    def parent(self) -> ObjectStorePath:
        return ObjectStorePath(self._url.rpartition("/")[0], self._query, self._path.rpartition("/")[0])

    def for_arrow(self) -> Any:
        with storage_errors(self, "read"):
            return self._store.open_input_file(self._path)

    def __str__(self) -> str:
        return self._url + (f"?{self._query}" if self._query else "")

    def __eq__(self, other: object) -> bool:
        return str(other) == str(self) if isinstance(other, ObjectStorePath) else NotImplemented

    def __hash__(self) -> int:
        return hash(str(self))

    __repr__ = __str__

    def exists(self) -> bool:
        with storage_errors(self, "read"):
            return bool(self._store.get_file_info(self._path).type.name != "NotFound")

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
        with storage_errors(self, "written"):
            self._ready_for_files()
            with self._store.open_output_stream(self._path) as stream:
                stream.write(data)

    def names(self) -> list[str]:
        from pyarrow.fs import FileSelector

        with storage_errors(self, "listed"):
            found = self._store.get_file_info(FileSelector(self._path, allow_not_found=True))
        return sorted(info.base_name for info in found)

    def delete(self) -> None:
        with storage_errors(self, "removed"):
            kind = self._store.get_file_info(self._path).type.name
            if kind == "Directory":
                self._store.delete_dir(self._path)
            elif kind == "File":
                self._store.delete_file(self._path)

    def upload(self, folder: Path, *, last: str) -> None:
        (self / last).delete()
        for file in sorted(folder.iterdir(), key=lambda file: (file.name == last, file.name)):
            (self / file.name)._send(file)

    def _send(self, file: Path) -> None:
        with storage_errors(self, "written"), file.open("rb") as source:
            self._ready_for_files()
            with self._store.open_output_stream(self._path) as target:
                while part := source.read(_READ_BYTES):
                    target.write(part)

    @contextlib.contextmanager
    def on_disk(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="ebft-study-") as folder:
            for name in self.names():
                with (Path(folder) / name).open("wb") as file:
                    for part in (self / name)._parts():
                        file.write(part)
            yield Path(folder)

    def changed_at(self) -> float | None:
        with storage_errors(self, "read"):
            moment = self._store.get_file_info(self._path).mtime
        return moment.timestamp() if moment else None

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for part in self._parts():
            digest.update(part)
        return digest.hexdigest()

    def _parts(self) -> Iterator[bytes]:
        with storage_errors(self, "read"), self._store.open_input_stream(self._path) as stream:
            while part := stream.read(_READ_BYTES):
                yield part

    def _ready_for_files(self) -> None:
        """Folders are made where a store has any."""
        if self._store.type_name not in filesystems.WITHOUT_FOLDERS:
            self._store.create_dir(self._path.rpartition("/")[0], recursive=True)
