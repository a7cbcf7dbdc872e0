"""Early stopping by comparison with other configurations, driven by Tune or by a replay.

A configuration is all its seeds: two are compared by their means over the seeds that both have at the same step, and
one that is stopped is stopped with all its seeds. The schedulers differ in when they compare, what of a curve, and how
many may be better. Their memory is the curves of all trials, in any order of trials, and the configurations that were
stopped: a resumed study gives both from the results tables. `docs/schedulers.md` says what each scheduler does, and why
`hyperband` is the asynchronous one.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from ebft_study import plugins
from ebft_study.analysis.extrapolation import extrapolate
from ebft_study.study.folder.trial_states import CONFIGURATION_STOPPED
from ebft_study.study.spec.study_spec import StudySpec
from ebft_study.study.spec.trial_task import TrialTask
from ebft_study.study.spec.trials import Replicate, draw
from ebft_study.study.stopping.rules import steps_saved

Points = Sequence[tuple[float, float]]
"""A trial's (step, objective) in order of steps."""


class Curve:
    """A trial's objective at its evaluations after the start. Less is better."""

    def __init__(self, start: float, end: float) -> None:
        """`start`, `end`: steps after which the trial leaves what all have in common, and is over."""
        self.steps: list[float] = []
        self._start, self._end = start, end
        self._finals: dict[int, tuple[float, float]] = {}
        self._values: list[float] = []
        self._best: list[float] = []
        self._sums = [0.0]

    def add(self, step: float, value: float) -> None:
        """Append a point; steps only rise."""
        self.steps.append(step)
        self._values.append(value)
        self._best.append(min([value, *self._best[-1:]]))
        self._sums.append(self._sums[-1] + value)

    def reaches(self, step: float) -> bool:
        return bool(self.steps) and self.steps[-1] >= step

    def value(self, step: float) -> float:
        """The last value at or before `step`; NaN without one."""
        return self._values[before - 1] if (before := self._before(step)) else math.nan

    def best(self, step: float) -> float:
        """The best value up to `step`; NaN without one."""
        return self._best[before - 1] if (before := self._before(step)) else math.nan

    def mean(self, first: float, step: float) -> float:
        """The mean over evaluations from `first` to `step`; NaN without one."""
        start, before = bisect.bisect_left(self.steps, first), self._before(step)
        return (self._sums[before] - self._sums[start]) / (before - start) if before > start else math.nan

    def final(self, step: float) -> tuple[float, float]:
        """The value at the end that points up to `step` predict, and its standard deviation; NaN with too few."""
        if (before := self._before(step)) not in self._finals:
            steps = [at - self._start for at in self.steps[:before]]
            self._finals[before] = extrapolate(steps, self._values[:before], self._end - self._start)
        return self._finals[before]

    def _before(self, step: float) -> int:
        return bisect.bisect_right(self.steps, step)


class Rule(Protocol):
    """When a configuration is compared, by what, and when it is behind.

    A scheduler of the user (`kind: package.module:name`) makes one of its `options`.
    """

    def group(self, configuration: str) -> int:
        """Configurations of a group are compared with each other."""
        ...

    def is_due(self, group: int, before: float, step: float) -> bool:
        """Whether a trial is compared that reports `step` after `before`."""
        ...

    def judged(self, curve: Curve, step: float) -> float:
        """The value of the configuration in question; less is better."""
        ...

    def standard(self, curve: Curve, step: float) -> float:
        """The value of those that it is compared with."""
        ...

    def is_behind(self, better: int, others: int, trials: int) -> bool:
        """Whether it stops when `better` of `others` are better, which have `trials` trials at seeds that it has."""
        ...

    def verdict(self, others: int) -> str:
        """What is said of one that stops: `is not among ...`."""
        ...


class Halving:
    """ASHA. At each rung a configuration continues if it is among the best 1/reduction_factor that reached the step.

    Bracket b has its rungs at grace_period_steps * reduction_factor^k for k >= b.
    """

    def __init__(self, spec: StudySpec, longest: int) -> None:
        """`longest`: steps of the longest trial. Brackets whose first rung is not below it stop no trial."""
        scheduler = spec.scheduler
        self._factor = scheduler.reduction_factor
        self._rungs = rungs(scheduler.grace_period_steps, self._factor, longest)
        # Hyperband has a bracket that begins at each rung, and one that runs its trials to the end.
        brackets = len(self._rungs) + 1 if scheduler.kind == "hyperband" else scheduler.brackets
        self._shares, self._study = bracket_shares(len(self._rungs), brackets, self._factor), spec.drawn_by

    def group(self, configuration: str) -> int:
        return bracket_of(configuration, self._shares, self._study)

    def is_due(self, group: int, before: float, step: float) -> bool:
        return any(before < rung <= step for rung in self._rungs[group:])

    def judged(self, curve: Curve, step: float) -> float:
        return curve.value(step)

    def standard(self, curve: Curve, step: float) -> float:
        return curve.value(step)

    def is_behind(self, better: int, others: int, trials: int) -> bool:
        return better >= max(1.0, (others + 1) / self._factor)

    def verdict(self, others: int) -> str:
        return f"is not among the best 1/{self._factor} of {others + 1} configurations"


