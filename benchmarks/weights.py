"""Weights in and out: seconds, bytes and memory of a start, a checkpoint and a resume; what bfloat16 keeps of steps.

A model with random weights is written to a temporary folder, as a hub would have it. Each part then runs in a process
of its own, over the same files, which are in the page cache: what is measured is this package's work, not the disk's.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.measure import in_fresh_process, resident_bytes
from benchmarks.rows import Row, Titled
from benchmarks.services import network_folder
from benchmarks.settings import Settings
from benchmarks.workload import setting_rows
from ebft_study.config import build_run, nest
from ebft_study.config.sections import OptimizerConfig
from ebft_study.methods import MetricAccumulator
from ebft_study.networks.loading import load_model, trained_parameters
from ebft_study.training import state
from ebft_study.training.optimizer import new_optimizer
from ebft_study.training.spent import Spent
from ebft_study.training.update import Run, WeightAverage

Facts = dict[str, float]
TYPES = {
    "nearest": {"weight_dtype": "bfloat16"},
    "stochastic": {"weight_dtype": "bfloat16", "rounding": "stochastic"},
    "float32": {"weight_dtype": "float32"},
}
"""Ways of storing weights whose steps are compared."""


# --- start, checkpoint, resume ---------------------------------------------------------------------------------


def tables(settings: Settings) -> Iterator[Titled]:
    """Seconds, bytes and memory of each part. The files on disk are bfloat16, as on the hub."""
    yield "setting", setting_rows(settings, "model", "weight_dtype", "threads")
    with (
        network_folder(replace(settings, weight_dtype="bfloat16")) as folder,
        tempfile.TemporaryDirectory(prefix="ebft-bench-") as saved,
    ):
        parts: dict[str, Callable[..., Facts]] = {
            "start": start,
            "start_of_other_workers": start_of_others,
            "checkpoint": write,
            "resume": resume,
        }
        for name, part in parts.items():
            facts = in_fresh_process(part, str(folder), saved, settings.weight_dtype, settings.threads)
            units = {"seconds": "s"}
            yield name, [Row(f"{name}/{key}", value, units.get(key, "B")) for key, value in facts.items()]


def start(folder: str, saved: str, dtype: str, threads: int | None, *, is_first: bool = True) -> Facts:
    """Loading of a generator by the first worker of a trial, which also verifies and hashes it."""
    _use(threads)
    before, started = resident_bytes()[0], time.perf_counter()
    load_model(folder, dtype=getattr(torch, dtype), is_first=is_first)
    return {"seconds": time.perf_counter() - started, "peak_memory": resident_bytes()[1] - before}


def start_of_others(folder: str, saved: str, dtype: str, threads: int | None) -> Facts:
    """Loading by any other worker."""
    return start(folder, saved, dtype, threads, is_first=False)


def write(folder: str, saved: str, dtype: str, threads: int | None) -> Facts:
    """A checkpoint of all weights and AdamW's states."""
    _use(threads)
    run = _run(folder, dtype)
    for parameter in trained_parameters(run.model).values():
        random = {name: torch.rand_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        run.optimizer.state[parameter] = {"step": torch.ones(()), **random}
    before, started = resident_bytes()[0], time.perf_counter()
    state.save(run, Path(saved))
    seconds, files = time.perf_counter() - started, sum(path.stat().st_size for path in Path(saved).iterdir())
    return {"seconds": seconds, "files": files, "more_memory": max(resident_bytes()[1] - before, 0)}


def resume(folder: str, saved: str, dtype: str, threads: int | None) -> Facts:
    """Verifying the checkpoint, and reading it into a model that is loaded already."""
    _use(threads)
    run = _run(folder, dtype)
    started = time.perf_counter()
    state.restore(run, Path(saved))
    return {"seconds": time.perf_counter() - started}


def _use(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _run(folder: str, dtype: str) -> Any:
    """The parts of a run that a checkpoint holds; a whole one would also load a feature network."""
    model = load_model(folder, dtype=getattr(torch, dtype), is_first=False).model
    optimizer = new_optimizer(
        list(model.parameters()), OptimizerConfig(), learning_rate=1e-6, rounding_key=lambda: (0,)
    )
    progress: dict[str, Any] = {"step": 1, "tokens_seen": 0, "latest": {}, "spent": Spent(), "rank": 0}
    tally: dict[str, Any] = {"accumulator": MetricAccumulator(), "accumulated_steps": 0}
    return SimpleNamespace(model=model, optimizer=optimizer, average=WeightAverage(model, None), **progress, **tally)


# --- what is left of small steps -------------------------------------------------------------------------------


def rounding_tables(model: str, *, steps: int, learning_rate: float, threads: int | None) -> Iterator[Titled]:
    """The same run with each way of storing weights: the share of weights that changed, and how far they went.

    `way` is how far the weights went in the direction in which float32 weights go, as a fraction of how far these go.
    """
    _use(threads)
    moves = {name: _moves(model, steps, learning_rate, changes) for name, changes in TYPES.items()}
    exact = moves["float32"].double()
    for name, move in moves.items():
        changed, way = float((move != 0).double().mean()), float(move.double() @ exact / (exact @ exact))
        yield name, [Row(f"{name}/changed", 100 * changed, "%"), Row(f"{name}/way", 100 * way, "%")]


def _moves(model: str, steps: int, learning_rate: float, changes: dict[str, str]) -> torch.Tensor:
    """The differences of all matrices' entries after `steps` updates."""
    settings: dict[str, Any] = {
        "model": model, "method": "sft", "precision": "bfloat16", "device": "cpu", "learning_rate": learning_rate,
        "steps": steps, "warmup_fraction": 0.0, **changes,
    }  # fmt: skip
    run = Run(build_run(nest(settings, source="bench"), source="bench"))
    matrices = [parameter for parameter in trained_parameters(run.model).values() if parameter.dim() > 1]
    before = [parameter.detach().to(torch.float32, copy=True) for parameter in matrices]
    for _ in range(steps):
        run.update()
    run.parts.close()
    differences = [p.detach().float() - old for p, old in zip(matrices, before, strict=True)]
    return torch.cat([difference.flatten() for difference in differences])
