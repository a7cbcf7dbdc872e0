"""Early stopping by comparison with other trials: Ray's schedulers behind one adapter, which Tune and what-if drive.

Their memory is the results tables rather than a snapshot of Ray's: what a scheduler knows is the set of points
(trial, step, objective) that it was shown, in any order of trials, and a resumed study shows it the recorded ones.
`docs/schedulers.md` says what each does, and why `hyperband` is the asynchronous one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from ebft_study.study.spec.study_spec import ObjectiveSpec, StudySpec
from ebft_study.study.stopping.rules import steps_saved

Curve = Sequence[tuple[float, float]]
"""A trial's (step, objective) in order of steps."""

_GOLDEN = (math.sqrt(5) - 1) / 2


class Comparison(Protocol):
    """Compares a trial with those seen before. Each trial's points arrive in order of steps, each point once."""

    def judge(self, trial_id: str, step: float, value: float) -> str:
        """Take note of a point; why the trial should stop there, or '' to go on."""
        ...

    def remember(self, trial_id: str, step: float, value: float) -> None:
        """Take note of a point on which an earlier session has decided."""
        ...


@dataclass(frozen=True)
class _Named:
    """A trial as Ray's schedulers see it: by our identifier, which a resumed study keeps, not by Tune's."""

    trial_id: str


class Halving:
    """ASHA. At each rung a trial goes on if it is among the best 1/reduction_factor of those that were there before.

    Bracket b has its rungs at grace_period_steps * reduction_factor^k for k >= b, and compares its own trials only.
    """

    def __init__(
        self, objective: ObjectiveSpec, *, grace_period: int, reduction_factor: int, brackets: int, longest: int
    ) -> None:
        """`longest`: steps of the longest trial. Brackets whose first rung is not below it stop nobody."""
        self._metric, self._factor = objective.metric, reduction_factor
        first_rungs = [grace_period * reduction_factor**bracket for bracket in range(brackets)]
        self._brackets = [
            ASHAScheduler(
                time_attr="step",
                metric=objective.metric,
                mode=objective.mode,
                max_t=longest,
                grace_period=first_rung,
                reduction_factor=reduction_factor,
                stop_last_trials=False,
            )
            if first_rung < longest
            else None
            for first_rung in first_rungs
        ]
        self._shares = bracket_shares(len(rungs(grace_period, reduction_factor, longest)), brackets, reduction_factor)
        self._known: set[str] = set()

    def judge(self, trial_id: str, step: float, value: float) -> str:
        bracket = bracket_of(trial_id, self._shares)
        ray = self._brackets[bracket]
        if ray is None:
            return ""
        if trial_id not in self._known:
            self._known.add(trial_id)
            ray.on_trial_add(None, _Named(trial_id))
        if ray.on_trial_result(None, _Named(trial_id), {"step": step, self._metric: value}) != TrialScheduler.STOP:
            return ""
        among = f"of bracket {bracket}" if len(self._brackets) > 1 else "before it"
        return f"{self._metric} {value:.4g} at step {step:g} is not among the best 1/{self._factor} of trials {among}"

    def remember(self, trial_id: str, step: float, value: float) -> None:
        self.judge(trial_id, step, value)


class Median:
    """The median rule. A trial stops if its best value is worse than the median of the other trials' means so far.

    Means are over points from the grace period up to the trial's step, of the trials that have got as far.
    """

    def __init__(self, objective: ObjectiveSpec, *, grace_period: int, min_samples: int) -> None:
        self._metric = objective.metric
        self._ray = MedianStoppingRule(
            time_attr="step",
            metric=objective.metric,
            mode=objective.mode,
            grace_period=grace_period,
            min_samples_required=min_samples,
            # Pausing instead gives a place to trials that wait, and would start every trial several times.
            min_time_slice=math.inf,
            hard_stop=True,
        )

    def judge(self, trial_id: str, step: float, value: float) -> str:
        result = {"step": step, self._metric: value}
        if self._ray.on_trial_result(None, _Named(trial_id), result) != TrialScheduler.STOP:
            return ""
        return f"no {self._metric} up to step {step:g} is as good as the median of the other trials' means"

    def remember(self, trial_id: str, step: float, value: float) -> None:
        # Ray's hook for a trial's last result does nothing but take note of it.
        self._ray.on_trial_complete(None, _Named(trial_id), {"step": step, self._metric: value})


