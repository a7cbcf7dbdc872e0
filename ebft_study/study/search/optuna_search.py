"""Search by Optuna: asks it for a configuration when a slot is free, and tells it the results of all seeds.

A configuration is told once. One with a trial that was stopped early is compared at the last step that all its seeds
have in common, by the means over them there. How it is told depends on the sampler:

- `tpe` ranks pruned configurations itself, below all that finished: by step, then by value.
- `gp` and `nsga2` know complete configurations only, and would learn nothing of what was stopped. They are told an
  estimate of its final values: those of the configurations that finished, plus its gap to them at that step and over
  the same seeds. NSGA-II selects by rank, so the estimate is never better than the worst of them. GP fits a surface, to
  which so hard a bound is a false plateau: there the bound is the best of them. A stopped configuration is told after
  all that were chosen before it.

With several objectives Optuna supports no values of pruned trials, so `tpe` gets none.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ebft_study import plugins
from ebft_study.errors import ConfigError
from ebft_study.study.folder.trial_states import TrialResult
from ebft_study.study.search import journal
from ebft_study.study.spec import enumeration, trials
from ebft_study.study.spec.enumeration import Assignment
from ebft_study.study.spec.study_spec import StudySpec
from ebft_study.study.spec.trials import Trial

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_MOST_EXCLUDED = 10  # suggestions in a row
_FAILED = TrialResult("failed")
STOPPED_EARLY = "stopped_early"
"""Attribute of an Optuna trial: the step, and the objectives at that step."""
_COMPLETE_ONLY = ("gp", "nsga2")
"""Samplers that ignore pruned trials, as those of users may."""


class OptunaSearch:
    """Baselines first, then the known points of the study file, then the configurations that Optuna chooses.

    Trials of Optuna's trial k are numbered from `(baselines + k - told) * seeds`, so that journal and results name each
    other without further records; the first `told` ones are results of earlier studies. A configuration that breaks a
    rule between settings counts as failed.
    """

    def __init__(
        self,
        spec: StudySpec,
        path: Path,
        trial_results: Mapping[str, TrialResult],
        on_refused: Callable[[str, str], None] = lambda label, problem: None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            path: the journal, a local file.
            trial_results: of the trials that earlier sessions of the study ended.
            on_refused: called with a configuration's label and the rule that it breaks.
            on_change: called after every change of the journal.
        """
        self._spec, self._path, self._on_refused, self._on_change = spec, path, on_refused, on_change
        self._is_complete_only = spec.search.sampler in _COMPLETE_ONLY or plugins.is_path(spec.search.sampler)
        self._trial_results = dict(trial_results)
        baselines = trials.trials_of(spec, trials.baselines(spec))
        self._waiting = deque(trial for trial in baselines if trial.trial_id not in trial_results)
        self._known = enumeration.known(spec)
        self._excluded: set[int] = set()
        with journal.errors(path):
            self._study = journal.open_study(spec, path)
            for frozen in self._own_trials():
                self._restore(frozen)
            self._tell_ended()
            on_change()

    def _restore(self, frozen: FrozenTrial) -> None:
        """Continue with a configuration that an earlier session got from Optuna, or began to ask for."""
        from optuna.trial import Trial as OptunaTrial
        from optuna.trial import TrialState

        assignment = journal.assignment_of(self._spec, frozen.params)
        if journal.is_left_out(self._spec, frozen):
            self._exclude(frozen.number)
        elif frozen.state.is_finished():
            return
        elif assignment is None:  # the driver ended while asking
            is_enqueued = frozen.state == TrialState.WAITING
            asked = self._study.ask() if is_enqueued else OptunaTrial(self._study, frozen._trial_id)
            assignment = journal.suggest(self._spec, asked)
            if enumeration.is_excluded(self._spec, assignment):
                self._exclude(frozen.number)
            else:
                self._open(frozen.number, assignment)
        else:
            self._open(frozen.number, assignment)

    def next(self) -> Trial | None:
        with journal.errors(self._path):
            while not self._waiting and not self._all_asked():
                self._open(*self._ask())
                self._on_change()
        return self._waiting.popleft() if self._waiting else None

    def ended(self, trial_id: str, trial_result: TrialResult) -> None:
        self._trial_results[trial_id] = trial_result
        number = journal.configuration_number(self._spec, trial_id)
        if number >= 0:
            with journal.errors(self._path):
                self._tell_ended()

    @property
    def exhausted(self) -> bool:
        return not self._waiting and self._all_asked()

    def _own_trials(self) -> list[FrozenTrial]:
        """Optuna's trials, without the results of earlier studies."""
        with journal.errors(self._path):
            every: list[FrozenTrial] = self._study.get_trials(deepcopy=False)
        return every[len(self._spec.told) :]

    def _all_asked(self) -> bool:
        asked = len(self._own_trials()) - len(self._excluded)
        return asked >= (self._spec.search.num_configurations or 0)

    def _ask(self) -> tuple[int, Assignment]:
        """A known point, then suggestions of Optuna's; after several excluded ones in a row, a draw at random.

        Some samplers repeat a suggestion for ever while it brings no result.
        """
        known = self._known[len(self._own_trials()) :]
        if known:
            return journal.ask_for(self._spec, self._study, known[0]).number, known[0]
        for _ in range(_MOST_EXCLUDED):
            asked, assignment = journal.ask(self._spec, self._study)
            if not enumeration.is_excluded(self._spec, assignment):
                return asked.number, assignment
            self._exclude(asked.number)
        number = len(self._study.get_trials(deepcopy=False))
        drawn = enumeration.another(self._spec, random.Random(f"{self._spec.search.search_seed}-{number}"))
        if drawn is None:
            raise ConfigError(f"{self._spec.study}: exclude: leaves nothing that a search can find. Exclude less")
        return journal.ask_for(self._spec, self._study, drawn).number, drawn

    def _exclude(self, number: int) -> None:
        """Pass over a configuration. Optuna avoids those that were pruned without a value."""
        from optuna.trial import TrialState

        self._excluded.add(number)
        if not self._study.get_trials(deepcopy=False)[number].state.is_finished():
            self._study.tell(number, state=TrialState.PRUNED)

    def _open(self, number: int, assignment: Assignment) -> None:
        """Queue the trials of a configuration, except those that have ended already."""
        configuration = trials.on_axes(self._spec, assignment)
        try:
            for seed, trial_id in zip(self._spec.seeds.all, journal.trial_ids(self._spec, number), strict=True):
                if trial_id not in self._trial_results:
                    self._waiting.append(trials.trial(self._spec, configuration, seed, int(trial_id[1:])))
        except ConfigError as error:
            self._on_refused(configuration.label, str(error))
            self._tell(number, [_FAILED])

    def _tell_ended(self) -> None:
        """Tell Optuna of every configuration whose trials have all ended."""
        is_first = True
        for frozen in self._own_trials():
            if frozen.state.is_finished():
                continue
            ended = self._ended(frozen.number)
            if ended and (is_first or not self._is_complete_only or _finished(ended)):
                self._tell(frozen.number, ended)
            else:
                is_first = False

    def _ended(self, number: int) -> list[TrialResult]:
        """The results of a configuration; none while a trial of it has not ended."""
        trial_ids = journal.trial_ids(self._spec, number)
        ended = [self._trial_results[trial_id] for trial_id in trial_ids if trial_id in self._trial_results]
        return ended if len(ended) == len(trial_ids) else []

    def _tell(self, number: int, trial_results: Sequence[TrialResult]) -> None:
        """End Optuna's trial by the results of all its seeds."""
        from optuna.trial import Trial as OptunaTrial
        from optuna.trial import TrialState

        frozen = self._study.get_trials(deepcopy=False)[number]
        if frozen.state.is_finished():
            return
        if any(result.kind == "failed" for result in trial_results):
            values, stopped = None, None
        elif _finished(trial_results):
            values, stopped = _finals(trial_results), None
        else:
            values, stopped = None, _at_shared_step(trial_results)
        if stopped is None:
            self._study.tell(number, values, state=None if values else TrialState.FAIL)
        else:
            estimate = self._estimate(stopped) if self._is_complete_only else None
            trial, step, means = OptunaTrial(self._study, frozen._trial_id), stopped.step, stopped.means
            if len(means) == 1 and not estimate:
                trial.report(means[0], step)  # Optuna takes a pruned trial's value from its last report
            else:
                trial.set_user_attr(STOPPED_EARLY, {"step": step, "values": means})
            self._study.tell(number, estimate, state=None if estimate else TrialState.PRUNED)
        self._on_change()

    def _estimate(self, stopped: _Stopped) -> list[float] | None:
        """Final values of a stopped configuration: bounded by those that finished; None if none has."""
        numbers = (frozen.number for frozen in self._own_trials())
        finished = [ended for number in numbers if (ended := self._ended(number)) and _finished(ended)]
        references = [
            (finals, at) for ended in finished if (finals := _finals(ended)) and (at := stopped.beside(ended))
        ]
        if not references:
            return None
        is_surface = self._spec.search.sampler == "gp" and not self._spec.objective.further
        bound, estimate = min if is_surface else max, []
        for index, objective in enumerate(self._spec.objective.all):
            sign = 1.0 if objective.mode == "min" else -1.0
            finals = [sign * reference[index] for reference, _ in references]
            gaps = [sign * (stopped.means[index] - at[index]) for _, at in references]
            expected = math.fsum(finals + gaps) / len(references)
            estimate.append(sign * max(expected, math.nextafter(bound(finals), math.inf)))
        return estimate


