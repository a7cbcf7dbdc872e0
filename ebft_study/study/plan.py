"""What a study will take, before anything starts: trials, places, memory per worker, work, and hours.

Work comes from the cost model; how fast this machine does it, and what evaluations and starts cost, from the trials
that finished in earlier studies of the same storage folder.
"""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from ebft_study import config, results
from ebft_study.config import RunConfig
from ebft_study.cost import StepShape, step_cost
from ebft_study.errors import ConfigError, EbftError
from ebft_study.places import Location, Place, place
from ebft_study.report import text
from ebft_study.study import checks, trials
from ebft_study.study.spec import StudySpec
from ebft_study.training.memory import fit, shapes

_GIB = 2**30
_MOST_MEASURED = 50  # trials, the newest ones


@dataclass(frozen=True)
class Kind:
    """Trials that cost the same."""

    label: str
    """Of the first configuration."""
    trials: int
    steps: int
    evaluations: int
    flops: float
    """Of all updates of one trial, on all its workers."""
    tokens: float
    """Ground-truth tokens that one trial trains on."""
    memory_gib: float
    """Per worker, at the peak; NaN where not even the smallest split fits."""
    problem: str
    """Why it does not fit."""


@dataclass(frozen=True)
class Measured:
    """Medians over finished trials of this machine."""

    trials: int
    flops_per_second: float
    evaluation_seconds: float
    """All that a trial does between updates, per evaluation."""
    startup_seconds: float


@dataclass(frozen=True)
class StudyPlan:
    """`hours` is None where nothing was measured yet."""

    kinds: list[Kind]
    at_once: int
    measured: Measured | None

    @property
    def n_trials(self) -> int:
        return sum(kind.trials for kind in self.kinds)

    @property
    def fits(self) -> bool:
        return all(math.isfinite(kind.memory_gib) for kind in self.kinds)

    def seconds(self, kind: Kind) -> float | None:
        """Of one trial of a kind."""
        if self.measured is None:
            return None
        m = self.measured
        return m.startup_seconds + kind.flops / m.flops_per_second + kind.evaluations * m.evaluation_seconds

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
        first, _, before = kinds.get(_cost_key(run), (label, run, 0))
        kinds[_cost_key(run)] = (first, run, before + count)
    rows = [_kind(spec, label, run, count, memory_gib) for label, run, count in kinds.values()]
    at_once = min(checks.trials_at_once(spec, [run for _, run, _ in planned]), sum(kind.trials for kind in rows))
    return StudyPlan(rows, at_once, measured(storage))


def usual_memory_gib(spec: StudySpec) -> float:
    """80 GiB on a GPU, as the larger ones have at least; on a CPU a worker's part of this machine's memory."""
    if spec.resources.gpus_per_worker:
        return 80.0
    here = float(psutil.virtual_memory().total) / _GIB
    return here / (checks.trials_at_once(spec, []) * spec.resources.processes)


def _runs(spec: StudySpec) -> list[tuple[str, RunConfig, int]]:
    """Label, settings and number of all trials; those that a search has yet to choose count as the dearest corner."""
    known = [(trial.configuration.label, trial.run, 1) for trial in trials.trials_of(spec, trials.enumerated(spec))]
    to_choose = trials.number_of_trials(spec) - len(known)
    if not to_choose:
        return known
    dearest = max(checks.check(spec, spec.study), key=flops)
    return [*known, ("chosen by the search (at most)", dearest, to_choose)]


def _cost_key(run: RunConfig) -> tuple[Any, ...]:
    """What trials of one cost have in common."""
    shape = StepShape.of(run)
    length = (run.training.steps, run.training.warm_start_steps, run.evaluation.eval_every_steps)
    return (run.model, run.features.feature_network, run.lora, shape, *length, run.training.memory_budget_gib)


def _kind(spec: StudySpec, label: str, run: RunConfig, count: int, memory_gib: float) -> Kind:
    budget = (run.training.memory_budget_gib or memory_gib) * _GIB
    try:
        fitting = fit(run, spec.resources.device_of(run), world_size=spec.resources.processes, budget_bytes=budget)
        peak, problem = fitting.peak_bytes / _GIB, ""
    except ConfigError as error:
        peak, problem = math.nan, str(error)
    return Kind(
        label=label,
        trials=count,
        steps=run.total_steps,
        evaluations=evaluations(run),
        flops=flops(run),
        tokens=float(run.total_steps * run.training.batch_size * run.data.sequence_length),
        memory_gib=peak,
        problem=problem,
    )


