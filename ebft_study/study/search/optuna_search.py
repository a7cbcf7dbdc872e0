"""Search by Optuna: asks it for a configuration when a slot is free, and tells it the results of all seeds.

With one objective, a configuration with a trial that stopped early is reported as pruned, with its value at the stop.
With several, Optuna supports no values of pruned trials: it is reported without any, so that it is never on the Pareto
front (its values are those of a shorter training) and has no offspring; step and values are recorded as an attribute.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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


class OptunaSearch:
    """Baselines first, then the configurations that Optuna chooses.

    Trials of Optuna's trial k are numbered from `(baselines + k) * seeds`, so that journal and results name each other
    without further records. A configuration that breaks a rule between settings counts as failed.
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
        self._spec, self._on_refused, self._on_change = spec, on_refused, on_change
        self._trial_results = dict(trial_results)
        self._study = journal.open_study(spec, path)
        baselines = trials.trials_of(spec, trials.baselines(spec))
        self._waiting = deque(trial for trial in baselines if trial.trial_id not in trial_results)
        self._excluded: set[int] = set()
        for frozen in self._study.get_trials(deepcopy=False):
            self._restore(frozen)
        on_change()

    def _restore(self, frozen: FrozenTrial) -> None:
        """Continue with a configuration that an earlier session got from Optuna."""
        from optuna.trial import TrialState

        assignment = journal.assignment_of(self._spec, frozen.params)
        if journal.is_left_out(self._spec, frozen):
            self._exclude(frozen.number)
        elif assignment is None:  # the driver was killed while asking
            if frozen.state == TrialState.WAITING:
                self._study.ask()  # Optuna accepts the result of an enqueued configuration only after `ask`
            self._tell(frozen.number, [_FAILED])
        elif not frozen.state.is_finished():
            self._open(frozen.number, assignment)

    def next(self) -> Trial | None:
        while not self._waiting and not self._all_asked():
            self._open(*self._ask())
            self._on_change()
        return self._waiting.popleft() if self._waiting else None

    def ended(self, trial_id: str, trial_result: TrialResult) -> None:
        self._trial_results[trial_id] = trial_result
        number = journal.configuration_number(self._spec, trial_id)
        if number >= 0:
            self._tell_if_complete(number)

    @property
    def exhausted(self) -> bool:
        return not self._waiting and self._all_asked()

    def _all_asked(self) -> bool:
        asked = len(self._study.get_trials(deepcopy=False)) - len(self._excluded)
        return asked >= (self._spec.search.num_configurations or 0)

    def _ask(self) -> tuple[int, Assignment]:
        """A suggestion of Optuna's; after several excluded ones in a row, a draw at random.

        Some samplers repeat a suggestion for ever while it brings no result.
        """
        for _ in range(_MOST_EXCLUDED):
            asked = self._study.ask()
            assignment = journal.suggest(self._spec, asked)
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
            for seed, trial_id in zip(self._spec.seeds, journal.trial_ids(self._spec, number), strict=True):
                if trial_id not in self._trial_results:
                    self._waiting.append(trials.trial(self._spec, configuration, seed, int(trial_id[1:])))
        except ConfigError as error:
            self._on_refused(configuration.label, str(error))
            self._tell(number, [_FAILED])
        else:
            self._tell_if_complete(number)

    def _tell_if_complete(self, number: int) -> None:
        trial_ids = journal.trial_ids(self._spec, number)
        ended = [self._trial_results[trial_id] for trial_id in trial_ids if trial_id in self._trial_results]
        if len(ended) == len(trial_ids):
            self._tell(number, ended)

    def _tell(self, number: int, trial_results: Sequence[TrialResult]) -> None:
        """End Optuna's trial by the results of all its seeds."""
        from optuna.trial import Trial as OptunaTrial
        from optuna.trial import TrialState

        frozen = self._study.get_trials(deepcopy=False)[number]
        if frozen.state.is_finished():
            return
        values = _means(trial_results)
        if not values:
            self._study.tell(number, state=TrialState.FAIL)
        elif all(trial_result.kind == "finished" for trial_result in trial_results):
            self._study.tell(number, values)
        else:
            trial, step = OptunaTrial(self._study, frozen._trial_id), min(result.step for result in trial_results)
            if len(values) == 1:
                trial.report(values[0], step)  # Optuna takes a pruned trial's value from its last report
            else:
                trial.set_user_attr(STOPPED_EARLY, {"step": step, "values": values})
            self._study.tell(number, state=TrialState.PRUNED)
        self._on_change()


def _means(trial_results: Sequence[TrialResult]) -> list[float]:
    """Each objective's mean over seeds; empty if a trial failed or has a value that is not finite."""
    if any(result.kind == "failed" for result in trial_results):
        return []
    objectives = list(zip(*((result.value, *result.further) for result in trial_results), strict=True))
    if not all(math.isfinite(value) for values in objectives for value in values):
        return []
    return [math.fsum(values) / len(values) for values in objectives]