class Median:
    """The median rule. A configuration stops if its best value is worse than the means so far of most others.

    Means are over evaluations from the grace period on.
    """

    def __init__(self, spec: StudySpec) -> None:
        self._grace_period = spec.scheduler.grace_period_steps
        self._required = spec.scheduler.min_samples_required

    def group(self, configuration: str) -> int:
        return 0

    def is_due(self, group: int, before: float, step: float) -> bool:
        return step >= self._grace_period

    def judged(self, curve: Curve, step: float) -> float:
        return curve.best(step)

    def standard(self, curve: Curve, step: float) -> float:
        return curve.mean(self._grace_period, step)

    def is_behind(self, better: int, others: int, trials: int) -> bool:
        return trials >= self._required and 2 * better > others

    def verdict(self, others: int) -> str:
        return f"is at best worse than the median of the means of {others} other configurations"


class Extrapolation:
    """A configuration stops if it is worse at the end than another, at the better end of its curve's interval.

    The other one counts with the worse end. Both are predicted from their points up to the same step: the end of a
    schedule, which no curve has shown by then, is missing from both.
    """

    def __init__(self, spec: StudySpec) -> None:
        self._grace_period, self._confidence = spec.scheduler.grace_period_steps, spec.scheduler.confidence
        self._deviations = statistics.NormalDist().inv_cdf((1 + self._confidence) / 2)

    def group(self, configuration: str) -> int:
        return 0

    def is_due(self, group: int, before: float, step: float) -> bool:
        return step >= self._grace_period

    def judged(self, curve: Curve, step: float) -> float:
        prediction, deviation = curve.final(step)
        return prediction - self._deviations * deviation

    def standard(self, curve: Curve, step: float) -> float:
        prediction, deviation = curve.final(step)
        return prediction + self._deviations * deviation

    def is_behind(self, better: int, others: int, trials: int) -> bool:
        return better > 0

    def verdict(self, others: int) -> str:
        return f"is the best that its curve may end with, and worse than another's worst ({self._confidence:.0%} each)"


