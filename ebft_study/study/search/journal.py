"""Optuna's journal: a configuration as Optuna's parameters, where the file is stored, and how a damaged one is rebuilt.

Results of earlier studies that a search was told (`StudySpec.told`) come first in it; they have no trials here.

The journal is the record of a search. It holds what samplers need and the results tables lack: NSGA-II's generations,
the position of a quasi-random sequence, excluded and refused configurations. The tables hold every configuration that
has a trial, so a journal that is damaged or lost is rebuilt from them.

Optuna appends to a local file. For a study in an object store that file is a working copy: downloaded when a driver
starts, uploaded before any trial that it chose starts.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebft_study import config, plugins
from ebft_study.errors import ConfigError, EbftError
from ebft_study.results import cell_value
from ebft_study.storage import StoragePath, storage_errors, storage_path
from ebft_study.study.spec import enumeration, trials
from ebft_study.study.spec.axis import Axis, frozen
from ebft_study.study.spec.enumeration import Assignment
from ebft_study.study.spec.study_spec import EarlierPoint, ObjectiveSpec, SearchSpec, StudySpec

if TYPE_CHECKING:
    import optuna
    import pandas as pd
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

JOURNAL = "optuna.journal"
_SAMPLER = "search.sampler"
_TRIED = 3
_UNREADABLE = (ValueError, KeyError, AttributeError, TypeError, AssertionError, IndexError)
"""Errors that Optuna raises on a file that is not a journal."""


# --- the file --------------------------------------------------------------------------------------------------


def working_copy(folder: StoragePath) -> Path:
    """The local file that Optuna appends to."""
    return folder.local_dir / JOURNAL


def download(folder: StoragePath, to: Path | None = None) -> Path:
    """The journal as a local file; that of a study in an object store is copied to `to`, or to its working copy."""
    path = working_copy(folder)
    if folder.local is None:
        path = to or path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            storage_path(path).write_bytes((folder / JOURNAL).read_bytes())
        except FileNotFoundError:
            path.unlink(missing_ok=True)
    return path


def upload(folder: StoragePath) -> None:
    """Copy the working copy of the journal to a study in an object store."""
    if folder.local is None:
        (folder / JOURNAL).write_bytes(working_copy(folder).read_bytes())


def open_study(spec: StudySpec, path: Path) -> optuna.Study:
    """Open the journal for writing, or begin one. Only for the study's one driver.

    Removes the remains of a killed driver: an incomplete last line, and its lock.
    """
    import optuna

    Path(f"{path}.lock").unlink(missing_ok=True)
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    study = optuna.create_study(
        study_name=spec.drawn_by, storage=_storage(path), directions=directions(spec.objective), load_if_exists=True
    )
    for point in spec.told[len(study.get_trials(deepcopy=False)) :]:
        study.add_trial(_told(spec, point))
    study.sampler = _sampler(spec.search, len(study.get_trials(deepcopy=False)))
    return study


def _told(spec: StudySpec, point: EarlierPoint) -> FrozenTrial:
    """A result of an earlier study as a trial of Optuna's."""
    from optuna.trial import create_trial

    return create_trial(
        params={key: _stored(value) for key, value in point.assignment.items()},
        distributions={key: _distribution(spec.axes[key]) for key in point.assignment},
        values=list(point.values),
        user_attrs={"told": point.configuration},
    )


def directions(objective: ObjectiveSpec) -> list[str]:
    """`minimize` or `maximize` for each objective."""
    return [f"{each.mode}imize" for each in objective.all]


