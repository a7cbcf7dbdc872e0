"""The lock of a study: one driver at a time.

On a disk, it is a file lock, which the system releases when its process ends, however it ends. A file beside it names
its owner to those who only look: trying the lock would keep a driver that starts at that moment from getting it.

In a store, a driver writes a claim of its own, with a number one higher than any before, and then looks for others: the
listing of a store shows what was written before it, so of two that begin simultaneously at least one sees the other and
withdraws. A claim names its owner and is rewritten every few seconds (a heartbeat). Another driver may claim the study
when the last heartbeat is `STALE_SECONDS` old, or when the owner was a process of this machine that has ended. Nobody
writes the claim of another, so a driver that wakes from sleep cannot take the study back: `results.fence` says what
becomes of what it still writes.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import psutil

from ebft_study.errors import LockLostError, NoFileError, ResultsError, StorageError
from ebft_study.results import Fence, fence
from ebft_study.results.study_recorder import latest_generation
from ebft_study.storage import StoragePath, storage_errors
from ebft_study.study.folder.background import in_background

NAME, OWNER = ".lock", ".owner"
BEAT_SECONDS, STALE_SECONDS = 10.0, 60.0


@dataclass
class LockHandle:
    """A lock that this driver holds; its fence is to be asked before anything is written."""

    fence: Fence
    _on_lost: Callable[[str], None] | None = field(default=None, repr=False)

    @property
    def lost(self) -> str:
        """The reason why this driver does not hold the lock any more, '' while it does."""
        return self.fence.lost

    def on_lost(self, listener: Callable[[str], None]) -> None:
        """Register `listener`, which is called from another thread with the reason when the lock is lost."""
        self._on_lost = listener
        if self.lost:
            listener(self.lost)

    def lose(self, reason: str) -> None:
        self.fence.lost = reason
        if self._on_lost:
            self._on_lost(reason)


def hold(folder: StoragePath, *, record: str) -> contextlib.AbstractContextManager[LockHandle]:
    """Hold the study's lock inside the context; a new folder that has no `record` at its end is removed again."""
    return _hold_file(folder, folder.local, record) if folder.local else _hold_claim(folder, record)


def is_held(folder: StoragePath) -> bool:
    """Whether a driver holds the study's lock, as far as reading alone can show."""
    owners = map(_owner, [folder / OWNER] if folder.local else _claims(folder))
    return any(owner and not _has_ended(owner) and _seconds_since(owner) < STALE_SECONDS for owner in owners)


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
    handle = LockHandle(Fence(folder))
    try:
        with _heartbeat(folder / OWNER, handle):
            yield handle
    finally:
        if new and not (path / record).exists():
            with contextlib.suppress(OSError, StorageError):  # another process put something there, or it is gone
                handle.fence.check()
                (path / NAME).unlink(missing_ok=True)
                path.rmdir()
                path.parent.rmdir()
        lock.release()


@contextlib.contextmanager
def _heartbeat(path: StoragePath, handle: LockHandle) -> Iterator[None]:
    """Name this process in `path`, and rewrite that every few seconds, as it may be another machine that looks."""

    def beat(released: threading.Event) -> None:
        while not released.wait(BEAT_SECONDS):
            try:
                handle.fence.check()
                if fence.identity(path.parent / NAME) != locked:
                    raise LockLostError(f"{path.parent}: the lock of this study is gone, so another process may run it")
                _write(path, "")
            except LockLostError as error:
                handle.lose(str(error))
                return
            except StorageError:
                continue  # of a full disk, for example; who has rows to write ends the study

    locked = fence.identity(path.parent / NAME)
    _write(path, "")
    try:
        with in_background(beat, name="heartbeat"):
            yield
    finally:
        with contextlib.suppress(StorageError):
            path.delete()


