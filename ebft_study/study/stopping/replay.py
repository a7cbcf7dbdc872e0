"""What early stopping would have done to a finished study: its recorded trials once more, in recorded time.

A simulation driven by events, with the scheduler and the rules of a live study and no cluster: each trial reports what
it reported when it did by its own pace, and a stop frees its place for the next one. The same input gives the same
decisions.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ebft_study import results
from ebft_study.errors import ResultsError
from ebft_study.storage import Location
from ebft_study.study.folder import history
from ebft_study.study.folder.trial_states import EARLY_STOP, Evaluation
from ebft_study.study.spec.study_spec import ObjectiveSpec, StudySpec
from ebft_study.study.stopping.rules import RuleMonitor

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class RecordedTrial:
    """A trial as it ran to its end."""

    trial_id: str
    configuration: str
    """Its settings without the seed, for people."""
    seed: int
    is_baseline: bool
    total_steps: int
    steps_done: int
    evaluations: tuple[Evaluation, ...]
    elapsed: tuple[float, ...]
    """Seconds from its start to each evaluation."""
    seconds: float
    """From its start to its end."""
    finished: bool = True
    """Whether it did all its steps; others failed or ended by themselves."""

    def final(self, metric: str) -> float:
        """The objective after the last step; NaN where it did not get there."""
        return self.evaluations[-1].get(metric) if self.finished and self.evaluations else math.nan


@dataclass(frozen=True)
class Stop:
    """A trial that would have been stopped."""

    trial: RecordedTrial
    step: int
    at_seconds: float
    """After the start of the study."""
    reason: str
    seconds_saved: float
    """What the trial still took when it was recorded."""

    @property
    def steps_saved(self) -> int:
        return self.trial.steps_done - self.step


@dataclass(frozen=True)
class Replay:
    """A study as it would have gone."""

    trials: tuple[RecordedTrial, ...]
    objective: ObjectiveSpec
    stops: tuple[Stop, ...]
    seconds: float
    """From the first start to the last end."""

    @property
    def steps_saved(self) -> int:
        return sum(stop.steps_saved for stop in self.stops)

    @property
    def seconds_saved(self) -> float:
        """Trial time."""
        return math.fsum(stop.seconds_saved for stop in self.stops)

    @cached_property
    def winner(self) -> str:
        """The best configuration when every trial runs to its end."""
        return best_configuration(self.trials, self.objective)

    @cached_property
    def chosen(self) -> str:
        """The best configuration by what was left; '' where nothing was."""
        return best_configuration(self._left, self.objective)

    @property
    def seeds_left(self) -> int:
        """Finished seeds that the choice was made by."""
        return means_by_configuration(self._left, self.objective.metric)[self.chosen][0]

    @property
    def _left(self) -> list[RecordedTrial]:
        stopped = {stop.trial.trial_id for stop in self.stops}
        return [trial for trial in self.trials if trial.trial_id not in stopped]

    @property
    def regret(self) -> float:
        """How much worse the chosen configuration is than the winner, by the means over all seeds on record."""
        means = means_by_configuration(self.trials, self.objective.metric)
        worse = means[self.chosen][1] - means[self.winner][1]
        return worse if self.objective.mode == "min" else -worse


def replay(trials: Sequence[RecordedTrial], spec: StudySpec, *, places: int) -> Replay:
    """Run recorded trials in their order, `places` at a time, under the scheduler and the stopping rules of `spec`."""
    judges = _Judges(trials, spec)
    waiting, running, stops = deque(range(len(trials))), list[tuple[float, int, int, float]](), list[Stop]()
    now = 0.0
    while waiting or running:
        while waiting and len(running) < places:
            _push(running, trials, waiting.popleft(), 0, now)
        now, index, point, started = heapq.heappop(running)
        trial = trials[index]
        if point == len(trial.evaluations):
            continue
        reason = judges.reason_to_stop(trial, trial.evaluations[point])
        if reason:
            saved = trial.seconds - trial.elapsed[point]
            stops.append(Stop(trial, trial.evaluations[point].step, now, reason, saved))
        else:
            _push(running, trials, index, point + 1, started)
    return Replay(tuple(trials), spec.objective, tuple(stops), now)


def _push(running: list[Any], trials: Sequence[RecordedTrial], index: int, point: int, started: float) -> None:
    """Queue a trial's next evaluation, or its end; of two at one moment the earlier trial's comes first."""
    trial = trials[index]
    after = trial.elapsed[point] if point < len(trial.evaluations) else trial.seconds
    heapq.heappush(running, (started + after, index, point, started))


class _Judges:
    """Rules and scheduler, asked in the order in which Tune asks them."""

    def __init__(self, trials: Sequence[RecordedTrial], spec: StudySpec) -> None:
        from ebft_study.study.stopping.schedulers import StudyScheduler

        longest = max((trial.total_steps for trial in trials), default=0)
        self._metric, self._watch = spec.objective.metric, RuleMonitor(spec.stopping, spec.objective)
        kind = spec.scheduler.kind
        self._scheduler = None if kind == "none" else StudyScheduler(spec, longest=longest, history={})
        self._scheduler_reasons = self._scheduler.reasons if self._scheduler else {}

    def reason_to_stop(self, trial: RecordedTrial, evaluation: Evaluation) -> str:
        if trial.is_baseline:
            return ""
        step, total, trial_id = evaluation.step, trial.total_steps, trial.trial_id
        report = {**evaluation.metrics, "step": step, "evaluated_step": step}
        self._watch.look(trial_id, report, total_steps=total)
        if self._scheduler is not None:  # also asked about what a rule stops, which is still a standard for others
            self._scheduler.look(trial_id, step, evaluation.get(self._metric), total_steps=total)
        return self._watch.reasons.get(trial_id) or self._scheduler_reasons.get(trial_id, "")


# --- the best --------------------------------------------------------------------------------------------------


def best_configuration(trials: Iterable[RecordedTrial], objective: ObjectiveSpec) -> str:
    """On the axes: best mean over seeds, of the configurations with the most finished seeds; '' without any."""
    sign = 1.0 if objective.mode == "min" else -1.0
    means = means_by_configuration(trials, objective.metric)
    return min(means, key=lambda name: (-means[name][0], sign * means[name][1]), default="")


def means_by_configuration(trials: Iterable[RecordedTrial], metric: str) -> dict[str, tuple[int, float]]:
    """Configuration on the axes -> number of finished seeds, mean of their final values."""
    finals: dict[str, list[float]] = {}
    for trial in trials:
        if not trial.is_baseline and math.isfinite(final := trial.final(metric)):
            finals.setdefault(trial.configuration, []).append(final)
    return {name: (len(values), math.fsum(values) / len(values)) for name, values in finals.items()}


# --- what is on record -----------------------------------------------------------------------------------------


def recorded_trials(folder: Location, spec: StudySpec) -> list[RecordedTrial]:
    """The trials of a study in the order in which they ran; refuses one that does not hold whole curves."""
    rows = results.read_table(folder, "trials").to_dict("records")
    rows.sort(key=lambda row: int(row["trial_id"][1:]))
    for row in rows:
        _refuse_half(folder, row)
    past = history.read(folder, spec.objective.metric).evaluations  # baselines, which nobody stops, have none here
    measured = dict(list(results.read_table(folder, "metrics").groupby("trial_id")))
    found = [_recorded(row, past.get(row["trial_id"], []), measured.get(row["trial_id"])) for row in rows]
    if not means_by_configuration(found, spec.objective.metric):
        raise ResultsError(f"{folder}: no finished trial on its axes has a {spec.objective.metric}. Use another study")
    return found


def _refuse_half(folder: Location, row: Mapping[Any, Any]) -> None:
    status, reason = row["status"], row["stop_reason"]
    remedy = "A what-if needs a study that ran with scheduler.kind=none and without stopping rules"
    if status in ("pending", "running", "interrupted"):
        raise ResultsError(f"{folder}: trial {row['trial_id']} is {status}, so its curve has no end yet. {remedy}")
    if status == "stopped" and str(reason).startswith(EARLY_STOP):
        done = int(row["steps_done"])
        raise ResultsError(f"{folder}: trial {row['trial_id']} was stopped early at step {done}. {remedy}")


def _recorded(
    row: Mapping[Any, Any], evaluations: Sequence[Evaluation], measured: pd.DataFrame | None
) -> RecordedTrial:
    elapsed = _elapsed(row, evaluations, measured) if measured is not None else ()
    total = row["total_seconds"] if row["total_seconds"] > 0 else 0.0
    return RecordedTrial(
        trial_id=row["trial_id"],
        configuration=str(row["configuration"]),
        seed=int(row["seed"]),
        is_baseline=isinstance(row["named_baseline"], str),
        total_steps=int(row["steps"] + row["warm_start_steps"]),
        steps_done=int(row["steps_done"]) if row["steps_done"] > 0 else 0,
        evaluations=tuple(evaluations),
        elapsed=elapsed,
        seconds=max(total, *elapsed, 0.0),
        finished=row["status"] == "finished",
    )


def _elapsed(row: Mapping[Any, Any], evaluations: Sequence[Evaluation], measured: pd.DataFrame) -> tuple[float, ...]:
    """Seconds from the trial's start to each evaluation. The time between two attempts is nobody's."""
    first = row["startup_seconds"] if row["startup_seconds"] > 0 else 0.0
    ordered = measured.sort_values("step")
    gaps = ordered["written_at"].diff().dt.total_seconds().clip(lower=0.0)
    gaps = gaps.where(ordered["attempt"].diff() == 0, 0.0)
    at = dict(zip(ordered["step"], first + gaps.cumsum(), strict=True))
    return tuple(float(at[evaluation.step]) for evaluation in evaluations)


def places_on_record(folder: Location) -> int:
    """The most trials that ran side by side."""
    rows = results.read_table(folder, "trials").dropna(subset=["started_at", "finished_at"])
    starts = [(moment, 1) for moment in rows["started_at"]]
    ends = [(moment, -1) for moment in rows["finished_at"]]
    changes = (change for _, change in sorted(starts + ends))
    return max([1, *itertools.accumulate(changes)])
