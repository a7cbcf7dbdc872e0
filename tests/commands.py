"""Starting `ebft-study` as a process of its own, waiting for it, and looking at the processes it starts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import psutil

INTEGRATION = Path(__file__).parent / "integration"
REAL = ("-m", "ebft_study")
FAKE = (str(INTEGRATION / "driver.py"),)
"""The command line with `fake_training` for a training loop."""
PATIENCE = 8.0
"""Time limits of tests are for a quiet machine; a busy one is given this many times as long before a test fails."""
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's own; they notice after half a minute that their cluster is gone."""


def start(
    *arguments: str, cwd: Path, program: tuple[str, ...] = REAL, output: int | IO[Any] = subprocess.PIPE
) -> subprocess.Popen[str]:
    """A command in `cwd`, with a cache of its own there; it prints to a pipe if nothing else is given."""
    search = os.pathsep.join(filter(None, [str(INTEGRATION), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "EBFT_STUDY_CACHE": str(cwd / "cache")}
    command, streams = [sys.executable, *program, *arguments], {"stdout": output, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=cwd, env={**os.environ, **own}, text=True, **streams)


def ended(process: subprocess.Popen[str], seconds: float) -> str:
    """What it printed until its end, and its exit code on the last line."""
    return f"{process.communicate(timeout=PATIENCE * seconds)[0]}\nexit code {process.returncode}"


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float) -> None:
    """Until the condition holds; fails when the process ends before."""
    asked = time.monotonic()
    deadline = asked + PATIENCE * seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "waited too long"
        # Most conditions read tables: asking takes at most a fifth of the time from what is waited for.
        time.sleep(min(max(0.2, 4 * (time.monotonic() - asked)), 0.8))
        asked = time.monotonic()


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """All processes that it has started, and those that these have; none of one that has gone."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def outlived(processes: Iterable[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that have not ended after that time. (`psutil.wait_procs` trips over processes that end as it looks.)"""
    left, deadline = list(processes), time.monotonic() + PATIENCE * seconds
    while (left := [each for each in left if _runs(each)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def title(process: psutil.Process) -> str:
    """The command line, which Ray makes the name of what a process runs; '' for one that is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
