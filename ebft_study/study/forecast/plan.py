"""What a study will take, before anything starts: trials, places, memory per worker, work, and hours.

Work comes from the cost model; how fast this machine does it, and what evaluations and starts cost, from the trials
that finished in earlier studies of the same storage folder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from ebft_study import text
from ebft_study.errors import ConfigError
from ebft_study.storage import Location
from ebft_study.study.cluster import requests
from ebft_study.study.forecast import throughput
from ebft_study.study.forecast.throughput import Speed
from ebft_study.study.forecast.trial_groups import Kind, kinds, wall_seconds
from ebft_study.study.spec.study_spec import ResourcesSpec, StudySpec
from ebft_study.training.memory import fit_memory

_GIB = 2**30


@dataclass(frozen=True)
class PlannedKind:
    """Trials that cost the same, whether one of them fits, and how fast it is."""

    kind: Kind
    memory_gib: float
    """Per worker, at the peak; NaN where not even the smallest split fits."""
    problem: str
    """Why it does not fit."""
    speed: Speed | None
    """None where nothing was measured yet."""

    @property
    def seconds(self) -> float | None:
        """Of one trial."""
        return self.speed.seconds(self.kind.work) if self.speed else None

    @property
    def fits(self) -> bool:
        return math.isfinite(self.memory_gib)

    @property
    def tokens(self) -> float:
        """Ground-truth tokens that one trial trains on."""
        run = self.kind.run
        return float(run.total_steps * run.training.batch_size * run.data.sequence_length)


@dataclass(frozen=True)
class StudyPlan:
    """`hours` is None where nothing was measured yet."""

    kinds: list[PlannedKind]
    concurrency: int

    @property
    def n_trials(self) -> int:
        return sum(row.kind.number for row in self.kinds)

    @property
    def fits(self) -> bool:
        return all(row.fits for row in self.kinds)

    @property
    def hours(self) -> float | None:
        """From the first start to the last end."""
        known = [(row.kind.number, row.seconds) for row in self.kinds if row.seconds is not None]
        return wall_seconds(known, self.concurrency) / 3600 if known else None

    @property
    def gpu_hours(self) -> float:
        """Of all trials; 0 without GPUs, and where nothing was measured yet."""
        return sum(row.kind.number * (row.seconds or 0.0) * row.kind.resources.gpus for row in self.kinds) / 3600


def plan(spec: StudySpec, *, storage: Location, memory_gib: float) -> StudyPlan:
    """The plan of a study; `memory_gib` is what a worker may use where the study does not say."""
    found = kinds(spec)
    concurrency = min(
        requests.concurrent_trials(spec, [kind.run for kind in found]), sum(kind.number for kind in found)
    )
    known = throughput.measured(storage)
    rows = []
    for kind in found:
        speed = known.of(kind.work, concurrency=concurrency) if known else None
        rows.append(PlannedKind(kind, *_memory(spec, kind, memory_gib), speed))
    return StudyPlan(rows, concurrency)


def usual_memory_gib(spec: StudySpec) -> float:
    """80 GiB on a GPU, as the larger ones have at least; on a CPU a worker's part of this machine's memory."""
    if spec.resources.gpus_per_worker:
        return 80.0
    here = float(psutil.virtual_memory().total) / _GIB
    return here / (requests.concurrent_trials(spec, []) * spec.resources.processes)


def _memory(spec: StudySpec, kind: Kind, memory_gib: float) -> tuple[float, str]:
    """GiB per worker at the peak, or NaN and why it does not fit."""
    run = kind.run
    budget = (run.training.memory_budget_gib or memory_gib) * _GIB
    try:
        device = spec.resources.device_of(run)
        fitting = fit_memory(run, device, world_size=kind.resources.processes, budget_bytes=budget)
    except ConfigError as error:
        return math.nan, str(error)
    return fitting.peak_bytes / _GIB, ""


# --- for people ------------------------------------------------------------------------------------------------


def show(planned: StudyPlan, spec: StudySpec, console: Console) -> None:
    """The table of kinds, and the sum in a sentence."""
    table = Table(title=f"{spec.study}: {' '.join(spec.question.split())}", title_justify="left", box=box.SIMPLE_HEAD)
    for header in ("trials like", "number", "steps", "tokens", "TFLOP", "GiB/worker", "time"):
        table.add_column(header, justify="left" if header == "trials like" else "right")
    for row in planned.kinds:
        kind, time = row.kind, text.duration(row.seconds)
        numbers = (
            f"{kind.number}",
            f"{kind.run.total_steps}",
            text.count(row.tokens),
            f"{kind.work.flops / 1e12:.3g}",
        )
        used = f"{row.memory_gib:.2f}" if row.fits else "too much"
        table.add_row(kind.label, *numbers, used, time, style="" if row.fits else "red")
    console.print(table)
    for line in summary(planned, spec):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def summary(planned: StudyPlan, spec: StudySpec) -> list[str]:
    """How many, where, and how long."""
    places = dict.fromkeys(_place(row.kind.resources) for row in planned.kinds)
    lines = [f"{planned.n_trials} trials, {planned.concurrency} at a time, {' or '.join(places)} each"]
    lines += [f"{row.kind.label}: {row.problem}" for row in planned.kinds if not row.fits]
    if planned.hours is None:
        return [*lines, "no time predicted: no trial has finished here yet to measure this machine by"]
    spent = f", {planned.gpu_hours:.3g} GPU hours" if planned.gpu_hours else ""
    return [*lines, f"about {text.duration(3600 * planned.hours)}{spent}, by {_basis(planned)}"]


def _place(resources: ResourcesSpec) -> str:
    """`4 workers of 2 CPU and 1 GPU`."""
    workers = f"{resources.processes} worker{'s' * (resources.processes > 1)} of {resources.cpus_per_worker} CPU"
    return workers + (f" and {resources.gpus_per_worker:g} GPU" if resources.gpus_per_worker else "")


def _basis(planned: StudyPlan) -> str:
    speeds = [row.speed for row in planned.kinds if row.speed]
    rates = sorted({f"{speed.flops_per_second / 1e9:.4g}" for speed in speeds}, key=float)
    spread = rates[0] if len(rates) == 1 else f"{rates[0]} to {rates[-1]}"
    return f"{spread} GFLOP/s of the {max(speed.trials for speed in speeds)} finished trials here that are most alike"
