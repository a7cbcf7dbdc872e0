"""Which trial runs next. Plain Python: Ray's side of it is `tuning.StudySearcher`.

Grid and random searches hand out trials that are known from the start. An Optuna search asks for a configuration when
a place is free, and tells what came of it once all its seeds have ended. Optuna's own record is a journal file in the
study's folder; together with the results tables it holds all that a resumed study needs.
"""

from __future__ import annotations

import json
import random
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebft_study.errors import ConfigError
from ebft_study.study.folder.trial_states import TrialResult
from ebft_study.study.search import objectives
from ebft_study.study.spec import enumeration, trials
from ebft_study.study.spec.axis import Axis
from ebft_study.study.spec.enumeration import Assignment
from ebft_study.study.spec.study_spec import SearchSpec, StudySpec
from ebft_study.study.spec.trials import Trial

if TYPE_CHECKING:
    import optuna
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

JOURNAL = "optuna.journal"
_MOST_EXCLUDED = 10  # suggestions in a row


class OptunaSearch:
    """Asks Optuna for configurations and tells it the mean objectives over seeds.

    Trials of configuration k are numbered from `baselines + k * seeds`, so that journal and results name each other
    without further records. A configuration that breaks a rule between settings counts as failed.
    """

    def __init__(
        self,
        spec: StudySpec,
        journal: Path,
        trial_results: Mapping[str, TrialResult],
        on_refused: Callable[[str, str], None] = lambda label, problem: None,
    ) -> None:
        """`endings`: of the trials that earlier sessions of the study brought to an end."""
        self._spec = spec
        self._on_refused = on_refused
        self._study = _open_study(spec, journal)
        self._endings = dict(trial_results)
        self._of_trial: dict[str, int] = {}
        baselines = trials.trials_of(spec, trials.baselines(spec))
        self._first = len(baselines)
        self._waiting = deque(trial for trial in baselines if trial.trial_id not in trial_results)
        self._excluded: set[int] = set()
        for frozen in self._study.get_trials(deepcopy=False):
            self._take_over(frozen)

    def _take_over(self, frozen: FrozenTrial) -> None:
        """A configuration that an earlier session asked for."""
        assignment = _assignment(self._spec, frozen.params)
        if _is_left_out(self._spec, frozen):
            self._exclude(frozen.number)
        elif assignment is None:  # the driver was killed while asking
            self._tell(frozen.number, [TrialResult("failed")])
        elif not frozen.state.is_finished():
            self._open(frozen.number, assignment)

    def next(self) -> Trial | None:
        while not self._waiting and not self._all_asked():
            number, assignment = self._ask()
            self._open(number, assignment)
        return self._waiting.popleft() if self._waiting else None

    def _ask(self) -> tuple[int, Assignment]:
        """What Optuna suggests; after some excluded suggestions in a row, a draw by chance in its name."""
        for _ in range(_MOST_EXCLUDED):
            asked = self._study.ask()
            assignment = _suggested(self._spec, asked)
            if not enumeration.is_excluded(self._spec, assignment):
                return asked.number, assignment
            self._exclude(asked.number)
        return self._draw()

    def _draw(self) -> tuple[int, Assignment]:
        """Some samplers suggest the same for ever when nothing comes of it."""
        number = len(self._study.get_trials(deepcopy=False))
        drawn = enumeration.another(self._spec, random.Random(f"{self._spec.search.search_seed}-{number}"))
        if drawn is None:
            raise ConfigError(f"{self._spec.study}: exclude: leaves nothing that a search can find. Exclude less")
        return ask_for(self._spec, self._study, drawn).number, drawn

    def _exclude(self, number: int) -> None:
        """Not run, and none of those to try. Optuna keeps away from trials that were pruned without a value."""
        from optuna.trial import TrialState

        self._excluded.add(number)
        if not self._study.get_trials(deepcopy=False)[number].state.is_finished():
            self._study.tell(number, state=TrialState.PRUNED)

    def ended(self, trial_id: str, trial_result: TrialResult) -> None:
        self._endings[trial_id] = trial_result
        if trial_id in self._of_trial:
            self._tell_if_complete(self._of_trial[trial_id])

    @property
    def exhausted(self) -> bool:
        return not self._waiting and self._all_asked()

    def _all_asked(self) -> bool:
        asked = len(self._study.get_trials(deepcopy=False)) - len(self._excluded)
        return asked >= (self._spec.search.num_configurations or 0)

    def _ids(self, number: int) -> list[str]:
        seeds = len(self._spec.seeds)
        return [f"t{self._first + number * seeds + index:04d}" for index in range(seeds)]

    def _open(self, number: int, assignment: Assignment) -> None:
        """Queue the trials of a configuration, except those that have ended already."""
        configuration = trials.on_axes(self._spec, assignment)
        try:
            for seed, trial_id in zip(self._spec.seeds, self._ids(number), strict=True):
                self._of_trial[trial_id] = number
                if trial_id not in self._endings:
                    self._waiting.append(trials.trial(self._spec, configuration, seed, int(trial_id[1:])))
        except ConfigError as error:
            self._on_refused(configuration.label, str(error))
            self._tell(number, [TrialResult("failed")])
        else:
            self._tell_if_complete(number)

    def _tell_if_complete(self, number: int) -> None:
        trial_results = [self._endings.get(trial_id) for trial_id in self._ids(number)]
        if all(trial_results):
            self._tell(number, [trial_result for trial_result in trial_results if trial_result])

    def _tell(self, number: int, trial_results: list[TrialResult]) -> None:
        objectives.tell(self._study, number, trial_results)


