"""Places on a disk: a file is put in place by an atomic rename, and survives a power cut."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ebft_study.storage.base import StoragePath, storage_errors


class LocalPath(StoragePath):
    """A path on a disk that this machine has mounted."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def name(self) -> str:
        return self._path.name or self._path.resolve().name

    @property
    def local(self) -> Path:
        return self._path

    @property
    def local_dir(self) -> Path:
        return self._path

    @property
    def for_ray(self) -> dict[str, Any]:
        return {"storage_path": str(self._path)}

    def __truediv__(self, name: str) -> LocalPath:
        return LocalPath(self._path / name)

    @property
    def parent(self) -> LocalPath:
        return LocalPath(self._path.parent)

    def for_arrow(self) -> str:
        return str(self._path)

    def __str__(self) -> str:
        return str(self._path)

    def __fspath__(self) -> str:
        return str(self._path)

    def __eq__(self, other: object) -> bool:
        return Path(other) == self._path if isinstance(other, os.PathLike) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._path)

    __repr__ = __str__

    def exists(self) -> bool:
        return self._path.exists()

    def read_bytes(self) -> bytes:
        with storage_errors(self, "read"):
            return self._path.read_bytes()

    def write_bytes(self, data: bytes) -> None:
        folder = self._path.parent
        # Hidden, and not ending in .parquet: neither pandas nor a DuckDB glob picks it up.
        temporary = folder / f".{self._path.name}.{secrets.token_hex(4)}.tmp"
        with storage_errors(self, "written"):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self._path)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
            _sync_folder(folder)

    def names(self) -> list[str]:
        with storage_errors(self, "listed"):
            try:
                return sorted(os.listdir(self._path))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def delete(self) -> None:
        with storage_errors(self, "removed"):
            if self._path.is_dir() and not self._path.is_symlink():
                shutil.rmtree(self._path)
            else:
                self._path.unlink(missing_ok=True)

    def upload(self, folder: Path, *, last: str) -> None:
        arriving = self._path.parent / f".{self._path.name}.{secrets.token_hex(4)}.tmp"
        with storage_errors(self, "written"):
            try:
                shutil.copytree(folder, arriving)
                shutil.rmtree(self._path, ignore_errors=True)
                arriving.rename(self._path)
            except shutil.Error as error:  # a list of (source, target, reason)
                raise OSError(str(error.args[0][0][2])) from None
            finally:
                shutil.rmtree(arriving, ignore_errors=True)

    @contextlib.contextmanager
    def on_disk(self) -> Iterator[Path]:
        yield self._path

    def changed_at(self) -> float:
        return self._path.stat().st_mtime

    def sha256(self) -> str:
        with self._path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut; needs a file descriptor of the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
