"""File calls of a process below a folder: counted, and one of them made to fail, or to be the process's last.

Python's own functions are replaced in a process that was forked for one session of a study. What compiled code writes
without them (weights of a checkpoint, into the temporary folder) is not reached.
"""

from __future__ import annotations

import builtins
import ctypes
import datetime
import errno
import io
import mmap
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPERATIONS = ("open", "read", "write", "fsync", "rename", "unlink", "mkdir", "listdir", "stat")


@dataclass(frozen=True)
class Fault:
    """What happens at one file call of a session."""

    action: str
    """`error`, `kill`, `torn` (killed in the middle of a write), `stop` (by SIGSTOP), `clock`, or `` for nothing."""
    process: str = "driver"
    """`driver`, or the name of an attempt: `t0001-1`."""
    at: int = 1
    """The number of the call, counted from 1 among those of the process and its `operations`."""
    operations: tuple[str, ...] = OPERATIONS
    error: int = 0
    lasting: bool = False
    """All later calls of these operations fail, in all processes of the session."""
    after: bool = False
    """Killed after the call instead of before it."""
    everything: bool = False
    """All processes of the session are killed, not this one alone."""
    seconds: float = 0.0
    """By which the clock steps."""


class Shared:
    """Memory that the harness shares with all processes of a session."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4096)
        self._values = (ctypes.c_double * 3).from_buffer(self._memory)

    def clear(self) -> None:
        self._values[:] = (0.0, 0.0, self._values[2])

    @property
    def fired(self) -> bool:
        return self._values[0] != 0.0

    def fire(self) -> None:
        self._values[0] = 1.0

    @property
    def stopped(self) -> int:
        """The process that waits for SIGCONT; 0 for none."""
        return int(self._values[1])

    @stopped.setter
    def stopped(self, process: int) -> None:
        self._values[1] = float(process)

    @property
    def clock(self) -> float:
        """Seconds by which the clock is wrong."""
        return self._values[2]

    @clock.setter
    def clock(self, seconds: float) -> None:
        self._values[2] = seconds


class Calls:
    """The file calls of this process below `root`."""

    def __init__(self, root: Path, process: str, fault: Fault, shared: Shared) -> None:
        self._root, self._process, self._fault, self._shared = f"{root}/", process, fault, shared
        self.counts: Counter[str] = Counter()
        self._matching = 0

    def around(
        self, operation: str, path: object, call: Callable[[], Any], torn: Callable[[], Any] | None = None
    ) -> Any:
        """Make a call, unless the fault is due. `torn` makes half of it."""
        if not self._is_ours(path):
            return call()
        self.counts[operation] += 1
        fault = self._fault
        if operation not in fault.operations:
            return call()
        if self._shared.fired:
            if fault.action == "error" and fault.lasting:
                raise OSError(fault.error, os.strerror(fault.error), os.fspath(path))  # type: ignore[call-overload]
            return call()
        if fault.process != self._process:
            return call()
        self._matching += 1
        if self._matching != fault.at:
            return call()
        self._shared.fire()
        return self._strike(fault, path, call, torn)

    def _strike(self, fault: Fault, path: Any, call: Callable[[], Any], torn: Callable[[], Any] | None) -> Any:
        match fault.action:
            case "error":
                if torn is not None and fault.after and fault.error == errno.ENOSPC:
                    torn()
                raise OSError(fault.error, os.strerror(fault.error), os.fspath(path))
            case "kill" | "torn":
                if fault.action == "torn" and torn is not None:
                    torn()
                elif fault.after:
                    call()
                if fault.everything:
                    os.killpg(os.getpgid(0), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                self._shared.stopped = os.getpid()
                os.kill(os.getpid(), signal.SIGSTOP)
            case "clock":
                self._shared.clock = fault.seconds
        return call()

    def _is_ours(self, path: object) -> bool:
        try:
            return os.fsdecode(os.fspath(path)).startswith(self._root)  # type: ignore[call-overload,arg-type]
        except TypeError:
            return False

    def install(self) -> None:
        """Replace the functions of this process, for good."""
        for name, operation in _BY_PATH.items():
            setattr(os, name, self._by_path(getattr(os, name), operation))
        for name, operation in _BY_DESCRIPTOR.items():
            setattr(os, name, self._by_descriptor(getattr(os, name), operation))
        io.open = builtins.open = self._open(io.open)  # type: ignore[assignment]

    def _by_path(self, function: Any, operation: str) -> Any:
        def called(*arguments: Any, **keywords: Any) -> Any:
            path = arguments[0] if arguments else "."
            if isinstance(path, int):
                path = _name_of(path)
            elif keywords.get("dir_fd") is not None:
                path = f"{_name_of(keywords['dir_fd'])}/{os.fspath(path)}"
            return self.around(operation, path, lambda: function(*arguments, **keywords))

        return called

    def _by_descriptor(self, function: Any, operation: str) -> Any:
        def called(descriptor: Any, *arguments: Any, **keywords: Any) -> Any:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            return self.around(operation, _name_of(number), lambda: function(descriptor, *arguments, **keywords))

        return called

    def _open(self, original: Any) -> Any:
        calls = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                half = memoryview(data).cast("B")[: max(len(data) // 2, 1)]
                return int(
                    calls.around(
                        "write", self.name, lambda: io.FileIO.write(self, data), lambda: io.FileIO.write(self, half)
                    )
                )

            def readinto(self, buffer: Any) -> int:
                return int(calls.around("read", self.name, lambda: io.FileIO.readinto(self, buffer)))

            def readall(self) -> bytes:
                return bytes(calls.around("read", self.name, lambda: io.FileIO.readall(self)))

        def opened(
            file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
            newline: Any = None, closefd: bool = True, opener: Any = None,
        ) -> Any:  # fmt: skip
            if isinstance(file, int) or not calls._is_ours(file):
                return original(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw = calls.around(
                "open", file, lambda: File(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            )
            if buffering == 0:
                return raw
            kind = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
            buffered = kind(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)

        return opened


_BY_PATH = {
    "open": "open", "replace": "rename", "rename": "rename", "unlink": "unlink", "remove": "unlink", "rmdir": "unlink",
    "mkdir": "mkdir", "listdir": "listdir", "scandir": "listdir", "stat": "stat", "lstat": "stat",
}  # fmt: skip
_BY_DESCRIPTOR = {"fsync": "fsync", "write": "write", "sendfile": "write", "truncate": "write"}


def _name_of(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def set_clock(shared: Shared) -> None:
    """Make this process's clocks of the day follow `shared.clock`, for good; monotonic ones stay right."""
    real_time, real_datetime = time.time, datetime.datetime

    class Shifted(real_datetime):  # type: ignore[valid-type,misc]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return real_datetime.now(tz) + datetime.timedelta(seconds=shared.clock)

    time.time = lambda: real_time() + shared.clock
    datetime.datetime = Shifted  # type: ignore[misc]