class StudyScheduler(FIFOScheduler):  # type: ignore[misc]
    """A comparison as Tune calls it, over our trial identifiers.

    Never stopped: baselines, which every configuration is compared with, and a trial that has done its last step,
    whose held-out evaluation is still to come. Reports without a finite objective are passed over, and so is what
    brings nothing new: a repeated evaluation, or steps that a restarted trial does again.
    """

    def __init__(self, spec: StudySpec, *, longest: int, history: Mapping[str, Curve]) -> None:
        """`longest`: steps of the longest trial. `history`: curves of trials that earlier sessions ran."""
        super().__init__()
        self._metric = spec.objective.metric
        self._comparison = comparison(spec, longest)
        self._seen: dict[str, float] = {}
        self.reasons: dict[str, str] = {}
        """Trials that were stopped, and why."""
        for trial_id, curve in history.items():
            for step, value in curve:
                if math.isfinite(value) and self._is_new(trial_id, step):
                    self._comparison.remember(trial_id, step, value)

    def look(self, trial_id: str, step: float, value: float, *, total_steps: int) -> bool:
        """Whether a trial on the axes should stop, having reached `value` after `step` of its `total_steps`."""
        if step >= total_steps or not math.isfinite(value) or not self._is_new(trial_id, step):
            return False
        reason = self._comparison.judge(trial_id, step, value)
        if reason:
            self.reasons[trial_id] = f"{reason}; {steps_saved(step, total_steps)}"
        return bool(reason)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return str(TrialScheduler.STOP if self._look(trial, result) else TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Tune does not show a scheduler the report at which a stopper ended a trial; others are compared with it."""
        self._look(trial, result)

    def _look(self, trial: Any, result: Mapping[str, Any]) -> bool:
        settings, step = trial.config, result.get("step", math.nan)
        repeated = result.get("evaluated_step", step) != step
        if settings["is_baseline"] or repeated or "outcome/status" in result:
            return False
        value = result.get(self._metric, math.nan)
        return self.look(settings["trial_id"], step, value, total_steps=settings["total_steps"])

    def _is_new(self, trial_id: str, step: float) -> bool:
        new = step > self._seen.get(trial_id, -1)
        if new:
            self._seen[trial_id] = step
        return new


def comparison(spec: StudySpec, longest: int) -> Comparison:
    """What `spec.scheduler.kind` names."""
    scheduler = spec.scheduler
    grace, factor = scheduler.grace_period_steps, scheduler.reduction_factor
    if scheduler.kind == "median":
        return Median(spec.objective, grace_period=grace, min_samples=scheduler.min_samples_required)
    # Hyperband: a bracket for every rung to begin at, and one that runs its trials to the end.
    every = len(rungs(grace, factor, longest)) + 1
    brackets = every if scheduler.kind == "hyperband" else scheduler.brackets
    return Halving(spec.objective, grace_period=grace, reduction_factor=factor, brackets=brackets, longest=longest)


def rungs(grace_period: int, reduction_factor: int, longest: int) -> list[int]:
    """Steps below the last one at which trials are compared."""
    found = []
    step = grace_period
    while step < longest:
        found.append(step)
        step *= reduction_factor
    return found


def bracket_shares(n_rungs: int, brackets: int, reduction_factor: int) -> list[float]:
    """The part of all trials that each bracket takes: Hyperband's numbers, by which all brackets cost about the same.

    A bracket with s rungs gets ceil((s_max + 1) / (s + 1) * reduction_factor^s) trials (Li et al. 2018, algorithm 1).
    """
    left = [max(n_rungs - bracket, 0) for bracket in range(brackets)]
    numbers = [math.ceil((n_rungs + 1) / (s + 1) * reduction_factor**s) for s in left]
    return [number / sum(numbers) for number in numbers]


def bracket_of(trial_id: str, shares: Sequence[float]) -> int:
    """The bracket of a trial, from its number alone: any run of consecutive trials is spread by the shares."""
    if len(shares) == 1:
        return 0
    position = int(trial_id[1:]) * _GOLDEN % 1.0
    for bracket, share in enumerate(shares):
        position -= share
        if position < 0:
            return bracket
    return len(shares) - 1
