"""Optuna's journal: where it is, and what becomes of a damaged one.

Optuna appends to a file on a disk. Of a study in a store that file is a working copy: fetched when a driver begins, and
put back before any trial that it chose is started. Every configuration is in the results tables too, so a journal that
is damaged or gone is written anew from them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebft_study import config
from ebft_study.results import cell_value
from ebft_study.storage import StoragePath, storage_errors, storage_path
from ebft_study.study.folder.trial_states import TrialResult
from ebft_study.study.search import optuna_search
from ebft_study.study.search.listed import Search
from ebft_study.study.search.optuna_search import JOURNAL
from ebft_study.study.spec import enumeration, trials
from ebft_study.study.spec.enumeration import Assignment
from ebft_study.study.spec.study_spec import StudySpec
from ebft_study.study.spec.trials import Trial

if TYPE_CHECKING:
    import pandas as pd

_UNREADABLE = (ValueError, KeyError, AttributeError, TypeError, AssertionError, IndexError)
"""What Optuna raises at a journal that is none."""


class SyncedSearch:
    """A search whose journal is put back into the study's place whenever it has changed."""

    def __init__(self, inner: Search, journal: Path, folder: StoragePath) -> None:
        self._inner, self._journal, self._place = inner, journal, folder / JOURNAL
        self._seen = -1
        self._keep()

    def next(self) -> Trial | None:
        found = self._inner.next()
        self._keep()
        return found

    def ended(self, trial_id: str, trial_result: TrialResult) -> None:
        self._inner.ended(trial_id, trial_result)
        self._keep()

    @property
    def exhausted(self) -> bool:
        return self._inner.exhausted

    def _keep(self) -> None:
        size = self._journal.stat().st_size if self._journal.exists() else -1
        if self._place.local is None and size != self._seen:
            self._place.write_bytes(self._journal.read_bytes())
            self._seen = size


def working_copy(folder: StoragePath) -> Path:
    """Where the journal is on a disk."""
    return folder.local_dir / JOURNAL


def fetch(folder: StoragePath) -> Path:
    """The journal on a disk, for the study's one driver."""
    journal = working_copy(folder)
    if folder.local is None:
        journal.parent.mkdir(parents=True, exist_ok=True)
        try:
            storage_path(journal).write_bytes((folder / JOURNAL).read_bytes())
        except FileNotFoundError:
            storage_path(journal).delete()
    return journal


def is_over(spec: StudySpec, folder: StoragePath) -> bool:
    """Whether every configuration was asked for and told; only reads, so a driver may be running."""
    try:
        with _read_only(folder) as journal:
            return optuna_search.is_over(spec, journal)
    except _UNREADABLE:
        return False


@contextlib.contextmanager
def _read_only(folder: StoragePath) -> Iterator[Path]:
    if folder.local is not None:
        yield folder.local / JOURNAL
        return
    with tempfile.TemporaryDirectory() as temporary:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary, JOURNAL).write_bytes((folder / JOURNAL).read_bytes())
        yield Path(temporary, JOURNAL)


def repair(spec: StudySpec, journal: Path, rows: pd.DataFrame) -> str:
    """Write a journal anew that does not agree with the table of trials; returns what was wrong, '' for nothing."""
    with storage_errors(storage_path(journal)):
        journal.parent.mkdir(parents=True, exist_ok=True)
        optuna_search.repair_journal(journal)
        chosen = _chosen(spec, rows)
        problem = _problem(spec, journal, chosen)
        if not problem:
            return ""
        aside = journal.with_name(f"{journal.name}.damaged")
        if journal.exists():
            journal.replace(aside)
        _rebuild(spec, journal, chosen)
    return f"{journal.name} {problem}; written anew from the results tables"


def _chosen(spec: StudySpec, rows: pd.DataFrame) -> dict[int, dict[Any, Any]]:
    """Number of a configuration -> the row of one of its trials."""
    first, seeds = len(trials.trials_of(spec, trials.baselines(spec))), len(spec.seeds)
    numbered = {int(row["trial_id"][1:]): row for row in rows.to_dict("records")}
    return {(number - first) // seeds: row for number, row in sorted(numbered.items(), reverse=True) if number >= first}


def _problem(spec: StudySpec, journal: Path, chosen: dict[int, dict[Any, Any]]) -> str:
    if not journal.exists():
        return "is gone" if chosen else ""
    try:
        asked = optuna_search.load_study(spec, journal).get_trials(deepcopy=False)
        known = {frozen.number: optuna_search.configuration_of(spec, frozen.params) for frozen in asked}
    except _UNREADABLE:
        return "is damaged"
    labels = {number: configuration.label for number, configuration in known.items() if configuration}
    other = [n for n, row in chosen.items() if labels.get(n) != row["configuration"]]
    return "does not hold what was tried" if other else ""


def _rebuild(spec: StudySpec, journal: Path, chosen: dict[int, dict[Any, Any]]) -> None:
    """Numbers that no trial has (excluded, refused, only asked for) are left out: others are tried in their place."""
    from optuna.trial import TrialState, create_trial

    study = optuna_search.load_study(spec, journal)
    for number in range(max(chosen, default=-1) + 1):
        if number in chosen:
            optuna_search.ask_for(spec, study, _assignment(spec, chosen[number]))
        else:
            study.add_trial(create_trial(state=TrialState.PRUNED))


def _assignment(spec: StudySpec, row: dict[Any, Any]) -> Assignment:
    """The value of every axis that exists in a trial's row; the trial's label tells choices of several settings."""
    named = set(str(row["configuration"]).split(" "))
    found: Assignment = {}
    for key, axis in spec.axes.items():
        if not enumeration.exists(axis, found):
            continue
        if axis.choices is None:
            found[key] = cell_value(row[config.short_name(key)])
        else:
            found[key] = next(name for name in axis.choices if f"{key}={name}" in named)
    return found