class StudyScheduler(FIFOScheduler):  # type: ignore[misc]
    """A comparison of configurations as Tune calls it, report by report.

    Never stops baselines, which every configuration is compared with, or a trial that has done its last step, whose
    held-out evaluation is still to come. Evidence are finite objectives after the start: step 0 and a warm start say
    nothing of a configuration. Reports that bring nothing new are ignored: a repeated evaluation, or steps that a
    restarted trial does again.
    """

    def __init__(
        self,
        spec: StudySpec,
        *,
        longest: int,
        history: Mapping[Replicate, Points],
        stopped: MutableMapping[str, str] | None = None,
        give_up: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            longest: steps of the longest trial.
            history: curves of trials that earlier sessions ran.
            stopped: configurations of which no trial runs any more, and why; shared with who else decides that.
            give_up: called with the problem when a scheduler of the user has failed; default: it is raised.
        """
        super().__init__()
        self._kind, self._give_up, self._grace_period = (
            spec.scheduler.kind,
            give_up,
            spec.scheduler.grace_period_steps,
        )
        self._metric, self._sign = spec.objective.metric, 1.0 if spec.objective.mode == "min" else -1.0
        self._rule = _rule_of(spec, longest)
        self._groups: dict[int, dict[str, dict[int, Curve]]] = {}
        self._stopped = {} if stopped is None else stopped
        self.reasons: dict[str, str] = {}
        """Trial -> reason why it was stopped."""
        for trial, points in history.items():
            for step, value in points:
                self._add(trial, step, value)

    def should_stop(self, trial: Replicate, step: float, value: float) -> bool:
        """Whether a trial on the axes should stop, having reached `value` after `step`: its configuration stops."""
        before = self._last_step(trial)
        is_new = self._add(trial, step, value)
        if step >= trial.total_steps:
            return False
        if is_new and trial.configuration not in self._stopped and self._grace_period <= step:
            self._compare_or_give_up(trial, before, step)
        reason = self._stopped.get(trial.configuration, "")
        if reason:
            self.reasons[trial.trial_id] = f"{reason}; {steps_saved(step, trial.total_steps)}"
        return bool(reason)

    def reason_not_to_start(self, configuration: str) -> str:
        """Why a trial is not started, or not resumed: its configuration was stopped; '' if it is started."""
        reason = self._stopped.get(configuration, "")
        return reason and f"{reason}; no further steps"

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        task, step = TrialTask.from_config(trial.config), result.get("step", math.nan)
        repeated = result.get("evaluated_step", step) != step
        if task.is_baseline or repeated or "outcome/status" in result:
            return str(TrialScheduler.CONTINUE)
        stops = self.should_stop(task.replicate, step, result.get(self._metric, math.nan))
        return str(TrialScheduler.STOP if stops else TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> None:
        """Tune does not show a scheduler the report at which a stopper ended a trial; others are compared with it."""
        self.on_trial_result(tune_controller, trial, result)

    def _add(self, trial: Replicate, step: float, value: float) -> bool:
        """Add a point; whether it is new evidence."""
        is_new = math.isfinite(value) and step > self._last_step(trial)
        if is_new:
            self._curve(trial).add(step, self._sign * value)
        return is_new

    def _curve(self, trial: Replicate) -> Curve:
        group = self._groups.setdefault(self._rule.group(trial.configuration), {})
        return group.setdefault(trial.configuration, {}).setdefault(
            trial.seed, Curve(trial.warm_start_steps, trial.total_steps)
        )

    def _last_step(self, trial: Replicate) -> float:
        """The step of the last evidence, or of the start."""
        return max([0.0, trial.warm_start_steps, *self._curve(trial).steps[-1:]])

    def _compare_or_give_up(self, trial: Replicate, before: float, step: float) -> None:
        try:
            self._compare(trial, before, step)
        except Exception as error:
            if not plugins.is_path(self._kind):
                raise
            problem = plugins.raised("scheduler.kind", self._kind, error)
            if self._give_up is None:
                raise problem from error
            self._give_up(str(problem))

    def _compare(self, trial: Replicate, before: float, step: float) -> None:
        """Stop the configuration of a trial that reports `step` if too many others are better over shared seeds."""
        number = self._rule.group(trial.configuration)
        if not self._rule.is_due(number, before, step):
            return
        group = self._groups[number]
        values = _values(group[trial.configuration], step, self._rule.judged)
        is_better: dict[str, bool] = {}
        n_trials = 0
        for other, curves in group.items():
            shared = {} if other == trial.configuration else _values(curves, step, self._rule.standard, only=values)
            if shared:
                is_better[other] = math.fsum(values[seed] - shared[seed] for seed in shared) > 0
                n_trials += len(shared)
        # Those that stopped count, but at least one must be left: further seeds may have changed who is ahead.
        is_led = any(better and other not in self._stopped for other, better in is_better.items())
        if is_led and self._rule.is_behind(sum(is_better.values()), len(is_better), n_trials):
            mean = self._sign * math.fsum(values.values()) / len(values)
            over = f" (mean of {len(values)} seeds)" if len(values) > 1 else ""
            self._stopped[trial.configuration] = (
                f"{CONFIGURATION_STOPPED}: {self._metric} {mean:.4g}{over} at step {step:g} "
                f"{self._rule.verdict(len(is_better))}"
            )


def _rule_of(spec: StudySpec, longest: int) -> Rule:
    if plugins.is_path(spec.scheduler.kind):
        rule: Rule = plugins.call(spec.scheduler.kind, key="scheduler.kind", options=spec.scheduler.options)
        return rule
    if spec.scheduler.kind == "extrapolation":
        return Extrapolation(spec)
    return Median(spec) if spec.scheduler.kind == "median" else Halving(spec, longest)


def _values(
    curves: Mapping[int, Curve],
    step: float,
    of: Callable[[Curve, float], float],
    only: Mapping[int, float] | None = None,
) -> dict[int, float]:
    """Seed -> value at `step` of those that got there, among the seeds `only`."""
    reached = ((seed, curve) for seed, curve in curves.items() if (only is None or seed in only))
    values = {seed: of(curve, step) for seed, curve in reached if curve.reaches(step)}
    return {seed: value for seed, value in values.items() if math.isfinite(value)}


def rungs(grace_period: int, reduction_factor: int, longest: int) -> list[int]:
    """Steps below the last one at which configurations are compared."""
    steps = [grace_period]
    while steps[-1] < longest:
        steps.append(steps[-1] * reduction_factor)
    return steps[:-1]


def bracket_shares(n_rungs: int, brackets: int, reduction_factor: int) -> list[float]:
    """The part of all configurations that each bracket takes: Hyperband's numbers, by which all cost about the same.

    A bracket with s rungs gets ceil((s_max + 1) / (s + 1) * reduction_factor^s) trials (Li et al. 2018, algorithm 1).
    """
    left = [max(n_rungs - bracket, 0) for bracket in range(brackets)]
    numbers = [math.ceil((n_rungs + 1) / (s + 1) * reduction_factor**s) for s in left]
    return [number / sum(numbers) for number in numbers]


def bracket_of(configuration: str, shares: Sequence[float], study: str) -> int:
    """The bracket of a configuration, for all its seeds and in every session: drawn by its name and the study's."""
    if len(shares) == 1:
        return 0
    position = int(draw("bracket", study, configuration)[:12], 16) / 16**12
    for bracket, share in enumerate(shares):
        position -= share
        if position < 0:
            return bracket
    return len(shares) - 1
