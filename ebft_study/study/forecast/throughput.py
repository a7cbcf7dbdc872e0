"""The throughput of this machine, from the trials that finished on it in earlier studies of a storage folder.

The trials that resemble the planned one most count: those of the same model, method and number of workers if there are
any. Other models and methods reach another fraction of a machine's speed, and concurrent trials share its memory.
"""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from ebft_study import config, results
from ebft_study.config import RunConfig
from ebft_study.cost import StepShape, step_cost
from ebft_study.errors import EbftError
from ebft_study.results import cell_value, studies_in
from ebft_study.results.reader import read_spec
from ebft_study.storage import Location, StoragePath
from ebft_study.study.forecast.benchmarks import benchmark_evaluations, benchmark_work
from ebft_study.study.spec.trials import Trial
from ebft_study.training.memory import evaluated_sequence_flops, shapes

_MOST_MEASURED = 50  # trials, the newest ones
_SHARED: tuple[list[str], ...] = (
    ["model", "method", "workers", "served", "concurrency", "has_benchmarks"],
    ["model", "method", "workers", "served", "concurrency"],
    ["model", "method", "workers", "served"],
    ["model", "workers", "served"],
    ["model"],
    [],
)
"""Properties that earlier trials must share with the planned one, from the strictest list to none."""


@dataclass(frozen=True)
class Work:
    """The work of one trial, and the properties that decide its throughput."""

    model: str
    method: str
    workers: int
    """0 where a trial trains in its own process, which starts much sooner than a group of one worker."""
    served: bool
    """Whether samples or features come from another process."""
    flops: float
    """FLOPs of all updates, on all its workers."""
    evaluation_flops: float
    """FLOPs of all evaluations, those of benchmarks included."""
    judging_seconds: float = 0.0
    """Time that its workers wait for the verdicts on answers to benchmarks."""
    has_benchmarks: bool = False

    @classmethod
    def from_trial(cls, trial: Trial) -> Work:
        return cls.from_run(trial.run, trial.resources.workers_per_trial)

    @classmethod
    def from_run(cls, run: RunConfig, workers: int) -> Work:
        served = run.uses_engine or run.features.backend == "service"
        answered, n_times = benchmark_work(run), benchmark_evaluations(run)
        if workers > 1 and answered.problems:
            n_times += 1  # several workers share no evaluation of the base model with other trials
        return cls(
            run.model,
            run.method,
            workers,
            served,
            flops(run),
            evaluation_flops(run) + n_times * answered.flops,
            n_times * answered.judging_seconds / max(workers, 1),
            answered.problems > 0,
        )


@dataclass(frozen=True)
class Throughput:
    """Medians over finished trials of this machine."""

    trials: int
    flops_per_second: float
    evaluation_flops_per_second: float
    """Between updates, where a trial evaluates and writes checkpoints."""
    startup_seconds: float
    others: tuple[float, float] | None = None
    """Where no trial of the model has finished: the least and the most FLOPs per second of trials of other models."""

    def at(self, flops_per_second: float) -> Throughput:
        """With another speed, of evaluations as of updates."""
        ratio = flops_per_second / self.flops_per_second
        evaluation = ratio * self.evaluation_flops_per_second
        return replace(self, flops_per_second=flops_per_second, evaluation_flops_per_second=evaluation)

    def seconds(self, work: Work) -> float:
        """Duration of a trial."""
        training = work.flops / self.flops_per_second
        return self.startup_seconds + training + self.evaluation_seconds(work.evaluation_flops, work.judging_seconds)

    def evaluation_seconds(self, flops: float, judging_seconds: float) -> float:
        return flops / self.evaluation_flops_per_second + judging_seconds


