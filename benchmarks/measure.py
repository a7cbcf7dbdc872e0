"""Seconds, bytes and the speed of a machine."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

K = TypeVar("K")
P = ParamSpec("P")
R = TypeVar("R")
CEILING_SIZE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of matrices large enough for a machine's full speed."""
CEILING_TRIES = 8


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall-clock time of one call, the GPU's work included."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(works: Mapping[K, Callable[[], object]], *, repeats: int, device: str) -> dict[K, list[float]]:
    """Seconds of every work in each of `repeats` rounds, after one call of each to warm up.

    A round runs all works one after another, so that whatever disturbs the machine meets all of them alike, and
    ratios are taken within a round.
    """
    for work in works.values():
        work()
    times: dict[K, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return times


def matmul_ceiling(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the best of several large matrix products."""
    size = CEILING_SIZE[torch.device(device).type]
    first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(first)
    times = in_turn({"product": lambda: torch.mm(first, second, out=out)}, repeats=CEILING_TRIES, device=device)
    return 2.0 * size**3 / min(times["product"])


# --- memory ----------------------------------------------------------------------------------------------------


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """How far memory rises above what was held before `work`.

    On a CPU this is the process's own peak, so let nothing larger run in the process before (`in_fresh_process`).
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    before = resident_bytes()[0]
    work()
    return max(resident_bytes()[1] - before, 0)


def resident_bytes() -> tuple[int, int]:
    """Bytes of RAM that this process holds now, and the most it ever held.

    Linux tells both. `ru_maxrss` would not do there: a new process starts with the peak of the one that started it.
    """
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return _kilobytes(lines["VmRSS"]), _kilobytes(lines["VmHWM"])
    except (OSError, KeyError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return peak, peak


def _kilobytes(entry: str) -> int:
    return int(entry.split()[0]) * 1024


def in_fresh_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """The result of `function`, which is found by its name in a process of its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()
