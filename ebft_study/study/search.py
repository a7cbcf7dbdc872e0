"""Which trial runs next. Plain Python: Ray's side of it is `tuning.StudySearcher`.

Grid and random searches hand out trials that are known from the start. An Optuna search asks for a configuration when
a place is free, and tells what came of it once all its seeds have ended. Optuna's own record is a journal file in the
study's folder; together with the results tables it holds all that a resumed study needs.
"""

from __future__ import annotations

import json
import math
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ebft_study.errors import ConfigError
from ebft_study.study import trials
from ebft_study.study.spec import Axis, SearchSpec, StudySpec
from ebft_study.study.trials import Trial

if TYPE_CHECKING:
    import optuna
    from optuna.samplers import BaseSampler

JOURNAL = "optuna.journal"


EARLY_STOP = "early stop"
"""How the `stop_reason` begins of a trial that the scheduler stopped; others stopped by themselves."""


@dataclass(frozen=True)
class Ending:
    """How a trial ended, and the objective it had then (NaN where it has none) at which step."""

    kind: Literal["finished", "early", "failed"]
    value: float = math.nan
    step: int = 0


def ending(status: str, reason: str, value: float, step: int) -> Ending:
    """From a trial's final state. A trial that stopped because it became non-finite says nothing about its settings."""
    kinds: dict[str, Literal["finished", "early"]] = {"finished": "finished"}
    if status == "stopped" and reason.startswith(EARLY_STOP):
        kinds["stopped"] = "early"
    return Ending(kinds.get(status, "failed"), value, step)


class Search(Protocol):
    """A source of trials. `next` returns None when there is nothing to hand out at present."""

    def next(self) -> Trial | None: ...

    def ended(self, trial_id: str, ending: Ending) -> None: ...

    @property
    def exhausted(self) -> bool:
        """True when `next` will never return a trial again."""
        ...


class ListedSearch:
    """Hands out given trials in order."""

    def __init__(self, waiting: Iterable[Trial]) -> None:
        self._waiting = deque(waiting)

    def next(self) -> Trial | None:
        return self._waiting.popleft() if self._waiting else None

    def ended(self, trial_id: str, ending: Ending) -> None:
        """Nothing depends on how a listed trial ended."""

    @property
    def exhausted(self) -> bool:
        return not self._waiting