class Measurements:
    """The throughput of earlier trials."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows = pd.DataFrame(rows)

    def __bool__(self) -> bool:
        return len(self._rows) > 0

    def throughput(self, work: Work, *, concurrency: int) -> Throughput:
        """The throughput expected for `work` among `concurrency` trials, by the earlier trials most like it."""
        wanted = {**vars(work), "concurrency": concurrency}
        for names in _SHARED:
            rows = self._rows
            for name in names:
                rows = rows[rows[name] == wanted[name]]
            if len(rows):
                break
        rate, evaluation, startup = (float(rows[name].median()) for name in ("rate", "evaluation_rate", "startup"))
        others = None if "model" in names else (float(rows["rate"].min()), float(rows["rate"].max()))
        return Throughput(len(rows), rate, evaluation, startup, others)


def measured(storage: Location) -> Measurements:
    """Measurements from the newest trials that finished on this machine, in all studies of a folder."""
    rows: list[dict[str, Any]] = []
    for folder in earlier_studies(storage):
        if len(rows) < _MOST_MEASURED:
            rows += list(_finished(folder))
    return Measurements(rows)


def earlier_studies(storage: Location) -> list[StoragePath]:
    """The folders of all studies in a folder, the newest first."""
    records = [path for folder in studies_in(storage) if (path := folder / "study.yaml").exists()]
    return [path.parent for path in sorted(records, key=lambda path: path.changed_at() or 0.0, reverse=True)]


def flops(run: RunConfig) -> float:
    """FLOPs of all updates of a run, its warm start included."""
    step, (model, network) = StepShape.from_config(run), shapes(run)
    update = step_cost(model, network, step).total.flops
    warm = step_cost(model, network, replace(step, method="sft")).total.flops
    return run.training.steps * update + run.training.warm_start_steps * warm


def evaluations(run: RunConfig) -> int:
    """Number of evaluations of a run, of both splits."""
    return _validations(run) + _heldout_evaluations(run)


def _validations(run: RunConfig) -> int:
    return 1 + run.total_steps // run.evaluation.eval_every_steps + int(run.training.warm_start_steps > 0)


def _heldout_evaluations(run: RunConfig) -> int:
    """At the start, where a warm start ends, and at the end."""
    return 2 + int(run.training.warm_start_steps > 0)


def evaluation_flops(run: RunConfig) -> float:
    """FLOPs of all evaluations of losses: sampling and features, those of the judge too, and cross-entropy."""
    evaluation = run.evaluation
    validation = evaluation.validation_sequences * evaluated_sequence_flops(
        run, completion_length=run.rollout.completion_length
    )
    longest = max(*evaluation.profile_lengths, run.rollout.completion_length)
    heldout = evaluation.heldout_sequences * evaluated_sequence_flops(run, completion_length=longest)
    return _validations(run) * validation + _heldout_evaluations(run) * heldout


# --- reading earlier studies -----------------------------------------------------------------------------------


def _finished(folder: StoragePath) -> Iterable[dict[str, Any]]:
    table = results.read_table(folder, "trials")
    steps = results.read_table(folder, "metrics").groupby("trial_id")["step_seconds"].mean()
    with contextlib.suppress(EbftError):
        asked = read_spec(folder, []).get("resources") or {}
        here = table[(table["status"] == "finished") & (table["host"].isna() | (table["host"] == socket.gethostname()))]
        concurrent_trials = concurrency(table)
        for row in here.to_dict("records"):
            seconds = float(steps.get(row["trial_id"], math.nan))
            if not seconds > 0 or not row["train_seconds"] > 0:
                continue
            # Settings of another version, or a model that is not there any more, measure nothing.
            with contextlib.suppress(EbftError):
                run = _run_of(row)
                work = Work.from_run(run, int(asked.get("workers_per_trial", 1)))
                yield _measurement(work, row, run.total_steps * seconds, concurrent_trials)


def _measurement(work: Work, row: dict[Any, Any], updating: float, concurrent_trials: int) -> dict[str, Any]:
    between = max(row["train_seconds"] - updating - work.judging_seconds, 1e-3)
    return {
        **{name: getattr(work, name) for name in ("model", "method", "workers", "served", "has_benchmarks")},
        "concurrency": concurrent_trials,
        "rate": work.flops / updating,
        "evaluation_rate": work.evaluation_flops / between,
        "startup": max(row["total_seconds"] - row["train_seconds"], 0.0),
    }


def concurrency(table: pd.DataFrame) -> int:
    """Mean number of concurrent trials of a study, over the time in which any ran."""
    timed = table.dropna(subset=["started_at", "finished_at"])
    spans = sorted(zip(timed["started_at"], timed["finished_at"], strict=True))
    busy, end = 0.0, None
    for start, finish in spans:
        begin = start if end is None else max(start, end)
        busy += max((finish - begin).total_seconds(), 0.0)
        end = finish if end is None else max(end, finish)
    total = sum((finish - start).total_seconds() for start, finish in spans)
    return max(1, round(total / busy)) if busy else 1


def _run_of(row: dict[Any, Any]) -> RunConfig:
    """The settings of a trial, from its row; raises `ConfigError` where this version does not know them."""
    settings = {name: cell_value(row[name]) for name in config.short_names() if name in row}
    set_settings = {name: value for name, value in settings.items() if value is not None}
    return config.build_run(config.nest(set_settings, source="trials"), source="trials")
