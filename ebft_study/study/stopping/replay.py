"""Early-stopping replay: what early stopping would have done to a finished study.

An event-driven simulation with the scheduler and the rules of a live study and no cluster. Recorded trials run again in
recorded time: each reports what it reported when it did, and a stop frees its slot for the next one. The same input
gives the same decisions.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ebft_study import results
from ebft_study.errors import ResultsError
from ebft_study.storage import Location
from ebft_study.study.folder import history
from ebft_study.study.folder.trial_states import EARLY_STOP, OPEN, Evaluation
from ebft_study.study.spec.study_spec import ObjectiveSpec, StudySpec
from ebft_study.study.spec.trials import Replicate, known_labels, shuffled
from ebft_study.study.stopping.race import Race, Scores
from ebft_study.study.stopping.rules import RuleMonitor
from ebft_study.study.stopping.schedulers import StudyScheduler

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class RecordedTrial:
    """A trial as it ran to its end. Times are seconds since its start."""

    trial_id: str
    configuration: str
    """Settings without the seed, as tables show them."""
    seed: int
    is_baseline: bool
    total_steps: int
    n_samples: int
    steps_done: int
    evaluations: tuple[Evaluation, ...]
    elapsed: tuple[float, ...]
    """End of each evaluation, in seconds since the trial's start."""
    seconds: float
    """Duration of the trial."""
    finished: bool = True
    """Whether it did all its steps; others failed or ended by themselves."""
    warm_start_steps: int = 0

    @property
    def replicate(self) -> Replicate:
        return Replicate(self.trial_id, self.configuration, self.seed, self.total_steps, self.warm_start_steps)

    def final(self, metric: str) -> float:
        """The objective after the last step; NaN if it was not reached."""
        return self.evaluations[-1].get(metric) if self.finished and self.evaluations else math.nan


@dataclass(frozen=True)
class Stop:
    """A trial that would have been stopped."""

    trial: RecordedTrial
    step: int
    at_seconds: float
    """Since the start of the study."""
    reason: str
    seconds_saved: float
    """Trial time that was recorded after the stop."""

    @property
    def steps_saved(self) -> int:
        return self.trial.steps_done - self.step


@dataclass(frozen=True)
class Replay:
    """A study as it would have run."""

    trials: tuple[RecordedTrial, ...]
    objective: ObjectiveSpec
    stops: tuple[Stop, ...]
    seconds: float
    """Wall-clock time from the first start to the last end."""

    @property
    def steps_done(self) -> int:
        """Steps of all trials when nothing is stopped."""
        return sum(trial.steps_done for trial in self.trials)

    @property
    def steps_saved(self) -> int:
        return sum(stop.steps_saved for stop in self.stops)

    @property
    def seconds_saved(self) -> float:
        """Trial time."""
        return math.fsum(stop.seconds_saved for stop in self.stops)

    @cached_property
    def means(self) -> dict[str, tuple[int, float]]:
        """Configuration on the axes -> number of finished seeds, mean of their final values, if nothing is stopped."""
        return means_by_configuration(self.trials, self.objective.metric)

    @cached_property
    def means_left(self) -> dict[str, tuple[int, float]]:
        """The same, of the trials that were not stopped."""
        stopped = {stop.trial.trial_id for stop in self.stops}
        left = (trial for trial in self.trials if trial.trial_id not in stopped)
        return means_by_configuration(left, self.objective.metric)

    @property
    def winner(self) -> str:
        """The best configuration when every trial runs to its end."""
        return best_configuration(self.means, self.objective)

    @property
    def chosen(self) -> str:
        """The best configuration by the trials that were not stopped; '' if there are none."""
        return best_configuration(self.means_left, self.objective)

    @property
    def regret(self) -> float:
        """Objective lost by choosing the chosen configuration instead of the winner: means over all recorded seeds."""
        worse = self.means[self.chosen][1] - self.means[self.winner][1]
        return worse if self.objective.mode == "min" else -worse


def means_by_configuration(trials: Iterable[RecordedTrial], metric: str) -> dict[str, tuple[int, float]]:
    """Configuration on the axes -> number of finished seeds, mean of their final values."""
    finals: dict[str, list[float]] = {}
    for trial in trials:
        if not trial.is_baseline and math.isfinite(final := trial.final(metric)):
            finals.setdefault(trial.configuration, []).append(final)
    return {name: (len(values), math.fsum(values) / len(values)) for name, values in finals.items()}