def _sampler(search: SearchSpec, asked: int) -> BaseSampler:
    """The sampler of a search that asked for, or was told of, `asked` configurations."""
    from optuna import samplers
    from optuna.exceptions import ExperimentalWarning

    # With the seed of its first session, a resumed search would draw the same configurations again, and so would one
    # that was told of them.
    seed = random.Random(f"{search.search_seed}-{asked}").getrandbits(32) if asked else search.search_seed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # QMC and the crossovers, since Optuna 3
        match search.sampler:
            case "random":
                return samplers.RandomSampler(seed=seed)
            case "nsga2":
                # Optuna's default crossover swaps whole values: every sixth child is one that was trained before.
                crossover = samplers.nsgaii.BLXAlphaCrossover()
                return samplers.NSGAIISampler(seed=seed, population_size=search.population_size, crossover=crossover)
            case "gp":
                return samplers.GPSampler(seed=seed, warn_independent_sampling=False)
            case "qmc":
                # The journal holds the position in the sequence, which belongs to the seed that it began with. What the
                # sequence does not cover, such as the first configuration, is drawn at random.
                return samplers.QMCSampler(
                    seed=search.search_seed,
                    independent_sampler=samplers.RandomSampler(seed=seed),
                    scramble=True,
                    warn_independent_sampling=False,
                    warn_asynchronous_seeding=False,
                )
            case "tpe":
                # The constant liar keeps concurrent trials apart.
                return samplers.TPESampler(seed=seed, constant_liar=True)
            case _:
                return _users_sampler(search, seed)


def _users_sampler(search: SearchSpec, seed: int) -> BaseSampler:
    """A sampler by import path, with the seed if it takes one that its options do not give.

    Raises:
        ConfigError: see `plugins.call`; or it is no sampler.
    """
    from optuna.samplers import BaseSampler

    options = plugins.seeded(search.sampler, key=_SAMPLER, options=search.sampler_options, seed=seed)
    sampler = plugins.call(search.sampler, key=_SAMPLER, options=options)
    if not isinstance(sampler, BaseSampler):
        rule = f"it has made an object of type {type(sampler).__name__}"
        raise plugins.refused(_SAMPLER, search.sampler, rule, "Make an optuna.samplers.BaseSampler")
    return sampler


def check_sampler(spec: StudySpec) -> None:
    """Ask a sampler of the user for a few configurations of this study, which nothing records.

    Raises:
        ConfigError: it cannot be made, or fails: for several objectives, on such axes, without a package that it needs.
    """
    import optuna

    if spec.search.algorithm != "optuna" or not plugins.is_path(spec.search.sampler):
        return
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=directions(spec.objective), sampler=_sampler(spec.search, 0))
    try:
        for number in range(_TRIED):
            asked, _ = ask(spec, study)
            study.tell(asked, [float(number)] * len(spec.objective.all))
    except EbftError:
        raise
    except Exception as error:  # of what a sampler does after a trial
        raise plugins.raised(_SAMPLER, spec.search.sampler, error) from error


def _storage(path: Path) -> Any:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return JournalStorage(JournalFileBackend(str(path)))


def is_over(spec: StudySpec, folder: StoragePath) -> bool:
    """Whether every configuration was suggested and has its result. Reads only, so a driver may be running."""
    import optuna

    with tempfile.TemporaryDirectory() as temporary:
        path = download(folder, Path(temporary, JOURNAL))
        if not path.is_file():
            return False
        try:
            with storage_errors(path, "read"):
                asked = optuna.load_study(study_name=spec.drawn_by, storage=_storage(path)).get_trials(deepcopy=False)
            run = sum(not is_left_out(spec, frozen) for frozen in asked[len(spec.told) :])
        except _UNREADABLE:
            return False
    return run >= (spec.search.num_configurations or 0) and all(frozen.state.is_finished() for frozen in asked)


# --- configurations in it --------------------------------------------------------------------------------------


def trial_ids(spec: StudySpec, number: int) -> list[str]:
    """The trials of the configuration that Optuna numbers `number`, one per seed; baselines come before them.

    None for a result that the search was told.
    """
    if number < len(spec.told):
        return []
    first = (len(spec.baselines) + number - len(spec.told)) * len(spec.seeds.all)
    return [f"t{first + index:04d}" for index in range(len(spec.seeds.all))]


