"""A worker: a process that has the interpreter warm, and forks for each program one process that runs it and one that
judges it. It is handed descriptors and never sees a program, a test or a verdict: its children inherit its memory.

    host ── keeper ── zygote ──┬── program     standard input and output, or a socket to its judge
                               └── judge       the tests, the socket, a file for its findings

The keeper ends when the host does, and the zygote with it; so nothing is left over, however the host dies.
"""

from __future__ import annotations

import builtins
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import candidate, jail, judge, kernel

CPU_CLOCK = 2
"""Which clock of another process; see `clock_getcpuclockid`."""
ENTRY_SECONDS = 30.0
"""For making the jails of a program and its judge, which takes long on a busy machine. Wall time counts after it; the
host has more patience (`worker.PATIENCE_SECONDS`)."""


def main(level: str, control: int, host: int) -> None:
    """Keep a worker for as long as the host lives."""
    connection = socket.socket(fileno=control)
    watched = [os.pidfd_open(host)]
    if os.getppid() != host:
        os._exit(1)
    worker_jail = jail.WorkerJail(level)
    try:
        worker_jail.leave_host()
        zygote = os.fork()
        if zygote == 0:
            kernel.prctl(kernel.SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
            worker_jail.close_doors()
    except Exception as error:
        connection.send(json.dumps({"error": str(error)}).encode())
        os._exit(1)
    if zygote == 0:
        os.close(watched[0])
        _warm()
        connection.send(b"{}")
        Zygote(worker_jail, connection).serve()
    connection.close()
    watched.append(os.pidfd_open(zygote))
    ended = select.select(watched, [], [])[0]
    if watched[1] not in ended:
        os.kill(zygote, signal.SIGKILL)
    os.waitpid(zygote, 0)
    os._exit(0)


def _warm() -> None:
    """Import what programs use most, define what `site` would, and hide where the project is."""
    import array, bisect, copy, dataclasses, datetime, enum, functools, hashlib, heapq, operator, queue  # noqa: E401, F401, I001
    import secrets, statistics, string, textwrap, typing, unicodedata  # noqa: E401, F401

    vars(builtins).update(exit=sys.exit, quit=sys.exit)
    sys.argv, sys.orig_argv = ["program"], ["program"]
    gc.collect()
    gc.freeze()  # the collector of a child then leaves shared pages alone


@dataclass
class Child:
    """A process of one program."""

    process: int
    entered: int
    """Pipe that the child writes to when its jail is complete, and before foreign code runs."""
    handle: int
    why: str = ""
    """Why it was killed: `cpu`, `wall`, or `over` when nobody needs it any more."""
    has_entered: bool | None = None
    """None while it is on its way into the jail."""
    status: int | None = None
    cpu_seconds: float = 0.0

    def cpu_used(self) -> float:
        try:
            return time.clock_gettime(~self.process << 3 | CPU_CLOCK)
        except OSError:  # it ends at this moment
            return 0.0

    def kill(self, why: str) -> None:
        self.why = why
        signal.pidfd_send_signal(self.handle, signal.SIGKILL)

    def end(self) -> None:
        _, status, usage = os.wait4(self.process, 0)
        self.status, self.cpu_seconds = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        os.close(self.handle)

    def arrive(self) -> None:
        """Read whether it has entered the jail; waits until it has, or has ended."""
        self.has_entered = os.read(self.entered, 1) == b"1"
        os.close(self.entered)

    def report(self) -> dict[str, Any]:
        if self.has_entered is None:
            self.arrive()
        return {"entered": self.has_entered, "why": self.why, "status": self.status, "cpu_seconds": self.cpu_seconds}


class Zygote:
    def __init__(self, worker_jail: jail.WorkerJail, control: socket.socket) -> None:
        self.jail, self.control, self.process = worker_jail, control, os.getpid()

    def serve(self) -> None:
        """Serve one program after the other until the host hangs up."""
        while True:
            message, descriptors, _, _ = socket.recv_fds(self.control, 4096, 4)
            if not message:
                os._exit(0)
            job = json.loads(message)
            children = self._judged(job, *descriptors) if job["judged"] else self._script(job, *descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            self._watch(children, job)
            self.control.send(json.dumps({name: child.report() for name, child in children.items()}).encode())

    def _judged(self, job: dict[str, Any], source: int, tests: int, findings: int) -> dict[str, Child]:
        judges_end, programs_end = socket.socketpair()
        null = [self.jail.null] * 3
        children = {
            "judge": self._start(
                job,
                tests,
                [*null, judges_end.fileno(), findings],
                lambda text: judge.judge(json.loads(text), socket.socket(fileno=3), 4),
            ),
            "program": self._start(
                job,
                source,
                [*null, programs_end.fileno()],
                lambda text: candidate.serve(text, socket.socket(fileno=3)),
            ),
        }
        judges_end.close()
        programs_end.close()
        return children

    def _script(self, job: dict[str, Any], source: int, stdin: int, stdout: int, report: int) -> dict[str, Child]:
        descriptors = [stdin, stdout, self.jail.null, report]
        return {"program": self._start(job, source, descriptors, lambda text: candidate.run_script(text, 3))}

    def _start(self, job: dict[str, Any], file: int, descriptors: list[int], run: Callable[[str], None]) -> Child:
        """Fork a process that reads a file, enters the jail with its descriptors, and runs what the file holds."""
        entered, done = os.pipe()
        process = self.jail.fork()
        if process == 0:
            try:
                text = os.pread(file, os.fstat(file).st_size, 0).decode()
                self.jail.enter([*descriptors, done], job, self.process)
                os.write(len(descriptors), b"1")
                os.close(len(descriptors))
                run(text)
            except BaseException:
                os._exit(1)
            os._exit(0)
        os.close(done)
        return Child(process, entered, os.pidfd_open(process))

    def _watch(self, children: dict[str, Child], job: dict[str, Any]) -> None:
        """Wait until all have ended; end what is out of time, and the program when its judge has ended."""
        deadline = time.monotonic() + ENTRY_SECONDS + job["wall_seconds"]
        while running := [child for child in children.values() if child.status is None]:
            for child in running:
                if child.why:
                    continue
                if time.monotonic() >= deadline:
                    child.kill("wall")
                elif child.cpu_used() >= job["cpu_seconds"]:
                    child.kill("cpu")
            # No process can use up its time sooner than this, unless it has several threads.
            left = [job["cpu_seconds"] - child.cpu_used() for child in running if not child.why]
            patience = max(0.01, min([deadline - time.monotonic(), *left]))
            handles = [child.handle for child in running]
            coming = [child for child in running if child.has_entered is None]
            watched = [self.control.fileno(), *handles, *(child.entered for child in coming)]
            ready = select.select(watched, [], [], patience)[0]
            if self.control.fileno() in ready:
                os._exit(0)  # the host hung up, and everything below ends with this process
            arrived = [child for child in coming if child.entered in ready]
            for child in arrived:
                child.arrive()
            if arrived and len(arrived) == len(coming):
                deadline = time.monotonic() + job["wall_seconds"]
            for child in running:
                if child.handle in ready:
                    child.end()
            program = children["program"]
            if (
                "judge" in children
                and children["judge"].status is not None
                and program.status is None
                and not program.why
            ):
                program.kill("over")
