"""Paths on a disk that this machine has mounted: files and folders replaced by an atomic rename."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path, PosixPath
from typing import Any

from ebft_study.errors import NoFileError, StorageError
from ebft_study.storage.filesystems import storage_errors

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


@contextlib.contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary path; the file or folder that the block writes there then replaces `target`.

    Readers find the old content or the new one, never a part. A new file survives a power cut. When the block fails,
    nothing is left behind.
    """
    # Hidden, and not ending in .parquet: neither pandas nor a DuckDB glob picks it up.
    temporary = Path(target.parent, f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        if temporary.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        else:
            _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)  # makes the rename itself durable
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what `atomic_write` left below a folder where its process was killed; nothing there may be writing now."""
    with storage_errors(folder, "listed"):
        for path in folder.rglob(".*.tmp"):
            if _TEMPORARY.fullmatch(path.name):
                with contextlib.suppress(StorageError):
                    LocalPath(path).delete()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_file(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a file of this machine for reading.

    Raises:
        NoFileError: it is something else, such as a named pipe.
        OSError: it cannot be opened.
    """
    return open(path, "rb", opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK)  # a named pipe would wait for a writer
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise _no_file(path, "a socket") from None
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    raise _no_file(path, next((kind for is_kind, kind in _KINDS if is_kind(mode)), "something else"))


def _no_file(path: str, kind: str) -> NoFileError:
    return NoFileError(f"{path}: is {kind}, where a file belongs. Remove it, or correct the path")


class LocalPath(PosixPath):
    """A `pathlib.Path` with the methods that a storage path also needs; inherited methods are unchanged.

    Equal paths compare equal, and `storage_path(str(path)) == path`.
    """

    @property
    def name(self) -> str:
        """The last part of the path; of '.', the current folder's name."""
        return super().name or self.resolve().name

    @property
    def local(self) -> Path:
        """The path on a disk; None in a store."""
        return self

    @property
    def local_dir(self) -> Path:
        """A folder of this machine for files that stay here: on a disk, the folder itself."""
        return self

    @property
    def for_ray(self) -> dict[str, Any]:
        """The arguments `storage_path` and `storage_filesystem` of Ray's `RunConfig`; the folder above has to exist."""
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        from ebft_study.storage.below import FilesBelow

        return {
            "storage_path": str(self),
            "storage_filesystem": PyFileSystem(FSSpecHandler(FilesBelow(str(self.parent)))),
        }

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is a file or folder.

        Raises:
            StorageError: this cannot be known.
        """
        with storage_errors(self, "read"):
            return super().exists()

    def read_bytes(self) -> bytes:
        """The whole content of a file.

        Raises:
            FileNotFoundError: the file does not exist.
            StorageError: the file cannot be read.
        """
        with storage_errors(self, "read"):
            try:
                with open_file(self) as file:
                    return file.read()
            except NotADirectoryError as error:  # nor does it exist
                raise FileNotFoundError(*error.args) from None

    def open(self, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        """A file like that of `pathlib`; what is no file is not opened for reading."""
        if mode.startswith("r"):
            options["opener"] = _open_regular
        return open(self, mode, *arguments, **options)

    def write_bytes(self, data: bytes) -> None:  # type: ignore[override]
        """Write a file atomically. No folder is created: a study that was deleted or unmounted would begin anew.

        Raises:
            StorageError: the file cannot be written.
        """
        with storage_errors(self), atomic_write(self) as temporary:
            temporary.write_bytes(data)

    def subfolder(self, *names: str) -> LocalPath:
        """The folder `names[0]/names[1]/...` below this one, which has to exist; it is created if it does not."""
        folder = self
        with storage_errors(self):
            for name in names:
                folder = folder / name
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder)
        return folder

    def names(self) -> list[str]:
        """Sorted names of the files and folders directly below; none where the folder does not exist."""
        with storage_errors(self, "listed"):
            try:
                return sorted(os.listdir(self))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def delete(self) -> None:
        """Remove a file, or a folder with everything below it, if it exists."""
        with storage_errors(self, "removed"):
            if self.is_dir() and not self.is_symlink():
                shutil.rmtree(self)
            else:
                self.unlink(missing_ok=True)

    def upload(self, folder: Path, *, last: str) -> None:
        """Copy a local folder of files to this path. `last` arrives after all others: where it exists, all do."""
        with storage_errors(self), atomic_write(self) as temporary:
            try:
                shutil.copytree(folder, temporary)
            except shutil.Error as error:  # a list of (source, target, reason)
                raise OSError(str(error.args[0][0][2])) from None

    @contextlib.contextmanager
    def on_disk(self) -> Iterator[Path]:
        """A local folder with the files of this one, for as long as the context lasts."""
        yield self

    def changed_at(self) -> float | None:
        """Time of a file's last write in seconds, by the clock of the storage; None where it has none."""
        return self.stat().st_mtime