def configuration_number(spec: StudySpec, trial_id: str) -> int:
    """Optuna's number of a trial's configuration; negative for a baseline."""
    index = int(trial_id[1:]) // len(spec.seeds.all) - len(spec.baselines)
    return index + len(spec.told) if index >= 0 else index


@contextlib.contextmanager
def errors(path: Path) -> Iterator[None]:
    """Context in which what a disk does to the journal, or to Optuna's lock of it, is a `StorageError` of one line."""
    with storage_errors(path):
        try:
            yield
        except RuntimeError as error:
            if "lock" not in str(error):
                raise
            raise OSError(f"its lock failed: {error}") from None


def suggest(spec: StudySpec, asked: optuna.Trial) -> Assignment:
    """Sample a configuration axis by axis, in the order of the file: whether one exists depends on earlier ones."""
    assignment: Assignment = {}
    for key, axis in spec.axes.items():
        if enumeration.exists(axis, assignment):
            assignment[key] = _value(axis, _suggest(key, axis, asked))
    return assignment


def ask(spec: StudySpec, study: optuna.Study) -> tuple[optuna.Trial, Assignment]:
    """What the sampler suggests.

    Raises:
        ConfigError: a sampler of the user has raised an error.
    """
    try:
        asked = study.ask()
        return asked, suggest(spec, asked)
    except Exception as error:
        if isinstance(error, OSError) or not plugins.is_path(spec.search.sampler):
            raise  # a full disk is no fault of a sampler
        raise plugins.raised(_SAMPLER, spec.search.sampler, error) from error


def ask_for(spec: StudySpec, study: optuna.Study, assignment: Assignment) -> optuna.Trial:
    """Make Optuna suggest exactly this configuration."""
    study.enqueue_trial({key: _stored(value) for key, value in assignment.items()})
    asked = study.ask()
    _ = asked.relative_params  # samplers that count their draws also count this configuration
    suggest(spec, asked)
    return asked


def assignment_of(spec: StudySpec, params: Mapping[str, Any]) -> Assignment | None:
    """The configuration that Optuna's parameters describe; None if an axis is missing, or one should not exist."""
    assignment: Assignment = {}
    for key, axis in spec.axes.items():
        if enumeration.exists(axis, assignment):
            if key not in params:
                return None
            assignment[key] = _value(axis, params[key])
    return assignment if set(assignment) == set(params) else None


def is_left_out(spec: StudySpec, frozen: FrozenTrial) -> bool:
    """Whether a trial of Optuna's is of an excluded configuration, or replaces one in a rebuilt journal."""
    from optuna.trial import TrialState

    assignment = assignment_of(spec, frozen.params)
    if assignment is None:
        return frozen.state == TrialState.PRUNED and not frozen.params
    return enumeration.is_excluded(spec, assignment)


def _suggest(key: str, axis: Axis, asked: optuna.Trial) -> Any:
    from optuna.distributions import CategoricalDistribution, IntDistribution

    range_ = _distribution(axis)
    if isinstance(range_, CategoricalDistribution):
        return asked.suggest_categorical(key, range_.choices)
    if isinstance(range_, IntDistribution):
        return asked.suggest_int(key, range_.low, range_.high, step=range_.step, log=range_.log)
    return asked.suggest_float(key, range_.low, range_.high, step=range_.step, log=range_.log)


def _distribution(axis: Axis) -> CategoricalDistribution | IntDistribution | FloatDistribution:
    """An axis as Optuna describes it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.is_choice:
        return CategoricalDistribution([_stored(value) for value in axis.finite or ()])
    low, high = float(axis.low or 0.0), float(axis.high or 0.0)
    if axis.is_integer:
        return IntDistribution(int(low), int(high), step=int(axis.step or 1), log=axis.is_log)
    return FloatDistribution(low, high, step=axis.step, log=axis.is_log)


def _stored(value: Any) -> Any:
    """A choice as Optuna stores it: scalars as they are, lists as JSON."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _value(axis: Axis, stored: Any) -> Any:
    if axis.is_choice:
        return _first(value for value in axis.finite or () if _stored(value) == stored)
    return int(stored) if axis.is_integer else axis.readable(stored)


