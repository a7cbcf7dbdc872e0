"""Memory of rollout engines outside the trainer's process: weights in shared memory, and engines on a CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ebft_study.config import RunConfig
from ebft_study.cost import ModelShape
from ebft_study.errors import ConfigError

SHARED_MEMORY = Path("/dev/shm")
PROCESS_BYTES = 750 * 2**20
"""Memory of an engine's process on a CPU besides its weights, keys and values."""
_GIB = 2**30


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of the machine's memory that one policy's engine takes; all 0 without an engine."""

    segment_bytes: float = 0.0
    """Weights in /dev/shm, mapped by trainer and engine; benchmarks have weights of their own there."""
    process_bytes: float = 0.0
    """On a CPU: the engine's own weights, keys and values, and libraries."""

    @property
    def total_bytes(self) -> float:
        return self.segment_bytes + self.process_bytes


def engine_memory(config: RunConfig, device: str, model: ModelShape) -> EngineMemory:
    """Memory of the engine of a run whose trainer is on `device`; `model`: the shape of the generator."""
    if not config.uses_engine:
        return EngineMemory()
    weights = (4.0 if config.training.precision == "float32" else 2.0) * model.n_parameters
    segments = weights * (2 if config.evaluation.benchmarks else 1)
    if device != "cpu":  # what follows is on GPUs
        return EngineMemory(segments)
    processes = config.vllm.tensor_parallel_size * PROCESS_BYTES
    return EngineMemory(segments, weights + config.vllm.kv_cache_gib * _GIB + processes)


def check_room(needed: float, *, policies: int, folder: Path | None = None) -> None:
    """Refuse engines for whose weights `/dev/shm` is too small, before anything is loaded.

    Args:
        needed: bytes, of all policies that are trained at a time and of Ray's object store.
        folder: default: /dev/shm.

    Raises:
        ConfigError: less is free there.
    """
    folder = folder or SHARED_MEMORY
    try:
        there = os.statvfs(folder)
    except OSError as error:
        raise ConfigError(
            f"rollout.backend='vllm': weights travel through {folder}, which is not usable here ({error.strerror}). "
            "Use backend=strided"
        ) from None
    free = float(there.f_bavail * there.f_frsize)
    if needed > free:
        raise ConfigError(
            f"rollout.backend='vllm': the weights of {policies} trial{'s' * (policies > 1)} at a time, and Ray's "
            f"objects, need {needed / _GIB:.3g} GiB in {folder}, and {free / _GIB:.3g} GiB are free. Give it more "
            "(docker: --shm-size), run fewer trials at a time (budget.max_concurrent_trials), or use backend=strided"
        )
