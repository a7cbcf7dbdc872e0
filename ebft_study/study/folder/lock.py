"""The lock of a study: one driver at a time.

On a disk, it is a file lock, which the system releases when its process ends, however it ends. A file beside it names
its owner to those who only look: trying the lock would keep a driver that starts at that moment from getting it.

In a store, it is an object that names its owner. Either record is rewritten every few seconds (a heartbeat). Another
driver takes the lock of a store over when the last heartbeat is `STALE_SECONDS` old, or when the owner was a process of
this machine that has ended. pyarrow has no "create unless it exists", so each owner reads back what it wrote, and again
before every heartbeat: of two drivers that start simultaneously, one may run for at most a heartbeat until it notices
and stops.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import psutil

from ebft_study.errors import ResultsError, StorageError
from ebft_study.storage import StoragePath, storage_errors
from ebft_study.study.folder.background import in_background

NAME, OWNER = ".lock", ".owner"
BEAT_SECONDS, STALE_SECONDS, SETTLE_SECONDS = 10.0, 60.0, 1.0


@dataclass
class LockHandle:
    """A lock that this driver holds. `lost` is the reason why it no longer does, '' while it does."""

    lost: str = ""
    _on_lost: Callable[[str], None] | None = field(default=None, repr=False)

    def on_lost(self, listener: Callable[[str], None]) -> None:
        """Register `listener`, which is called from another thread with the reason when the lock is lost."""
        self._on_lost = listener
        if self.lost:
            listener(self.lost)

    def lose(self, reason: str) -> None:
        self.lost = reason
        if self._on_lost:
            self._on_lost(reason)


def hold(folder: StoragePath, *, record: str) -> contextlib.AbstractContextManager[LockHandle]:
    """Hold the study's lock inside the context; a new folder that has no `record` at its end is removed again."""
    return _hold_file(folder, folder.local, record) if folder.local else _hold_object(folder)


def is_held(folder: StoragePath) -> bool:
    """Whether a driver holds the study's lock, as far as reading alone can show."""
    owner = _owner(folder / (OWNER if folder.local else NAME))
    return owner is not None and not _has_ended(owner) and _seconds_since(owner) < STALE_SECONDS


def _refusal(folder: StoragePath, more: str = "") -> ResultsError:
    return ResultsError(
        f"{folder}: another process is running this study{more}. Watch it with 'ebft-study status', or wait for its end"
    )


# --- on a disk -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _hold_file(folder: StoragePath, path: Path, record: str) -> Iterator[LockHandle]:
    new = not path.exists()
    lock = filelock.FileLock(path / NAME, timeout=0)
    with storage_errors(folder):
        path.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise _refusal(folder) from None
    try:
        with _heartbeat(folder / OWNER):
            yield LockHandle()
    finally:
        if new and not (path / record).exists():
            with contextlib.suppress(OSError):  # another process put something there
                (path / NAME).unlink(missing_ok=True)
                path.rmdir()
                path.parent.rmdir()
        lock.release()


@contextlib.contextmanager
def _heartbeat(path: StoragePath) -> Iterator[None]:
    """Name this process in `path`, and rewrite that every few seconds, as it may be another machine that looks."""

    def beat(released: threading.Event) -> None:
        while not released.wait(BEAT_SECONDS):
            with contextlib.suppress(StorageError):
                _write(path, "")

    _write(path, "")
    try:
        with in_background(beat, name="heartbeat"):
            yield
    finally:
        with contextlib.suppress(StorageError):
            path.delete()


# --- in a store ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _hold_object(folder: StoragePath) -> Iterator[LockHandle]:
    path, token = folder / NAME, secrets.token_hex(8)
    owner = _owner(path)
    if owner is not None and not _has_ended(owner):
        silent = _seconds_silent(path)
        if silent < STALE_SECONDS:
            raise _refusal(folder, f" (process {owner['pid']} on {owner['host']}, last heartbeat {silent:.0f} s ago)")
    _write(path, token)
    time.sleep(SETTLE_SECONDS)
    if not _is_owned_by(path, token):
        raise _refusal(folder, ", which began at the same moment")
    handle = LockHandle()
    try:
        with in_background(functools.partial(_beat, path, token, handle), name="heartbeat"):
            yield handle
    finally:
        with contextlib.suppress(StorageError):
            if _is_owned_by(path, token):
                path.delete()


def _beat(path: StoragePath, token: str, handle: LockHandle, released: threading.Event) -> None:
    last_beat = time.monotonic()
    while not released.wait(BEAT_SECONDS):
        try:
            owner = _owner(path)
            if owner is not None and owner.get("token") != token:
                handle.lose(f"process {owner.get('pid')} on {owner.get('host')} has taken this study over")
                return
            _write(path, token)
            last_beat = time.monotonic()
        except StorageError as error:
            if time.monotonic() - last_beat > STALE_SECONDS:
                handle.lose(f"the store has not answered for {STALE_SECONDS:.0f} s: {error}")
                return


def _owner(path: StoragePath) -> dict[str, Any] | None:
    try:
        owner = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        owner = None
    return owner if isinstance(owner, dict) else {"pid": "?", "host": "?"}


def _is_owned_by(path: StoragePath, token: str) -> bool:
    return (_owner(path) or {}).get("token") == token


def _write(path: StoragePath, token: str) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat()
    owner = {"token": token, "pid": os.getpid(), "host": socket.gethostname(), "machine": _machine(), "time": now}
    path.write_bytes(json.dumps(owner).encode())


def _machine() -> str:
    """Identifier of this boot of this machine and of its container: a process number is unique within it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _has_ended(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine that has ended."""
    return owner.get("machine") == _machine() and not psutil.pid_exists(int(owner["pid"]))


def _seconds_silent(path: StoragePath) -> float:
    """Seconds since the last heartbeat, by the store's own clock where it has one: clocks of machines differ."""
    probe = path.parent / f".clock-{secrets.token_hex(4)}"
    probe.write_bytes(b"")
    try:
        now, then = probe.changed_at(), path.changed_at()
    finally:
        probe.delete()
    return _seconds_since(_owner(path) or {}) if now is None or then is None else now - then


def _seconds_since(owner: dict[str, Any]) -> float:
    """Seconds since the last heartbeat, by this machine's clock."""
    try:
        then = datetime.datetime.fromisoformat(str(owner.get("time")))
    except ValueError:
        return STALE_SECONDS
    return (datetime.datetime.now(datetime.UTC) - then).total_seconds()
