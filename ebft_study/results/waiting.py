"""Rows of trials that have not started: many in one file, so that a study of ten thousand is planned in seconds.

A trial leaves its file when it starts and gets one of its own (`writer.StudyRecorder`), which is in place before the
row is taken out of the shared one: a crash in between leaves the row twice, and reading keeps the newer.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ebft_study.results import copies
from ebft_study.storage import StoragePath

# No trial can be called this: '~' may not be in an identifier.
_PREFIX = "waiting~"
_ROWS = 500  # in a file: it is written again when one of them starts

Row = dict[str, Any]


class Waiting:
    """The shared files of a folder; held by the one process that writes them."""

    def __init__(self, folder: StoragePath, write: Callable[[Sequence[Row], StoragePath], None]) -> None:
        """`write` puts rows in place as a file."""
        self._folder, self._write = folder, write
        self._files: dict[StoragePath, dict[str, Row]] = {}
        self._file_of: dict[str, StoragePath] = {}
        names = folder.names()
        started = {name.removesuffix(".parquet") for name in names}
        for name in names:
            if name.startswith(_PREFIX):
                self._take_over(folder / name, started)

    def _take_over(self, path: StoragePath, started: set[str]) -> None:
        """What an earlier session left; a damaged file stays where it is, and reading reports it."""
        from ebft_study.results import reader

        rows = reader.trial_rows(path)
        if rows is None:
            return
        self._files[path] = {}
        for row in rows:
            self._put(path, row)
        for trial_id in [row["trial_id"] for row in rows]:
            if trial_id in started:
                self.remove(trial_id)

    def get(self, trial_id: str) -> Row:
        """The row of a trial; empty if it is none of these."""
        path = self._file_of.get(trial_id)
        return self._files[path][trial_id] if path else {}

    def put(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Record the rows of trials, each once."""
        touched = dict.fromkeys(
            self._put(self._file_of.get(row["trial_id"]) or self._with_room(), dict(row)) for row in rows
        )
        for path in touched:
            self._write(list(self._files[path].values()), path)

    def remove(self, trial_id: str) -> None:
        """The trial has a file of its own now."""
        path = self._file_of.pop(trial_id, None)
        if path is None:
            return
        del self._files[path][trial_id]
        if self._files[path]:
            self._write(list(self._files[path].values()), path)
        else:
            copies.copy_of(path).delete()
            path.delete()
            del self._files[path]

    def _put(self, path: StoragePath, row: Row) -> StoragePath:
        self._files[path][row["trial_id"]] = row
        self._file_of[row["trial_id"]] = path
        return path

    def _with_room(self) -> StoragePath:
        newest = next(reversed(self._files), None)
        if newest is None or len(self._files[newest]) >= _ROWS:
            newest = self._folder / f"{_PREFIX}{secrets.token_hex(4)}.parquet"
            self._files[newest] = {}
        return newest
