"""What every place can do."""

from __future__ import annotations

import abc
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from ebft_study.errors import StorageError
from ebft_study.storage.filesystems import reason_of


class StoragePath(abc.ABC):
    """A file or folder. Equal places compare equal; `str` gives back what `place` understands."""

    @property
    @abc.abstractmethod
    def name(self) -> str: ...

    @property
    @abc.abstractmethod
    def local(self) -> Path | None:
        """The path on a disk; None in a store."""

    @abc.abstractmethod
    def __truediv__(self, name: str) -> StoragePath: ...

    @property
    @abc.abstractmethod
    def parent(self) -> StoragePath:
        """The folder that holds this."""

    def sibling(self, name: str) -> StoragePath:
        """The place `name` in the same folder."""
        return self.parent / name

    @abc.abstractmethod
    def for_arrow(self) -> Any:
        """What pyarrow reads parts of a file from."""

    @abc.abstractmethod
    def exists(self) -> bool:
        """Whether there is a file or a folder."""

    @abc.abstractmethod
    def read_bytes(self) -> bytes:
        """All of a file.

        Raises:
            FileNotFoundError: there is none.
            StorageError: it cannot be read.
        """

    @abc.abstractmethod
    def write_bytes(self, data: bytes) -> None:
        """Put a file in place, whole or not at all; folders on the way are made.

        Raises:
            StorageError: it cannot be written.
        """

    @abc.abstractmethod
    def names(self) -> list[str]:
        """Names of the files and folders directly below, in order; none where nothing is there."""

    @abc.abstractmethod
    def delete(self) -> None:
        """Remove a file, or a folder with all below it, if it is there."""

    @abc.abstractmethod
    def upload(self, folder: Path, *, last: str) -> None:
        """Copy the files of a folder on a disk to here. `last` arrives after all others: where it is, all are."""

    @abc.abstractmethod
    @contextlib.contextmanager
    def on_disk(self) -> Iterator[Path]:
        """The files of this folder in one on a disk, for as long as the context lasts."""

    @abc.abstractmethod
    def changed_at(self) -> float | None:
        """When a file was last written, in seconds of the clock of whoever keeps it; None where nobody knows."""

    @abc.abstractmethod
    def sha256(self) -> str:
        """Of a file's content."""

    @property
    @abc.abstractmethod
    def local_dir(self) -> Path:
        """A folder of this machine for what need not travel with a study: the study's folder itself on a disk."""

    @property
    @abc.abstractmethod
    def for_ray(self) -> dict[str, Any]:
        """The arguments `storage_path` and `storage_filesystem` of Ray's `RunConfig`."""


Location: TypeAlias = "str | os.PathLike[str] | StoragePath"


@contextlib.contextmanager
def storage_errors(where: StoragePath, done: str = "written") -> Iterator[None]:
    """An `OSError` on the way becomes one line for people; a file that is not there to be read stays what it is."""
    try:
        yield
    except FileNotFoundError:
        if done == "read":
            raise
        raise StorageError(
            f"{where}: cannot be {done} (the folder, or the bucket, does not exist). Create it"
        ) from None
    except StorageError:
        raise
    except OSError as error:
        reason, remedy = reason_of(error)
        raise StorageError(f"{where}: cannot be {done} ({reason}). {remedy}") from None
