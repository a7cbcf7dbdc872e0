"""Early stopping by comparison with other trials: Ray's schedulers behind one adapter, driven by Tune or by a replay.

Their memory is the results tables rather than a snapshot of Ray's: the state of a scheduler is the set of points
(trial, step, objective) that it was shown, in any order of trials, and a resumed study shows it the recorded ones.
`docs/schedulers.md` says what each does, and why `hyperband` is the asynchronous one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from ebft_study.study.spec.study_spec import StudySpec
from ebft_study.study.spec.trial_task import TrialTask
from ebft_study.study.stopping.rules import steps_saved

Curve = Sequence[tuple[float, float]]
"""A trial's (step, objective) in order of steps."""

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class _RayTrial:
    """A trial as Ray's schedulers see it: by our identifier, which stays the same in a resumed study."""

    trial_id: str


class Halving:
    """ASHA. At each rung a trial continues if it is among the best 1/reduction_factor of those that reached it before.

    Bracket b has its rungs at grace_period_steps * reduction_factor^k for k >= b, and compares its own trials only.
    """

    def __init__(self, spec: StudySpec, longest: int) -> None:
        """`longest`: steps of the longest trial. Brackets whose first rung is not below it stop no trial."""
        scheduler, objective = spec.scheduler, spec.objective
        self._metric, self._factor = objective.metric, scheduler.reduction_factor
        grace_period = scheduler.grace_period_steps
        n_rungs = len(rungs(grace_period, self._factor, longest))
        # Hyperband has a bracket that begins at each rung, and one that runs its trials to the end.
        brackets = n_rungs + 1 if scheduler.kind == "hyperband" else scheduler.brackets
        first_rungs = [grace_period * self._factor**bracket for bracket in range(brackets)]
        self._brackets = [
            ASHAScheduler(
                time_attr="step",
                metric=objective.metric,
                mode=objective.mode,
                max_t=longest,
                grace_period=first_rung,
                reduction_factor=self._factor,
                stop_last_trials=False,
            )
            if first_rung < longest
            else None
            for first_rung in first_rungs
        ]
        self._shares = bracket_shares(n_rungs, brackets, self._factor)
        self._added: set[str] = set()

    def reason_to_stop(self, trial_id: str, step: float, value: float) -> str:
        """Record a point; why the trial should stop there, or '' if it continues. Points of a trial come in order."""
        bracket = bracket_of(trial_id, self._shares)
        asha = self._brackets[bracket]
        if asha is None:
            return ""
        if trial_id not in self._added:
            self._added.add(trial_id)
            asha.on_trial_add(None, _RayTrial(trial_id))
        if asha.on_trial_result(None, _RayTrial(trial_id), {"step": step, self._metric: value}) != TrialScheduler.STOP:
            return ""
        group = f"of bracket {bracket}" if len(self._brackets) > 1 else "before it"
        return f"{self._metric} {value:.4g} at step {step:g} is not among the best 1/{self._factor} of trials {group}"

    def record(self, trial_id: str, step: float, value: float) -> None:
        """Record a point on which an earlier session has decided."""
        self.reason_to_stop(trial_id, step, value)


class Median:
    """The median rule. A trial stops if its best value is worse than the median of the other trials' means so far.

    Means are over points from the grace period up to the trial's step, of the trials that have got as far.
    """

    def __init__(self, spec: StudySpec) -> None:
        self._metric = spec.objective.metric
        self._rule = MedianStoppingRule(
            time_attr="step",
            metric=self._metric,
            mode=spec.objective.mode,
            grace_period=spec.scheduler.grace_period_steps,
            min_samples_required=spec.scheduler.min_samples_required,
            # Pausing instead gives a slot to trials that wait, and would start every trial several times.
            min_time_slice=math.inf,
            hard_stop=True,
        )

    def reason_to_stop(self, trial_id: str, step: float, value: float) -> str:
        result = {"step": step, self._metric: value}
        if self._rule.on_trial_result(None, _RayTrial(trial_id), result) != TrialScheduler.STOP:
            return ""
        return f"no {self._metric} up to step {step:g} is as good as the median of the other trials' means"

    def record(self, trial_id: str, step: float, value: float) -> None:
        # Ray's hook for a trial's last result only records it.
        self._rule.on_trial_complete(None, _RayTrial(trial_id), {"step": step, self._metric: value})


class StudyScheduler(FIFOScheduler):  # type: ignore[misc]
    """A comparison as Tune calls it, over our trial identifiers.

    Never stops baselines, which every configuration is compared with, or a trial that has done its last step, whose
    held-out evaluation is still to come. Ignores reports without a finite objective, and those that bring nothing new:
    a repeated evaluation, or steps that a restarted trial does again.
    """

    def __init__(self, spec: StudySpec, *, longest: int, history: Mapping[str, Curve]) -> None:
        """`longest`: steps of the longest trial. `history`: curves of trials that earlier sessions ran."""
        super().__init__()
        self._metric = spec.objective.metric
        self._comparison = Median(spec) if spec.scheduler.kind == "median" else Halving(spec, longest)
        self._last_steps: dict[str, float] = {}
        self.reasons: dict[str, str] = {}
        """Trial -> reason why it was stopped."""
        for trial_id, curve in history.items():
            for step, value in curve:
                if self._is_new(trial_id, step, value):
                    self._comparison.record(trial_id, step, value)

    def should_stop(self, trial_id: str, step: float, value: float, *, total_steps: int) -> bool:
        """Whether a trial on the axes should stop, having reached `value` after `step` of its `total_steps`."""
        if step >= total_steps or not self._is_new(trial_id, step, value):
            return False
        reason = self._comparison.reason_to_stop(trial_id, step, value)
        if reason:
            self.reasons[trial_id] = f"{reason}; {steps_saved(step, total_steps)}"
        return bool(reason)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        task, step = TrialTask.from_config(trial.config), result.get("step", math.nan)
        repeated = result.get("evaluated_step", step) != step
        if task.is_baseline or repeated or "outcome/status" in result:
            return str(TrialScheduler.CONTINUE)
        value = result.get(self._metric, math.nan)
        stops = self.should_stop(task.trial_id, step, value, total_steps=task.total_steps)
        return str(TrialScheduler.STOP if stops else TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> None:
        """Tune does not show a scheduler the report at which a stopper ended a trial; others are compared with it."""
        self.on_trial_result(tune_controller, trial, result)

    def _is_new(self, trial_id: str, step: float, value: float) -> bool:
        is_new = math.isfinite(value) and step > self._last_steps.get(trial_id, -1)
        if is_new:
            self._last_steps[trial_id] = step
        return is_new


def rungs(grace_period: int, reduction_factor: int, longest: int) -> list[int]:
    """Steps below the last one at which trials are compared."""
    steps = [grace_period]
    while steps[-1] < longest:
        steps.append(steps[-1] * reduction_factor)
    return steps[:-1]


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
