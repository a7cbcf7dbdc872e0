"""Fences: what keeps a process from writing into a study that is another driver's by now, or that is gone.

A store has no lock that ends with its process, and pyarrow has no conditional writes. A driver that slept (a closed
laptop, a paused machine) may wake when another has taken its study over and finished it. So drivers of a study in a
store are numbered: the *generation* of a driver is one more than that of the driver before. Its claim is the object
`.drivers/<generation>-<token>`, of which the newest always stays.

Two things follow from the number. A driver and its trials look for a newer claim before they write. And where one
falls asleep between looking and writing, what it writes loses: each generation has files of `trials` and numbers of
attempts of its own, of which later ones win when they are read.

On a disk the system itself releases the lock of a process, and drivers have no generation (0). There a fence notices
that the study's folder was deleted, or its disk unmounted.
"""

from __future__ import annotations

import os
import re
import time

from ebft_study.errors import LockLostError
from ebft_study.storage import Location, StoragePath, storage_errors, storage_path

CLAIMS = ".drivers"
ATTEMPTS = 1000
"""Attempts of a trial that one driver may begin: the n-th driver of a study in a store counts from 1000 (n - 1) + 1."""

_CLAIM = re.compile(r"(\d{6})-[0-9a-f]{16}")
_TRUSTED_SECONDS = 20.0


class Fence:
    """Says whether a process may still write into its study. `lost` is the reason why not, '' while it may."""

    def __init__(self, study_folder: Location, generation: int = 0) -> None:
        """
        Args:
            generation: of the driver that this process is or belongs to; 0: not fenced by a number.
        """
        self.folder, self.generation, self.lost = storage_path(study_folder), generation, ""
        self._identity, self._seen = identity(self.folder), -_TRUSTED_SECONDS

    def check(self) -> None:
        """Raise if the study is another driver's, or gone; asks the store again after some seconds only.

        Raises:
            LockLostError: another driver has taken the study over, or its lock or its folder is gone.
            StorageError: that cannot be told.
        """
        if self.lost:
            raise LockLostError(self.lost)
        if self.folder.local:
            if self._identity is None or identity(self.folder) != self._identity:
                self.lost = (
                    f"{self.folder}: the study's folder is gone: it was deleted, or its disk is not mounted any more"
                )
                raise LockLostError(self.lost)
        elif self.generation and now() - self._seen >= _TRUSTED_SECONDS:
            self.verify()

    def verify(self) -> None:
        """Ask the store. Raises like `check`."""
        moment, newest = now(), max(generations(self.folder), default=0)
        if newest != self.generation:
            self.lost = f"{self.folder}: " + (
                "another process has taken this study over"
                if newest > self.generation
                else "the lock of this study is gone, so another process may have run it"
            )
            raise LockLostError(self.lost)
        self._seen = moment


def alone(study_folder: Location) -> Fence:
    """The fence of a process that is alone with a study, whose folder it makes where there is none."""
    folder = storage_path(study_folder)
    if folder.local:
        with storage_errors(folder):
            folder.local.mkdir(parents=True, exist_ok=True)
    return Fence(folder)


def generations(study_folder: StoragePath) -> dict[int, list[str]]:
    """The claims of drivers in a store: generation -> names of its claims."""
    found: dict[int, list[str]] = {}
    for name in (study_folder / CLAIMS).names():
        if match := _CLAIM.fullmatch(name):
            found.setdefault(int(match[1]), []).append(name)
    return found


def claim_name(generation: int, token: str) -> str:
    """The name of a driver's claim."""
    return f"{generation:06d}-{token}"


def first_attempt(generation: int) -> int:
    """The first attempt of a trial that a driver of this generation may begin."""
    return 1 + ATTEMPTS * max(generation - 1, 0)


def now() -> float:
    """Seconds by a clock that also counts while the machine is suspended (that of macOS always does)."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def identity(path: StoragePath) -> tuple[int, int] | None:
    """What tells a file or folder on a disk from a later one of the same name; None where it does not exist."""
    if path.local is None:
        return None
    try:
        with storage_errors(path, "read"):
            status = os.stat(path.local)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
