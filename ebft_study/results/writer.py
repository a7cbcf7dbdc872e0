"""Writing results: small immutable Parquet files, put in place whole or not at all.

Killing a writer at any moment loses at most the row being written. Names hold trial, attempt, a sequence number and a
token of the writer: no two writers ever meet in one file. The one exception to immutability is `trials`, whose single
file per trial is replaced when the trial's state changes; a copy beside it, written first, stands in for a damaged one.
Trials that have not started share files (`waiting`).
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
import secrets
import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ebft_study.errors import ResultsError
from ebft_study.results import copies, schema
from ebft_study.results.waiting import Waiting
from ebft_study.storage import Location, StoragePath, storage_path

if TYPE_CHECKING:
    import pyarrow

# A leading dot or underscore would hide a file from pandas and DuckDB; '=' would look like a partition.
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ONLY_IN_DRIVER = "driver"


class _FileSequence:
    """Unique file names of one writer: `<trial>-a<attempt>-<sequence>-<token>.parquet`."""

    def __init__(self, study_folder: Location, trial_id: str, attempt: int) -> None:
        self._results = storage_path(study_folder) / "results"
        self._prefix = f"{_checked_name(trial_id)}-a{attempt:03d}"
        self._token = secrets.token_hex(4)
        self._count = 0

    def write(self, table: str, rows: Sequence[Mapping[str, Any]]) -> str:
        """Write `rows` as the next file of `table`; returns the name without suffix."""
        name = f"{self._prefix}-{self._count:06d}-{self._token}"
        self._count += 1
        put_in_place(build_table(table, rows), self._results / table / f"{name}.parquet")
        return name

    def event(self, row: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        text = json.dumps(details, default=str, sort_keys=True) if details else None
        always = {"event_id": f"{self._prefix}-{self._count:06d}-{self._token}", "time": now(), "details": text}
        self.write("events", [{**row, **always, "host": socket.gethostname()}])


class TrialRecorder:
    """Results of one attempt of a trial; held by the process that has the numbers (rank 0)."""

    def __init__(self, study_folder: Location, *, study: str, trial_id: str, attempt: int) -> None:
        self._who = {"study": study, "trial_id": trial_id, "attempt": attempt}
        self._clock = Clock()
        self._files = _FileSequence(study_folder, trial_id, attempt)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One row of `metrics`. Several calls at one step are merged when read; unregistered names are refused."""
        for name in values:
            if name not in schema.METRICS:
                raise schema.unknown(
                    "metric", name, schema.METRICS, "Register new metrics in ebft_study/results/schema.py"
                )
        numbers = {name: float(value) for name, value in values.items()}
        self._files.write("metrics", [{**self._who, "step": step, **numbers, "written_at": self._clock.now()}])

    def evaluations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows with benchmark, metric, position (or None), value, standard_error (or None), count."""
        for row in rows:
            if row.get("metric") not in schema.EVALUATION_METRICS:
                remedy = "Register new metrics in ebft_study/results/schema.py"
                raise schema.unknown("evaluation metric", str(row.get("metric")), schema.EVALUATION_METRICS, remedy)
        self._at_step("evaluations", step, rows)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows with sequence, anchor, sample, context, completion, ground_truth and the reward's parts."""
        self._at_step("samples", step, rows)

    def event(self, kind: str, message: str, **details: Any) -> None:
        """Something happened to this trial: `kind` in one word, `message` in one sentence."""
        self._files.event({**self._who, "kind": kind, "message": message}, details)

    def _at_step(self, table: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            always = {**self._who, "step": step, "written_at": self._clock.now()}
            self._files.write(table, [{**row, **always} for row in rows])


class StudyRecorder:
    """State of a study's trials, and its events; held by the driver alone."""

    def __init__(self, study_folder: Location, *, study: str) -> None:
        self._study, self._clock = study, Clock()
        self._trials = storage_path(study_folder) / "results" / "trials"
        self._files = _FileSequence(study_folder, _ONLY_IN_DRIVER, os.getpid())
        self._rows: dict[str, dict[str, Any]] = {}
        self._waiting = Waiting(self._trials, _write_trials)

    def trial(self, row: Mapping[str, Any]) -> None:
        """Lay `row` over what is recorded of its trial and put the trial's one file in place.

        `row` needs `trial_id`; the first row of a trial also needs `status` and `attempt`. Settings go into
        `row["hyperparameters"]`, flat with short names (`config.flatten`), because a setting is named
        `baseline`; the named baseline that a trial belongs to is `named_baseline`.
        """
        trial_id = _checked_name(str(row.get("trial_id", "")))
        changes = self._checked(row)
        before = self._recorded(trial_id)
        merged = {**before, **changes, "study": self._study, "updated_at": self._clock.now(before.get("updated_at"))}
        _write_trials([merged], self._file(trial_id))
        self._rows[trial_id] = merged
        self._waiting.remove(trial_id)

    def trials(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """The same for many trials; those that have not started share files."""
        waiting = []
        there = set(self._trials.names())
        for row in rows:
            trial_id = _checked_name(str(row.get("trial_id", "")))
            if self._file(trial_id).name in there:
                self.trial(row)
                continue
            before = self._waiting.get(trial_id)
            always = {"study": self._study, "updated_at": self._clock.now(before.get("updated_at"))}
            waiting.append({**before, **self._checked(row), **always})
        self._waiting.put(waiting)

    def event(
        self, kind: str, message: str, *, trial_id: str | None = None, attempt: int | None = None, **details: Any
    ) -> None:
        """Something happened to the study, or to the trial named, as seen by the driver."""
        row = {"study": self._study, "trial_id": trial_id, "attempt": attempt, "kind": kind, "message": message}
        self._files.event(row, details)

    def _checked(self, row: Mapping[str, Any]) -> dict[str, Any]:
        state = {key: value for key, value in row.items() if key != "hyperparameters"}
        settings = dict(row.get("hyperparameters", {}))
        names, known = _trial_columns()
        for key in state:
            if key not in known:
                raise schema.unknown("trials column", key, known, "Settings go under 'hyperparameters'")
        for key in settings:
            if key not in names:
                raise schema.unknown("setting", key, names, "Use the short names of config.flatten")
        if state.get("status", "pending") not in schema.STATUSES:
            raise schema.unknown("trial status", str(state["status"]), schema.STATUSES, "Use one of them")
        return {**state, **settings}

    def _recorded(self, trial_id: str) -> dict[str, Any]:
        """What an earlier driver recorded of the trial, when this one continues its study."""
        if trial_id in self._rows:
            return self._rows[trial_id]
        from ebft_study.results import reader

        rows = reader.trial_rows(self._file(trial_id))
        return self._waiting.get(trial_id) if rows is None else rows[0]

    def _file(self, trial_id: str) -> StoragePath:
        return self._trials / f"{trial_id}.parquet"


@functools.cache
def _trial_columns() -> tuple[frozenset[str], frozenset[str]]:
    """Names of settings, and of everything else that `trials` holds."""
    settings = frozenset(column.name for column in schema.hyperparameters())
    return settings, frozenset(column.name for column in schema.columns("trials")) - settings


def _write_trials(rows: Sequence[Mapping[str, Any]], path: StoragePath) -> None:
    copies.write(path, as_parquet(build_table("trials", rows)))


def now() -> datetime.datetime:
    """The present moment in UTC."""
    return datetime.datetime.now(datetime.UTC)


class Clock:
    """Moments that always rise, whatever the machine's clock does: their order decides between rows of one key."""

    def __init__(self) -> None:
        self._last = datetime.datetime.min.replace(tzinfo=datetime.UTC)

    def now(self, after: datetime.datetime | None = None) -> datetime.datetime:
        """The present moment, but later than all before, and than `after`."""
        latest = max(self._last, after or self._last)
        self._last = max(now(), latest + datetime.timedelta(microseconds=1))
        return self._last


def build_table(table: str, rows: Sequence[Mapping[str, Any]]) -> pyarrow.Table:
    """`rows` under the schema of `table`; refuses unknown columns, absent required ones and wrong types."""
    import pyarrow as pa

    known = {column.name: column for column in schema.columns(table)}
    for row in rows:
        for key in row:
            if key not in known:
                raise schema.unknown(f"column of {table}", key, known, "See ebft_study/results/schema.py")
        missing = [name for name, column in known.items() if column.required and row.get(name) is None]
        if missing:
            raise ResultsError(f"results: a row of {table} lacks {', '.join(missing)}. Give every required column")
    arrays = []
    for field in schema.arrow_schema(table):
        values = [row.get(field.name) for row in rows]
        try:
            arrays.append(pa.array(values, type=field.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError) as error:
            raise ResultsError(
                f"results: {table}.{field.name} takes {field.type}, but got {values[0]!r} ({error})"
            ) from None
    return pa.Table.from_arrays(arrays, schema=schema.arrow_schema(table))


def put_in_place(table: pyarrow.Table, target: Location) -> None:
    """Write `table` so that a reader, or a crash at any moment, finds all of it or nothing."""
    storage_path(target).write_bytes(as_parquet(table))


def as_parquet(table: pyarrow.Table) -> bytes:
    """The bytes of a Parquet file with a checksum on every page."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue().to_pybytes())


def _checked_name(name: str) -> str:
    if not _SAFE_NAME.fullmatch(name):
        raise ResultsError(
            f"results: trial_id {name!r} cannot be a file name. "
            "Use letters, digits, '.', '_' and '-', starting with a letter or digit"
        )
    return name