class OptunaSearch:
    """Asks Optuna for configurations and tells it the mean objective over seeds.

    Trials of configuration k are numbered from `baselines + k * seeds`, so that journal and results name each other
    without further records. A configuration that breaks a rule between settings counts as failed.
    """

    def __init__(
        self,
        spec: StudySpec,
        journal: Path,
        endings: Mapping[str, Ending],
        on_refused: Callable[[str, str], None] = lambda label, problem: None,
    ) -> None:
        """`endings`: of the trials that earlier sessions of the study brought to an end."""
        self._spec = spec
        self._on_refused = on_refused
        self._study = _open_study(spec, journal)
        self._endings = dict(endings)
        self._of_trial: dict[str, int] = {}
        baselines = trials.trials_of(spec, trials.baselines(spec))
        self._first = len(baselines)
        self._waiting = deque(trial for trial in baselines if trial.trial_id not in endings)
        for frozen in self._study.get_trials(deepcopy=False):
            if set(frozen.params) != set(spec.axes):  # the driver was killed while asking
                self._tell(frozen.number, [Ending("failed")])
            elif not frozen.state.is_finished():
                self._open(frozen.number, frozen.params)

    def next(self) -> Trial | None:
        while not self._waiting and not self._all_asked():
            asked = self._study.ask(_distributions(self._spec))
            self._open(asked.number, asked.params)
        return self._waiting.popleft() if self._waiting else None

    def ended(self, trial_id: str, ending: Ending) -> None:
        self._endings[trial_id] = ending
        if trial_id in self._of_trial:
            self._tell_if_complete(self._of_trial[trial_id])

    @property
    def exhausted(self) -> bool:
        return not self._waiting and self._all_asked()

    def _all_asked(self) -> bool:
        return len(self._study.get_trials(deepcopy=False)) >= (self._spec.search.num_configurations or 0)

    def _ids(self, number: int) -> list[str]:
        seeds = len(self._spec.seeds)
        return [f"t{self._first + number * seeds + index:04d}" for index in range(seeds)]

    def _open(self, number: int, params: Mapping[str, Any]) -> None:
        """Queue the trials of a configuration, except those that have ended already."""
        configuration = configuration_of(self._spec, params)
        try:
            for seed, trial_id in zip(self._spec.seeds, self._ids(number), strict=True):
                self._of_trial[trial_id] = number
                if trial_id not in self._endings:
                    self._waiting.append(trials.trial(self._spec, configuration, seed, int(trial_id[1:])))
        except ConfigError as error:
            self._on_refused(configuration.label, str(error))
            self._tell(number, [Ending("failed")])
        else:
            self._tell_if_complete(number)

    def _tell_if_complete(self, number: int) -> None:
        endings = [self._endings.get(trial_id) for trial_id in self._ids(number)]
        if all(endings):
            self._tell(number, [ending for ending in endings if ending])

    def _tell(self, number: int, endings: list[Ending]) -> None:
        from optuna.trial import Trial as OptunaTrial
        from optuna.trial import TrialState

        frozen = self._study.get_trials(deepcopy=False)[number]
        if frozen.state.is_finished():
            return
        mean = math.fsum(ending.value for ending in endings) / len(endings)
        if not math.isfinite(mean) or any(ending.kind == "failed" for ending in endings):
            self._study.tell(number, state=TrialState.FAIL)
        elif any(ending.kind == "early" for ending in endings):
            # Optuna takes the value of a pruned trial from what it reported last.
            OptunaTrial(self._study, frozen._trial_id).report(mean, min(ending.step for ending in endings))
            self._study.tell(number, state=TrialState.PRUNED)
        else:
            self._study.tell(number, mean)


def configuration_of(spec: StudySpec, params: Mapping[str, Any]) -> trials.Configuration:
    """What Optuna's parameters mean."""
    return trials.on_axes({path: _value(spec.axes[path], params[path]) for path in spec.axes})


def is_over(spec: StudySpec, journal: Path) -> bool:
    """Whether every configuration was asked for and told; only reads the journal, so a driver may be running."""
    if not journal.exists():
        return False
    asked = _load_study(spec, journal).get_trials(deepcopy=False)
    return len(asked) >= (spec.search.num_configurations or 0) and all(frozen.state.is_finished() for frozen in asked)


def _load_study(spec: StudySpec, journal: Path) -> optuna.Study:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        study_name=spec.study,
        storage=JournalStorage(JournalFileBackend(str(journal))),
        direction="minimize" if spec.objective.mode == "min" else "maximize",
        load_if_exists=True,
    )


def _open_study(spec: StudySpec, journal: Path) -> optuna.Study:
    mend_journal(journal)
    study = _load_study(spec, journal)
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
    if search.sampler == "gp":
        return samplers.GPSampler(seed=seed)
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


def mend_journal(journal: Path) -> None:
    """Undo what a killed writer leaves behind: half a last line, and its lock. Only for the study's one driver."""
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if not journal.exists():
        return
    with journal.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _distributions(spec: StudySpec) -> dict[str, Any]:
    return {path: _distribution(axis) for path, axis in spec.axes.items()}


def _distribution(axis: Axis) -> Any:
    from optuna import distributions

    if axis.is_choice:
        return distributions.CategoricalDistribution([_key(value) for value in axis.values or ()])
    low, high = float(axis.low or 0.0), float(axis.high or 0.0)
    if axis.distribution == "integer":
        return distributions.IntDistribution(int(low), int(high))
    return distributions.FloatDistribution(low, high, log=axis.distribution == "log_uniform")


def _key(value: Any) -> Any:
    """A choice as Optuna stores it: plain values as they are, lists as JSON."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _value(axis: Axis, stored: Any) -> Any:
    if axis.is_choice:
        return next(value for value in axis.values or () if _key(value) == stored)
    if axis.distribution == "integer":
        return int(stored)
    return trials.rounded(stored, float(axis.low or 0.0), float(axis.high or 0.0))
