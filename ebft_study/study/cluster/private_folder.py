"""A folder of our own for what Ray writes, which Ray itself makes writable for every user of the machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "ebft-ray-"
_LONGEST_SOCKET = 103
"""Bytes of a socket's path, on Linux 107."""
_SESSION = "session_2026-11-22_15-18-40_123456_1234567/sockets/plasma_store"
_SETTLED_SECONDS = 60.0
"""A younger folder may be one that is just being made."""


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A folder that only this user can enter, removed afterwards. What killed drivers have left is removed before."""
    base = _base()
    remove_leftovers(base)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))  # with mode 0700
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)  # until this process ends, however it does
        # Not the folder itself: Ray gives the one that it is told mode 0777.
        yield folder / "r"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _base() -> Path:
    """Where Ray's sockets have paths that are short enough."""
    longest = _LONGEST_SOCKET - len(f"/{_PREFIX}12345678/r/{_SESSION}")
    given = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return Path(given if len(os.fsencode(given)) <= longest else "/tmp")


def remove_leftovers(base: Path) -> None:
    """Remove the folders of this user's drivers that have ended without removing them."""
    for folder in base.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            state = folder.lstat()
            is_ours = stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid()
            if is_ours and time.time() - state.st_mtime > _SETTLED_SECONDS and not _is_held(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_held(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