def flops(run: RunConfig) -> float:
    """Of all updates of a run, its warm start included."""
    step, (model, network) = StepShape.of(run), shapes(run)
    own = step_cost(model, network, step).total.flops
    warm = step_cost(model, network, replace(step, method="sft")).total.flops
    return run.training.steps * own + run.training.warm_start_steps * warm


def evaluations(run: RunConfig) -> int:
    """Of the validation split, and one more before and after for the held-out split."""
    warm = run.training.warm_start_steps > 0
    return 3 + run.total_steps // run.evaluation.eval_every_steps + int(warm)


# --- what this machine has done --------------------------------------------------------------------------------


def measured(storage: Location) -> Measured | None:
    """From the newest finished trials of all studies in a folder that ran on this machine; None without any."""
    rows: list[dict[str, float]] = []
    here = place(storage)
    records = [path for name in here.names() if (path := here / name / "study.yaml").exists()]
    for path in sorted(records, key=lambda path: path.changed_at() or 0.0, reverse=True):
        if len(rows) < _MOST_MEASURED:
            rows += list(_finished(path.parent))
    if not rows:
        return None
    medians = pd.DataFrame(rows).median()
    return Measured(len(rows), *(float(medians[name]) for name in ("rate", "evaluation", "startup")))


def _finished(folder: Place) -> Iterable[dict[str, float]]:
    table = results.read_table(folder, "trials")
    steps = results.read_table(folder, "metrics").groupby("trial_id")["step_seconds"].mean()
    here = table[(table["status"] == "finished") & (table["host"].isna() | (table["host"] == socket.gethostname()))]
    for row in here.to_dict("records"):
        seconds = float(steps.get(row["trial_id"], math.nan))
        if not seconds > 0 or not row["train_seconds"] > 0:
            continue
        # Settings of another version, or a model that is not there any more, measure nothing.
        with contextlib.suppress(EbftError):
            yield _measurement(_run_of(row), row, seconds)


def _measurement(run: RunConfig, row: dict[Any, Any], step_seconds: float) -> dict[str, float]:
    between = max(row["train_seconds"] - run.total_steps * step_seconds, 0.0)
    return {
        "rate": flops(run) / (run.total_steps * step_seconds),
        "evaluation": between / evaluations(run),
        "startup": max(row["total_seconds"] - row["train_seconds"], 0.0),
    }


def _run_of(row: dict[Any, Any]) -> RunConfig:
    """The settings of a trial, from its row; raises `ConfigError` where this version does not know them."""
    settings = {name: _plain(row[name]) for name in config.short_names() if name in row}
    given = {name: value for name, value in settings.items() if value is not None}
    return config.build_run(config.nest(given, source="trials"), source="trials")


def _plain(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    return None if value is None or value != value else value


# --- for people ------------------------------------------------------------------------------------------------


def show(planned: StudyPlan, spec: StudySpec, console: Console) -> None:
    """The table of kinds, and the sum in a sentence."""
    table = Table(title=f"{spec.study}: {' '.join(spec.question.split())}", title_justify="left", box=box.SIMPLE_HEAD)
    for header in ("trials like", "number", "steps", "tokens", "TFLOP", "GiB/worker", "time"):
        table.add_column(header, justify="left" if header == "trials like" else "right")
    for kind in planned.kinds:
        fits = math.isfinite(kind.memory_gib)
        numbers = (f"{kind.trials}", f"{kind.steps}", text.count(kind.tokens), f"{kind.flops / 1e12:.3g}")
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
    if planned.hours is None or planned.measured is None:
        return [*lines, "no time predicted: no trial has finished here yet to measure this machine by"]
    gpu_hours = planned.hours * planned.at_once * resources.processes * resources.gpus_per_worker
    spent = f", {gpu_hours:.3g} GPU hours" if gpu_hours else ""
    basis = f"{planned.measured.flops_per_second / 1e9:.4g} GFLOP/s over {planned.measured.trials} finished trials here"
    return [*lines, f"about {text.duration(3600 * planned.hours)}{spent}, by {basis}"]