# --- in a store ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _hold_claim(folder: StoragePath, record: str) -> Iterator[LockHandle]:
    latest = latest_generation(folder)  # in this order: who has written there has a claim
    before = fence.generations(folder)
    latest, token = max([latest, *before]), secrets.token_hex(8)
    for path in [folder / NAME, *(folder / fence.CLAIMS / name for name in before.get(latest, []))]:
        _refuse_living(folder, path)
    generation, earlier = latest + 1, {name for names in before.values() for name in names}
    path = folder / fence.CLAIMS / fence.claim_name(generation, token)
    _write(path, token)
    if {name for names in fence.generations(folder).values() for name in names} - earlier - {path.name}:
        path.delete()
        raise _refusal(folder, ", which began at the same moment")
    for name in earlier:
        (folder / fence.CLAIMS / name).delete()
    (folder / NAME).delete()  # of an earlier version
    handle = LockHandle(Fence(folder, generation))
    try:
        with in_background(functools.partial(_beat, path, token, handle), name="heartbeat"):
            yield handle
    finally:
        with contextlib.suppress(StorageError):
            handle.fence.verify()
            if (folder / record).exists():
                _write(path, token, released=True)  # stays: the next driver's number is higher
            else:
                (folder / fence.CLAIMS).delete()


def _refuse_living(folder: StoragePath, path: StoragePath) -> None:
    """Refuse to go on if the claim at `path` is that of a driver that has not ended."""
    owner = _owner(path)
    if owner is None or _has_ended(owner):
        return
    silent = _seconds_silent(folder, path, owner)
    if silent < STALE_SECONDS:
        raise _refusal(folder, f" (process {owner['pid']} on {owner['host']}, last heartbeat {silent:.0f} s ago)")


def _claims(folder: StoragePath) -> list[StoragePath]:
    """The newest claims of drivers: one, unless another withdraws at this moment."""
    found = fence.generations(folder)
    return [folder / fence.CLAIMS / name for name in found.get(max(found, default=0), [])]


def _beat(path: StoragePath, token: str, handle: LockHandle, released: threading.Event) -> None:
    last_beat = fence.now()
    while not released.wait(BEAT_SECONDS):
        try:
            handle.fence.verify()
            _write(path, token)
            last_beat = fence.now()
        except LockLostError as error:
            handle.lose(str(error))
            return
        except StorageError as error:
            if fence.now() - last_beat > STALE_SECONDS:
                handle.lose(f"the store has not answered for {STALE_SECONDS:.0f} s: {error}")
                return


def _owner(path: StoragePath) -> dict[str, Any] | None:
    try:
        owner = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (NoFileError, ValueError):
        owner = None
    return owner if isinstance(owner, dict) else {"pid": "?", "host": "?"}


def _write(path: StoragePath, token: str, *, released: bool = False) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat()
    owner = {"token": token, "pid": os.getpid(), "host": socket.gethostname(), "machine": _machine(), "time": now}
    owner |= {"released": True} if released else {}
    path.write_bytes(json.dumps(owner).encode())


def _machine() -> str:
    """Identifier of this boot of this machine and of its container: a process number is unique within it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _has_ended(owner: dict[str, Any]) -> bool:
    """Whether the owner has released the lock, or was a process of this machine that has ended."""
    if owner.get("released"):
        return True
    return owner.get("machine") == _machine() and not psutil.pid_exists(int(owner["pid"]))


def _seconds_silent(folder: StoragePath, path: StoragePath, owner: dict[str, Any]) -> float:
    """Seconds since the last heartbeat, by the store's own clock where it has one: clocks of machines differ."""
    probe = folder / f".clock-{secrets.token_hex(4)}"
    probe.write_bytes(b"")
    try:
        now, then = probe.changed_at(), path.changed_at()
    finally:
        probe.delete()
    return _seconds_since(owner) if now is None or then is None else now - then


def _seconds_since(owner: dict[str, Any]) -> float:
    """Seconds since the last heartbeat, by this machine's clock."""
    try:
        then = datetime.datetime.fromisoformat(str(owner.get("time")))
    except ValueError:
        return STALE_SECONDS
    return (datetime.datetime.now(datetime.UTC) - then).total_seconds()
