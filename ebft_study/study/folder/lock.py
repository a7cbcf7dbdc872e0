"""One driver at a time per study.

On a disk: a file lock, which the system takes back from a process that ends, however it ends. In a store: an object
that names its owner and is written again every few seconds. An owner that has not been heard of for `STALE_SECONDS`,
or that was a process of this machine which is gone, is succeeded. Stores have no atomic "create unless it exists"
that pyarrow could ask for, so each owner reads back what it wrote, and again before every heartbeat: of two that
begin at once, one may run on for at most a heartbeat until it notices and stops.
"""

from __future__ import annotations

import contextlib
import datetime
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

NAME = ".lock"
BEAT_SECONDS, STALE_SECONDS, SETTLE_SECONDS = 10.0, 60.0, 1.0


@dataclass
class LockHandle:
    """A held lock. `on_lost` is called, from another thread, with the reason when someone else has taken it."""

    lost: str = ""
    _on_lost: Callable[[str], None] | None = field(default=None, repr=False)

    def on_lost(self, call: Callable[[str], None]) -> None:
        self._on_lost = call
        if self.lost:
            call(self.lost)

    def lose(self, reason: str) -> None:
        self.lost = reason
        if self._on_lost:
            self._on_lost(reason)


@contextlib.contextmanager
def hold(folder: StoragePath, *, record: str) -> Iterator[LockHandle]:
    """Hold the study for this driver; a folder in which no `record` came to be is removed again."""
    holding = _hold_file(folder, folder.local, record) if folder.local else _hold_object(folder)
    with holding as held:
        yield held


def is_held(folder: StoragePath) -> bool:
    """Whether a driver holds the study, as far as one can tell without writing anything."""
    if folder.local is None:
        owner = _owner(folder / NAME)
        return owner is not None and not _is_over(owner) and _seconds_since(owner) < STALE_SECONDS
    path = folder.local / NAME
    if not path.exists():
        return False
    try:
        with filelock.FileLock(path, timeout=0):
            return False
    except filelock.Timeout:
        return True
    except OSError:  # a folder that may only be read
        return False


def _refused(folder: StoragePath, more: str = "") -> ResultsError:
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
            raise _refused(folder) from None
    try:
        yield LockHandle()
    finally:
        if new and not (path / record).exists():
            with contextlib.suppress(OSError):  # someone else put something there
                (path / NAME).unlink(missing_ok=True)
                path.rmdir()
                path.parent.rmdir()
        lock.release()


# --- in a store ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _hold_object(folder: StoragePath) -> Iterator[LockHandle]:
    path, token = folder / NAME, secrets.token_hex(8)
    owner = _owner(path)
    if owner is not None and not _is_over(owner):
        silent = _seconds_silent(folder)
        if silent < STALE_SECONDS:
            raise _refused(folder, f" (process {owner['pid']} on {owner['host']}, last heard of {silent:.0f} s ago)")
    _write(path, token)
    time.sleep(SETTLE_SECONDS)
    if (_owner(path) or {}).get("token") != token:
        raise _refused(folder, ", which began at the same moment")
    held, over = LockHandle(), threading.Event()
    thread = threading.Thread(target=_beat, args=(path, token, held, over), daemon=True, name="heartbeat")
    thread.start()
    try:
        yield held
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(StorageError):
            if (_owner(path) or {}).get("token") == token:
                path.delete()


def _beat(path: StoragePath, token: str, held: LockHandle, over: threading.Event) -> None:
    heard = time.monotonic()
    while not over.wait(BEAT_SECONDS):
        try:
            owner = _owner(path)
            if owner is not None and owner.get("token") != token:
                held.lose(f"process {owner.get('pid')} on {owner.get('host')} has taken this study over")
                return
            _write(path, token)
            heard = time.monotonic()
        except StorageError as error:
            if time.monotonic() - heard > STALE_SECONDS:
                held.lose(f"the store has not answered for {STALE_SECONDS:.0f} s: {error}")
                return


def _owner(path: StoragePath) -> dict[str, Any] | None:
    try:
        owner = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        owner = None
    return owner if isinstance(owner, dict) else {"pid": "?", "host": "?"}


def _write(path: StoragePath, token: str) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat()
    owner = {"token": token, "pid": os.getpid(), "host": socket.gethostname(), "machine": _machine(), "time": now}
    path.write_bytes(json.dumps(owner).encode())


def _machine() -> str:
    """This boot of this machine, and this container on it: where process numbers mean the same processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _is_over(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine that is gone."""
    return owner.get("machine") == _machine() and not psutil.pid_exists(int(owner["pid"]))


def _seconds_silent(folder: StoragePath) -> float:
    """Since the last heartbeat, by the store's own clock where it has one: no two machines agree about the time."""
    probe = folder / f".clock-{secrets.token_hex(4)}"
    probe.write_bytes(b"")
    try:
        now, then = probe.changed_at(), (folder / NAME).changed_at()
    finally:
        probe.delete()
    return now - then if now is not None and then is not None else _seconds_since(_owner(folder / NAME) or {})


def _seconds_since(owner: dict[str, Any]) -> float:
    """By this machine's clock."""
    try:
        then = datetime.datetime.fromisoformat(str(owner.get("time")))
    except ValueError:
        return STALE_SECONDS
    return (datetime.datetime.now(datetime.UTC) - then).total_seconds()