def _first(values: Iterable[Any]) -> Any:
    """The first value; a `KeyError` where there is none, as the axis is another one now."""
    for value in values:
        return value
    raise KeyError


# --- repair ----------------------------------------------------------------------------------------------------


def repair(spec: StudySpec, path: Path, rows: pd.DataFrame, ended: Container[str]) -> str:
    """Rebuild a journal that contradicts the table of trials; returns the contradiction, '' for none.

    Args:
        ended: trials that do not run again. A failed one may, and Optuna takes no result back.
    """
    with storage_errors(storage_path(path)):
        chosen = {configuration_number(spec, row["trial_id"]): row for row in rows.to_dict("records")}
        chosen = {number: row for number, row in chosen.items() if number >= 0}
        problem = _problem(spec, path, chosen, {name for name in rows["trial_id"] if name not in ended})
        if not problem:
            return ""
        if path.exists():
            path.replace(path.with_name(f"{path.name}.damaged"))
        _rebuild(spec, open_study(spec, path), chosen)
    return f"{path.name} {problem}; rebuilt from the results tables"


def _problem(spec: StudySpec, path: Path, chosen: Mapping[int, dict[Any, Any]], left: Set[str]) -> str:
    """
    Args:
        chosen: Optuna's number of a configuration -> the row of one of its trials.
        left: the trials that are not over.
    """
    if not path.exists():
        return "is missing" if chosen else ""
    if not path.is_file():
        return "is no file"
    try:
        asked = open_study(spec, path).get_trials(deepcopy=False)
        assignments = {each.number: assignment_of(spec, each.params) for each in asked}
    except _UNREADABLE:
        return "is damaged"
    for given, point in zip(asked, spec.told, strict=False):
        here, recorded = (frozen(list((each or {}).items())) for each in (assignments[given.number], point.assignment))
        if here != recorded or given.values != list(point.values):
            return "does not hold the results that the search was told"
    labels = {number: trials.on_axes(spec, values).label for number, values in assignments.items() if values}
    differs = any(labels.get(number) != row["configuration"] for number, row in chosen.items())
    if differs:
        return "does not hold the configurations of the trials"
    over = {name for each in asked if each.state.is_finished() for name in trial_ids(spec, each.number)}
    again = sorted(over & left)
    return f"holds the results of {', '.join(again)}, which run again" if again else ""


def _rebuild(spec: StudySpec, study: optuna.Study, chosen: Mapping[int, dict[Any, Any]]) -> None:
    """Numbers without a trial (excluded, refused, only suggested) are left out: other configurations replace them."""
    from optuna.trial import TrialState, create_trial

    known = dict(enumerate(enumeration.known(spec), start=len(spec.told)))
    for number in range(len(spec.told), max(chosen, default=-1) + 1):
        if number in chosen:
            try:
                ask_for(spec, study, _recorded_assignment(spec, chosen[number]))
            except _UNREADABLE:
                row = chosen[number]
                raise ConfigError(
                    f"{spec.study}: axes: do not hold {row['configuration']!r}, which trial {row['trial_id']} has. "
                    "Put back the values in study.yaml"
                ) from None
        elif number in known:
            ask_for(spec, study, known[number])
        else:
            study.add_trial(create_trial(state=TrialState.PRUNED))


def _recorded_assignment(spec: StudySpec, row: Mapping[Any, Any]) -> Assignment:
    """The value of every axis that exists, by a row of `trials`; a choice of several settings is named in its label."""
    names = set(str(row["configuration"]).split(" "))
    assignment: Assignment = {}
    for key, axis in spec.axes.items():
        if not enumeration.exists(axis, assignment):
            continue
        if axis.choices is None:
            value = cell_value(row[config.short_name(key)])
            assignment[key] = list(value) if isinstance(value, tuple) else value  # study files have lists
        else:
            assignment[key] = _first(name for name in axis.choices if f"{key}={name}" in names)
    return assignment
