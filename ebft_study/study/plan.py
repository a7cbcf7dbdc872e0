"""What a study will take, before anything starts: trials, places, memory per worker, work, and hours.

Work comes from the cost model; how fast this machine does it, and what evaluations and starts cost, from the trials
that finished in earlier studies of the same storage folder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from ebft_study.config import RunConfig
from ebft_study.cost import StepShape
from ebft_study.errors import ConfigError
from ebft_study.places import Location
from ebft_study.report import text
from ebft_study.study import checks, pace, trials
from ebft_study.study.pace import Pace, Work
from ebft_study.study.spec import StudySpec
from ebft_study.training.memory import fit

_GIB = 2**30
CHOSEN = "chosen by the search (at most)"
_MOST_MEASURED = 50  # trials, the newest ones


@dataclass(frozen=True)
class Kind:
    """Trials that cost the same."""

    label: str
    """Of the first configuration."""
    trials: int
    steps: int
    work: Work
    tokens: float
    """Ground-truth tokens that one trial trains on."""
    memory_gib: float
    """Per worker, at the peak; NaN where not even the smallest split fits."""
    problem: str
    """Why it does not fit."""


@dataclass(frozen=True)
class StudyPlan:
    """`hours` is None where nothing was measured yet."""

    kinds: list[Kind]
    at_once: int
    pace: Pace

    @property
    def n_trials(self) -> int:
        return sum(kind.trials for kind in self.kinds)

    @property
    def fits(self) -> bool:
        return all(math.isfinite(kind.memory_gib) for kind in self.kinds)

    def seconds(self, kind: Kind) -> float | None:
        """Of one trial of a kind."""
        return self.pace.of(kind.work, at_once=self.at_once).seconds(kind.work) if self.pace else None

    @property
    def hours(self) -> float | None:
        """From the first start to the last end: full places all the time, and never less than the longest trial."""
        seconds = [(kind.trials, self.seconds(kind)) for kind in self.kinds]
        if any(own is None for _, own in seconds):
            return None
        own_seconds = [(count, own) for count, own in seconds if own is not None]
        total = sum(count * own for count, own in own_seconds) / self.at_once
        return max(total, max((own for _, own in own_seconds), default=0.0)) / 3600


def plan(spec: StudySpec, *, storage: Location, memory_gib: float) -> StudyPlan:
    """The plan of a study; `memory_gib` is what a worker may use where the study does not say."""
    planned = _runs(spec)
    kinds: dict[Any, tuple[str, RunConfig, int]] = {}
    for label, run, count in planned:
        first, _, before = kinds.get(cost_key(run), (label, run, 0))
        kinds[cost_key(run)] = (first, run, before + count)
    rows = [_kind(spec, label, run, count, memory_gib) for label, run, count in kinds.values()]
    at_once = min(checks.trials_at_once(spec, [run for _, run, _ in planned]), sum(kind.trials for kind in rows))
    return StudyPlan(rows, at_once, pace.measured(storage))


def usual_memory_gib(spec: StudySpec) -> float:
    """80 GiB on a GPU, as the larger ones have at least; on a CPU a worker's part of this machine's memory."""
    if spec.resources.gpus_per_worker:
        return 80.0
    here = float(psutil.virtual_memory().total) / _GIB
    return here / (checks.trials_at_once(spec, []) * spec.resources.processes)


def _runs(spec: StudySpec) -> list[tuple[str, RunConfig, int]]:
    """Label, settings and number of all trials; those that a search has yet to choose count as the dearest corner."""
    known = [(trial.configuration.label, trial.run, 1) for trial in trials.listed(spec)]
    to_choose = trials.number_of_trials(spec) - len(known)
    if not to_choose:
        return known
    dearest = max(checks.check(spec, spec.study), key=pace.flops)
    return [*known, (CHOSEN, dearest, to_choose)]


def cost_key(run: RunConfig) -> tuple[Any, ...]:
    """What trials of one cost have in common."""
    shape = StepShape.of(run)
    length = (run.training.steps, run.training.warm_start_steps, run.evaluation.eval_every_steps)
    return (run.model, run.features.feature_network, run.lora, shape, *length, run.training.memory_budget_gib)


def _kind(spec: StudySpec, label: str, run: RunConfig, count: int, memory_gib: float) -> Kind:
    budget = (run.training.memory_budget_gib or memory_gib) * _GIB
    try:
        fitting = fit(
            run, spec.resources.device_of(run), world_size=spec.resources.of(run).processes, budget_bytes=budget
        )
        peak, problem = fitting.peak_bytes / _GIB, ""
    except ConfigError as error:
        peak, problem = math.nan, str(error)
    return Kind(
        label=label,
        trials=count,
        steps=run.total_steps,
        work=Work.of(run, spec.resources.of(run).processes),
        tokens=float(run.total_steps * run.training.batch_size * run.data.sequence_length),
        memory_gib=peak,
        problem=problem,
    )


# --- for people ------------------------------------------------------------------------------------------------


def show(planned: StudyPlan, spec: StudySpec, console: Console) -> None:
    """The table of kinds, and the sum in a sentence."""
    table = Table(title=f"{spec.study}: {' '.join(spec.question.split())}", title_justify="left", box=box.SIMPLE_HEAD)
    for header in ("trials like", "number", "steps", "tokens", "TFLOP", "GiB/worker", "time"):
        table.add_column(header, justify="left" if header == "trials like" else "right")
    for kind in planned.kinds:
        fits = math.isfinite(kind.memory_gib)
        numbers = (f"{kind.trials}", f"{kind.steps}", text.count(kind.tokens), f"{kind.work.flops / 1e12:.3g}")
        used, time = f"{kind.memory_gib:.2f}" if fits else "too much", text.duration(planned.seconds(kind))
        table.add_row(kind.label, *numbers, used, time, style="" if fits else "red")
    console.print(table)
    for line in summary(planned, spec):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def summary(planned: StudyPlan, spec: StudySpec) -> list[str]:
    """How many, where, and how long."""
    resources = spec.resources
    workers = f"{resources.processes} worker{'s' * (resources.processes > 1)} of {resources.cpus_per_worker} CPU"
    gpus = f" and {resources.gpus_per_worker:g} GPU" if resources.gpus_per_worker else ""
    lines = [f"{planned.n_trials} trials, {planned.at_once} at a time, {workers}{gpus} each"]
    lines += [f"{kind.label}: {kind.problem}" for kind in planned.kinds if not math.isfinite(kind.memory_gib)]
    if planned.hours is None:
        return [*lines, "no time predicted: no trial has finished here yet to measure this machine by"]
    gpu_hours = planned.hours * planned.at_once * resources.processes * resources.gpus_per_worker
    spent = f", {gpu_hours:.3g} GPU hours" if gpu_hours else ""
    return [*lines, f"about {text.duration(3600 * planned.hours)}{spent}, by {_basis(planned)}"]


def _basis(planned: StudyPlan) -> str:
    speeds = [planned.pace.of(kind.work, at_once=planned.at_once) for kind in planned.kinds]
    rates = sorted({f"{speed.flops_per_second / 1e9:.4g}" for speed in speeds}, key=float)
    spread = rates[0] if len(rates) == 1 else f"{rates[0]} to {rates[-1]}"
    return f"{spread} GFLOP/s of the {max(speed.trials for speed in speeds)} finished trials here that are most alike"
