"""Seconds, bytes, a machine's speed, and the surroundings of a measurement: a fresh process, Ray, an empty cache."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar
from unittest import mock

import torch

K = TypeVar("K")
P = ParamSpec("P")
R = TypeVar("R")
CEILING_SIZE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of matrices large enough for a machine's full speed."""
CEILING_TRIES = 8
REPLY_BYTES = 400e6
"""Ray's object store: replies to all trials at a time, with a margin."""

# --- time ------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall-clock time of one call, the GPU's work included."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device.startswith("cuda"):
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


def matmul_ceiling(device: str, dtype: torch.dtype, *, size: int | None = None) -> float:
    """FLOP/s of the best of several large matrix products."""
    size = size or CEILING_SIZE[torch.device(device).type]
    first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(first)
    times = in_turn({"product": lambda: torch.mm(first, second, out=out)}, repeats=CEILING_TRIES, device=device)
    return 2.0 * size**3 / min(times["product"])


# --- memory ----------------------------------------------------------------------------------------------------


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """Bytes by which memory use rises during `work`.

    On a CPU this is the process's own peak, so let nothing larger run in the process before (`in_fresh_process`).
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    before = resident_bytes()[0]
    work()
    return max(resident_bytes()[1] - before, 0)


def resident_bytes() -> tuple[int, int]:
    """Bytes of RAM that this process uses now, and its peak.

    Linux reports both. `ru_maxrss` would not do there: a new process starts with the peak of the one that started it.
    """
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        now, peak = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    except (OSError, KeyError):
        now = peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return now, peak


# --- surroundings ----------------------------------------------------------------------------------------------


def in_fresh_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """The result of `function`, which is found by its name in a process of its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


@contextlib.contextmanager
def local_ray() -> Iterator[None]:
    """Run Ray on this machine; actors end with it."""
    from ebft_study.study.cluster import own

    own.set_environment()
    with own.running(namespace="bench", slots=1, dashboard=False, travelling_bytes=REPLY_BYTES):
        yield


@contextlib.contextmanager
def empty_cache() -> Iterator[Path]:
    """Use a temporary folder as the package's cache, here and in processes started meanwhile."""
    with (
        tempfile.TemporaryDirectory(prefix="ebft-bench-") as folder,
        mock.patch.dict(os.environ, EBFT_STUDY_CACHE=folder),
    ):
        yield Path(folder)