def best_configuration(means: Mapping[str, tuple[int, float]], objective: ObjectiveSpec) -> str:
    """The best mean over seeds, of the configurations with the most finished seeds; '' without any."""
    sign = 1.0 if objective.mode == "min" else -1.0
    return min(means, key=lambda name: (-means[name][0], sign * means[name][1]), default="")


# --- simulation ------------------------------------------------------------------------------------------------


def replay(
    trials: Sequence[RecordedTrial], spec: StudySpec, *, concurrency: int, scores: Scores = lambda step: {}
) -> Replay:
    """Run recorded trials `concurrency` at a time under the scheduler and stopping rules of `spec`.

    They start in their order; a live study with a scheduler that compares configurations has that of `as_started`.

    Args:
        scores: for a race, the objective of each trial at a step with that of single sequences.
    """
    early_stopping = _EarlyStopping(trials, spec, scores)
    waiting = dict.fromkeys(range(len(trials)), 0)
    """Trial that waits for a slot -> its evaluations so far."""
    running, stops = list[tuple[float, int, int, float]](), list[Stop]()
    now = 0.0

    def queue(index: int, point: int, started: float) -> None:
        """The trial's next evaluation, or its end; of two at one moment the earlier trial's comes first."""
        trial = trials[index]
        elapsed = trial.elapsed[point] if point < len(trial.evaluations) else trial.seconds
        heapq.heappush(running, (started + elapsed, index, point, started))

    def stop(index: int, done: int, reason: str) -> None:
        trial = trials[index]
        step, elapsed = (trial.evaluations[done - 1].step, trial.elapsed[done - 1]) if done else (0, 0.0)
        stops.append(Stop(trial, step, now, reason, trial.seconds - elapsed))

    while waiting or running:
        while waiting and len(running) < concurrency:
            index = early_stopping.next_of(waiting)
            done = waiting.pop(index)
            if reason := early_stopping.reason_not_to_start(trials[index]):
                stop(index, done, reason)
                early_stopping.end(trials[index])
            else:
                queue(index, done, now - (trials[index].elapsed[done - 1] if done else 0.0))
        if not running:
            break
        now, index, point, started = heapq.heappop(running)
        trial = trials[index]
        if point == len(trial.evaluations):
            early_stopping.end(trial)
            continue
        reason = early_stopping.reason_to_stop(trial, trial.evaluations[point])
        if reason:
            stop(index, point + 1, reason)
            early_stopping.end(trial)
        elif early_stopping.must_wait(trial) and not all(early_stopping.must_wait(trials[i]) for i in waiting):
            waiting[index] = point + 1
        else:
            queue(index, point + 1, started)
    return Replay(tuple(trials), spec.objective, tuple(stops), now)


def as_started(trials: Sequence[RecordedTrial], spec: StudySpec) -> list[RecordedTrial]:
    """Recorded trials in the order in which a live study under the scheduler of `spec` starts them."""
    if not spec.scheduler.compares:
        return list(trials)
    first = known_labels(spec)

    def unit(trial: RecordedTrial) -> tuple[int, str, bool]:
        return trial.seed, trial.configuration, trial.is_baseline

    return shuffled(trials, spec.drawn_by, unit, first=first)