@dataclass(frozen=True)
class _Stopped:
    """A configuration that was stopped: the last step that its seeds have in common, and its means there."""

    step: int
    seeds: tuple[int, ...]
    """Positions of the seeds that have got to that step."""
    means: list[float]

    def beside(self, ended: Sequence[TrialResult]) -> list[float] | None:
        """The means of another configuration there; None if it was not evaluated."""
        return _means([_at(ended[seed].curve, self.step) for seed in self.seeds])


def _at_shared_step(trial_results: Sequence[TrialResult]) -> _Stopped | None:
    """None if no trial was evaluated after step 0, the base model, or if a value is not finite."""
    seeds = tuple(seed for seed, result in enumerate(trial_results) if any(step > 0 for step in result.curve))
    step = min((max(trial_results[seed].curve) for seed in seeds), default=0)
    means = _means([_at(trial_results[seed].curve, step) for seed in seeds])
    return _Stopped(step, seeds, means) if means else None


def _at(curve: Mapping[int, tuple[float, ...]], step: int) -> tuple[float, ...]:
    """The objectives of the last evaluation at or before a step, the base model's excepted."""
    before = [each for each in curve if 0 < each <= step]
    return curve[max(before)] if before else (math.nan,)


def _finished(trial_results: Sequence[TrialResult]) -> bool:
    return all(result.kind == "finished" for result in trial_results)


def _finals(trial_results: Sequence[TrialResult]) -> list[float] | None:
    """Each objective's mean over seeds at the end."""
    return _means([(result.value, *result.further) for result in trial_results])


def _means(values: Sequence[tuple[float, ...]]) -> list[float] | None:
    """Each objective's mean; None without values, or if one is not finite."""
    if not values or not all(math.isfinite(value) for each in values for value in each):
        return None
    return [math.fsum(each) / len(each) for each in zip(*values, strict=True)]
