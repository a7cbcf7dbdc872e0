"""Writing the states of a study's trials.

The table `trials` has one file per trial, which is replaced when the trial's state changes; a hidden copy, written
first, replaces a damaged one. Pending trials share files, so that a study of ten thousand is planned in seconds.

In a store, a driver writes files of its own generation only (see `fence`): `<trial>~g<generation>.parquet`. An older
driver that writes once more overwrites none of them.
"""

from __future__ import annotations

import functools
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from ebft_study.results import copies, reader, schema
from ebft_study.results.fence import Fence, alone
from ebft_study.results.metrics import unknown
from ebft_study.results.writer import Clock, FileSequence, as_parquet, build_table, checked_name
from ebft_study.storage import Location, StoragePath, storage_path

_PENDING_PREFIX = "waiting~"  # '~' may not be in a trial's identifier
_OF_TRIAL = re.compile(r"([^.~][^~]*?)(?:~g(\d+))?\.parquet")
_GENERATION = re.compile(r"~g(\d+)")
_ROWS_PER_FILE = 500  # a shared file is written again when one of its trials starts

Row = dict[str, Any]


class StudyRecorder:
    """States of a study's trials, and its events; held by the driver alone."""

    def __init__(self, study_folder: Location, *, study: str, fence: Fence | None = None) -> None:
        self._study, self._clock, self._fence = study, Clock(), fence or alone(study_folder)
        self._trials = storage_path(study_folder).subfolder("results", "trials")
        self._files = FileSequence(study_folder, "driver", os.getpid(), self._fence)
        self._rows: dict[str, Row] = {}
        self._own = latest_files(self._trials)
        self._pending = PendingRows(self._trials, self._fence, started=self._own)

    def trial(self, row: Mapping[str, Any]) -> None:
        """Update the recorded row of a trial with `row` and write the trial's own file.

        `row` needs `trial_id`; the first row of a trial also needs `status` and `attempt`. Settings go into
        `row["hyperparameters"]`, flat with short names (`config.flatten`), because a setting is named
        `baseline`; the named baseline that a trial belongs to is `named_baseline`.
        """
        self._fence.check()
        trial_id = checked_name(row.get("trial_id", ""))
        updated, path = self._updated(self._recorded(trial_id), row), self._file(trial_id)
        before = self._own.get(trial_id, path)
        _write_rows([updated], path)
        self._rows[trial_id], self._own[trial_id] = updated, path
        if before != path:
            copies.delete(before)
        # The trial's own file is complete by now: a crash in between leaves the row twice, and reading keeps the newer.
        self._pending.remove(trial_id)

    def trials(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Update the rows of many trials; those without a file of their own share files."""
        self._fence.check()
        pending = []
        for row in rows:
            trial_id = checked_name(row.get("trial_id", ""))
            if trial_id in self._own:
                self.trial(row)
            else:
                pending.append(self._updated(self._pending.get(trial_id), row))
        self._pending.put(pending)

    def event(
        self, kind: str, message: str, *, trial_id: str | None = None, attempt: int | None = None, **details: Any
    ) -> None:
        """Record an event of the study, or of the trial named, as seen by the driver."""
        row = {"study": self._study, "trial_id": trial_id, "attempt": attempt, "kind": kind, "message": message}
        self._files.event(row, details)

    def _updated(self, before: Row, row: Mapping[str, Any]) -> Row:
        updated_at = self._clock.now(before.get("updated_at"))
        fixed = {"study": self._study, "updated_at": updated_at, "generation": self._fence.generation or None}
        return {**before, **_flat(row), **fixed}

    def _recorded(self, trial_id: str) -> Row:
        """The trial's present row, of an earlier driver, too, when this one resumes its study."""
        if trial_id in self._rows:
            return self._rows[trial_id]
        rows = reader.trial_rows(self._own[trial_id]) if trial_id in self._own else None
        return self._pending.get(trial_id) if rows is None else rows[0]

    def _file(self, trial_id: str) -> StoragePath:
        suffix = f"~g{self._fence.generation}" if self._fence.generation else ""
        return self._trials / f"{trial_id}{suffix}.parquet"


def latest_files(trials: StoragePath) -> dict[str, StoragePath]:
    """The files of trials that have one of their own; of several generations the latest."""
    names = {copies.name_of_copied(name) or name for name in trials.names()}
    matches = [match for name in names if (match := _OF_TRIAL.fullmatch(name))]
    return {match[1]: trials / match[0] for match in sorted(matches, key=lambda match: int(match[2] or 0))}


def latest_generation(study_folder: StoragePath) -> int:
    """The latest driver of a study in a store that has written a trial's state; 0 where none has."""
    names = (study_folder / "results" / "trials").names()
    return max((int(match[1]) for name in names if (match := _GENERATION.search(name))), default=0)


def repair(study_folder: Location) -> None:
    """Write the files of trials again that differ from their copies: damaged ones, or those of a change cut short."""
    folder = storage_path(study_folder) / "results" / "trials"
    names = folder.names()
    for path in [folder / name for name in sorted({copies.name_of_copied(name) or name for name in names})]:
        problems: list[str] = []
        table = reader.read_trial(path, problems) if path.name.endswith(".parquet") else None
        if problems and table is not None:
            copies.write(path, copies.read_copy(path) or path.read_bytes())


class PendingRows:
    """The rows of trials that have not started, in shared files; held by the one process that writes them."""

    def __init__(self, folder: StoragePath, fence: Fence, *, started: Mapping[str, StoragePath]) -> None:
        """Read the shared files that an earlier driver left in `folder`; those of an older generation are replaced."""
        self._folder, self._prefix = folder, _PENDING_PREFIX
        if fence.generation:
            self._prefix += f"g{fence.generation}~"
        self._files: dict[StoragePath, dict[str, Row]] = {}
        for path in [folder / name for name in folder.names() if name.startswith(_PENDING_PREFIX)]:
            rows = reader.trial_rows(path)
            if rows is None:
                continue  # a damaged file stays where it is, and reading reports it
            if not path.name.startswith(self._prefix):
                fence.check()
                self.put({**row, "generation": fence.generation} for row in rows if row["trial_id"] not in started)
                copies.delete(path)
                continue
            self._files[path] = {row["trial_id"]: row for row in rows}
            for trial_id in started.keys() & self._files[path].keys():
                self.remove(trial_id)

    def get(self, trial_id: str) -> Row:
        """The row of a pending trial; empty for any other."""
        path = self._file_of(trial_id)
        return self._files[path][trial_id] if path else {}

    def put(self, rows: Iterable[Row]) -> None:
        """Write the rows of trials; each changed file once."""
        changed = {}
        for row in rows:
            path = self._file_of(row["trial_id"]) or self._file_with_room()
            self._files[path][row["trial_id"]] = row
            changed[path] = self._files[path]
        for path, content in changed.items():
            _write_rows(content.values(), path)

    def remove(self, trial_id: str) -> None:
        """Take out the row of a trial that has a file of its own now."""
        path = self._file_of(trial_id)
        if path is None:
            return
        del self._files[path][trial_id]
        if self._files[path]:
            _write_rows(self._files[path].values(), path)
        else:
            copies.delete(path)
            del self._files[path]

    def _file_of(self, trial_id: str) -> StoragePath | None:
        return next((path for path, rows in self._files.items() if trial_id in rows), None)

    def _file_with_room(self) -> StoragePath:
        newest = next(reversed(self._files), None)
        if newest is None or len(self._files[newest]) >= _ROWS_PER_FILE:
            newest = self._folder / f"{self._prefix}{secrets.token_hex(4)}.parquet"
            self._files[newest] = {}
        return newest


def _write_rows(rows: Iterable[Row], path: StoragePath) -> None:
    copies.write(path, as_parquet(build_table("trials", rows)))


def _flat(row: Mapping[str, Any]) -> Row:
    """A trial's state and settings as columns; refuses names and statuses that the schema does not have.

    A setting that the trial's method does not read has no value: SFT has no alpha, and belongs to no group of one.
    """
    state = {key: value for key, value in row.items() if key != "hyperparameters"}
    settings = dict(row.get("hyperparameters", {}))
    setting_names, state_names = _trial_columns()
    for key in state:
        if key not in state_names:
            raise unknown("trials column", key, state_names, "Settings go under 'hyperparameters'")
    for key in settings:
        if key not in setting_names:
            raise unknown("setting", key, setting_names, "Use the short names of config.flatten")
    if state.get("status", "pending") not in schema.STATUSES:
        raise unknown("trial status", str(state["status"]), schema.STATUSES, "Use one of them")
    from ebft_study.config import unread_settings

    unread = unread_settings(str(settings.get("method")))
    return {**state, **{name: None if name in unread else value for name, value in settings.items()}}


@functools.cache
def _trial_columns() -> tuple[frozenset[str], frozenset[str]]:
    """Names of settings, and of all other columns of `trials`."""
    settings = frozenset(column.name for column in schema.hyperparameters())
    return settings, frozenset(column.name for column in schema.columns("trials")) - settings