def configuration_of(spec: StudySpec, params: Mapping[str, Any]) -> trials.Configuration | None:
    """What Optuna's parameters mean; None where they are not those of a whole configuration."""
    assignment = _assignment(spec, params)
    return None if assignment is None else trials.on_axes(spec, assignment)


def ask_for(spec: StudySpec, study: optuna.Study, assignment: Assignment) -> optuna.Trial:
    """A trial of exactly this configuration, in Optuna's name."""
    usual = study.sampler
    try:
        study.sampler = _fixed({key: _key(value) for key, value in assignment.items()}, usual)
        asked = study.ask()
        _suggested(spec, asked)
        return asked
    finally:
        study.sampler = usual


def _is_left_out(spec: StudySpec, frozen: FrozenTrial) -> bool:
    """Whether it is excluded, or stands in a journal that was written anew for one that was."""
    from optuna.trial import TrialState

    assignment = _assignment(spec, frozen.params)
    if assignment is None:
        return frozen.state == TrialState.PRUNED and not frozen.params
    return enumeration.is_excluded(spec, assignment)


def is_over(spec: StudySpec, journal: Path) -> bool:
    """Whether every configuration was asked for and told; only reads the journal, so a driver may be running."""
    if not journal.exists():
        return False
    asked = load_study(spec, journal).get_trials(deepcopy=False)
    run = sum(not _is_left_out(spec, frozen) for frozen in asked)
    return run >= (spec.search.num_configurations or 0) and all(frozen.state.is_finished() for frozen in asked)


def load_study(spec: StudySpec, journal: Path) -> optuna.Study:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        study_name=spec.study,
        storage=JournalStorage(JournalFileBackend(str(journal))),
        directions=objectives.directions(spec.objective),
        load_if_exists=True,
    )


def _open_study(spec: StudySpec, journal: Path) -> optuna.Study:
    repair_journal(journal)
    study = load_study(spec, journal)
    # A resumed search with the same seed would draw again what it drew before.
    asked = len(study.get_trials(deepcopy=False))
    seed = spec.search.search_seed if not asked else random.Random(f"{spec.search.search_seed}-{asked}").getrandbits(32)
    study.sampler = _sampler(spec.search, seed)
    return study


def _sampler(search: SearchSpec, seed: int) -> BaseSampler:
    from optuna import samplers
    from optuna.exceptions import ExperimentalWarning

    if search.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if search.sampler == "nsga2":
        with warnings.catch_warnings():
            # Optuna calls its crossovers experimental since version 3.
            warnings.simplefilter("ignore", ExperimentalWarning)
            # The usual crossover swaps whole values, and every sixth child is one that was trained before.
            crossover = samplers.nsgaii.BLXAlphaCrossover()
        return samplers.NSGAIISampler(seed=seed, population_size=search.population_size, crossover=crossover)
    if search.sampler == "gp":
        return samplers.GPSampler(seed=seed, warn_independent_sampling=False)
    if search.sampler == "qmc":
        with warnings.catch_warnings():
            # Optuna calls it experimental since version 3.
            warnings.simplefilter("ignore", ExperimentalWarning)
            # The journal says how far the sequence has got, under the seed that it was begun with. Choices have no
            # order to spread over, so they are drawn at random.
            return samplers.QMCSampler(
                seed=search.search_seed, scramble=True, warn_independent_sampling=False, warn_asynchronous_seeding=False
            )
    # The constant liar keeps trials that run side by side apart.
    return samplers.TPESampler(seed=seed, constant_liar=True)


def _fixed(params: dict[str, Any], sampler: BaseSampler) -> BaseSampler:
    """A sampler that suggests exactly this."""
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import PartialFixedSampler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return PartialFixedSampler(params, sampler)


def repair_journal(journal: Path) -> None:
    """Undo what a killed writer leaves behind: half a last line, and its lock. Only for the study's one driver."""
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if not journal.exists():
        return
    with journal.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _suggested(spec: StudySpec, asked: optuna.Trial) -> Assignment:
    """Axis by axis, in the order of the study file: whether one exists depends on those before it."""
    assignment: Assignment = {}
    for key, axis in spec.axes.items():
        if enumeration.exists(axis, assignment):
            assignment[key] = _value(axis, _suggest(key, axis, asked))
    return assignment


def _suggest(key: str, axis: Axis, asked: optuna.Trial) -> Any:
    if axis.is_choice:
        return asked.suggest_categorical(key, [_key(value) for value in axis.finite or ()])
    low, high = float(axis.low or 0.0), float(axis.high or 0.0)
    if axis.is_integer:
        return asked.suggest_int(key, int(low), int(high), step=int(axis.step or 1), log=axis.is_log)
    return asked.suggest_float(key, low, high, step=axis.step, log=axis.is_log)


def _assignment(spec: StudySpec, params: Mapping[str, Any]) -> Assignment | None:
    """What a trial on record was asked for; None if it lacks an axis, or has one that does not exist in it."""
    assignment: Assignment = {}
    for key, axis in spec.axes.items():
        if enumeration.exists(axis, assignment):
            if key not in params:
                return None
            assignment[key] = _value(axis, params[key])
    return assignment if set(assignment) == set(params) else None


def _key(value: Any) -> Any:
    """A choice as Optuna stores it: plain values as they are, lists as JSON."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _value(axis: Axis, stored: Any) -> Any:
    if axis.is_choice:
        return next(value for value in axis.finite or () if _key(value) == stored)
    return int(stored) if axis.is_integer else axis.readable(stored)