class _EarlyStopping:
    """Rules and scheduler, called in the order in which Tune calls them."""

    def __init__(self, trials: Sequence[RecordedTrial], spec: StudySpec, scores: Scores) -> None:
        longest = max((trial.total_steps for trial in trials), default=0)
        self._trials = trials
        self._metric, self._rules = spec.objective.metric, RuleMonitor(spec.stopping, spec.objective)
        self._scheduler: StudyScheduler | None = None
        self._race: Race | None = None
        if spec.scheduler.kind == "race":
            on_axes = [trial for trial in trials if not trial.is_baseline]
            evaluated = [{evaluation.step for evaluation in trial.evaluations} for trial in on_axes if trial.finished]
            steps = set.intersection(*evaluated) if evaluated else ()
            self._race = Race(spec, [trial.replicate for trial in on_axes], steps, scores=scores)
        elif spec.scheduler.compares:
            self._scheduler = StudyScheduler(spec, longest=longest, history={})

    def next_of(self, waiting: Mapping[int, int]) -> int:
        """The waiting trial that gets the next slot: the first one, or in a race the one that is furthest behind."""

        def order(index: int) -> tuple[bool, int, int]:
            trial = self._trials[index]
            return not trial.is_baseline, waiting[index], index

        return min(waiting, key=order) if self._race else next(iter(waiting))

    def must_wait(self, trial: RecordedTrial) -> bool:
        """Whether a trial pauses for others."""
        return self._race is not None and not trial.is_baseline and self._race.must_wait(trial.trial_id)

    def end(self, trial: RecordedTrial) -> None:
        """A trial is over."""
        if self._race:
            self._race.end(trial.trial_id)

    def reason_not_to_start(self, trial: RecordedTrial) -> str:
        if trial.is_baseline:
            return ""
        if self._race:
            return self._race.stopped.get(trial.configuration, "")
        return self._scheduler.reason_not_to_start(trial.configuration) if self._scheduler else ""

    def reason_to_stop(self, trial: RecordedTrial, evaluation: Evaluation) -> str:
        step, total, trial_id = evaluation.step, trial.total_steps, trial.trial_id
        if trial.is_baseline:
            return ""
        report = {**evaluation.metrics, "step": step, "evaluated_step": step}
        # The scheduler also sees a trial that a rule stops: others are compared with it.
        ruled_out = self._rules.should_stop(
            trial_id,
            report,
            total_steps=total,
            n_samples=trial.n_samples,
            warm_start_steps=trial.warm_start_steps,
        )
        behind = self._behind(trial, step, evaluation.get(self._metric))
        return self._rules.reasons[trial_id] if ruled_out else behind

    def _behind(self, trial: RecordedTrial, step: int, value: float) -> str:
        """Why the scheduler stops a trial; '' if it does not."""
        if self._race:
            self._race.add(trial.trial_id, step, value)
            return self._race.stopped.get(trial.configuration, "") if step < trial.total_steps else ""
        if self._scheduler and self._scheduler.should_stop(trial.replicate, step, value):
            return self._scheduler.reasons[trial.trial_id]
        return ""


# --- the record ------------------------------------------------------------------------------------------------


def recorded_trials(folder: Location, spec: StudySpec) -> list[RecordedTrial]:
    """The trials of a study in the order in which they ran; refuses a study without complete curves."""
    rows = results.read_table(folder, "trials").to_dict("records")
    rows = [row for row in rows if row["status"] != results.SKIPPED]  # promotions stay as they were
    rows.sort(key=lambda row: int(row["trial_id"][1:]))
    for row in rows:
        _refuse_incomplete(folder, row)
    evaluations = history.read(folder, spec.objective.metric).evaluations  # those of baselines are not in it
    measured = dict(list(results.read_table(folder, "metrics").groupby("trial_id")))
    recorded = [_recorded(row, evaluations.get(row["trial_id"], []), measured.get(row["trial_id"])) for row in rows]
    if not means_by_configuration(recorded, spec.objective.metric):
        raise ResultsError(f"{folder}: no finished trial on its axes has a {spec.objective.metric}. Use another study")
    return recorded


def _refuse_incomplete(folder: Location, row: Mapping[Any, Any]) -> None:
    status, reason = row["status"], row["stop_reason"]
    remedy = "An early-stopping replay needs a study that ran with scheduler.kind=none and without stopping rules"
    if status in OPEN:
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
        n_samples=int(row["n_samples"]) if row["n_samples"] > 0 else 1,  # SFT samples nothing
        steps_done=int(row["steps_done"]) if row["steps_done"] > 0 else 0,
        evaluations=tuple(evaluations),
        elapsed=elapsed,
        seconds=max(total, *elapsed, 0.0),
        finished=row["status"] == "finished",
        warm_start_steps=int(row["warm_start_steps"]),
    )


def _elapsed(row: Mapping[Any, Any], evaluations: Sequence[Evaluation], measured: pd.DataFrame) -> tuple[float, ...]:
    """Seconds from the trial's start to each evaluation, without the time between two attempts."""
    startup = row["startup_seconds"] if row["startup_seconds"] > 0 else 0.0
    ordered = measured.sort_values("step")
    gaps = ordered["written_at"].diff().dt.total_seconds().clip(lower=0.0)
    gaps = gaps.where(ordered["attempt"].diff() == 0, 0.0)
    elapsed = dict(zip(ordered["step"], startup + gaps.cumsum(), strict=True))
    return tuple(float(elapsed[evaluation.step]) for evaluation in evaluations)


def recorded_concurrency(folder: Location) -> int:
    """The most trials that ran concurrently."""
    rows = results.read_table(folder, "trials").dropna(subset=["started_at", "finished_at"])
    starts = [(moment, 1) for moment in rows["started_at"]]
    ends = [(moment, -1) for moment in rows["finished_at"]]
    changes = (change for _, change in sorted(starts + ends))
    return max([1, *itertools.accumulate(changes)])
