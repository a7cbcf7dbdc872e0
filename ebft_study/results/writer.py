"""Writing results: small immutable Parquet files, written atomically.

Killing a writer at any moment loses at most the row being written. Names hold trial, attempt, a sequence number and a
token of the writer, so no two writers ever use one file; and a digest of the content, because the checksums of Parquet
cover its pages alone: a flipped bit in what describes the columns can rename one. The exception is the table `trials`
(`study_recorder`).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import secrets
import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ebft_study.errors import ResultsError
from ebft_study.results import schema
from ebft_study.results.fence import Fence, alone
from ebft_study.results.metrics import metric, unknown
from ebft_study.storage import Location, StoragePath, storage_path

if TYPE_CHECKING:
    import pyarrow

# A leading dot or underscore would hide a file from pandas and DuckDB; '=' would look like a partition.
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DIGEST = re.compile(r"-(?:[0-9a-f]{8}|[0-9a-f]{16})-([0-9a-f]{16})\.parquet")
"""The end of a name with a digest, after the token of its writer. Files of earlier versions have the token alone."""
_WRITTEN_BY_TRIAL = re.compile(r"(?P<trial_id>.+)-a\d+-\d{6}-[0-9a-f]{8}(-[0-9a-f]{16})?\.parquet")
_SMALL = 100  # rows


class TrialRecorder:
    """Results of one attempt of a trial; held by the process that has the numbers (rank 0)."""

    def __init__(
        self, study_folder: Location, *, study: str, trial_id: str, attempt: int, fence: Fence | None = None
    ) -> None:
        self._who = {"study": study, "trial_id": trial_id, "attempt": attempt}
        self._clock = Clock()
        self._files = FileSequence(study_folder, trial_id, attempt, fence)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One row of `metrics`. Several calls at one step are merged when read; unregistered names are refused."""
        for name in values:
            metric(name, "metrics")
        self._at_step("metrics", step, [{name: float(value) for name, value in values.items()}])

    def evaluations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows with benchmark, metric, position (or None), value, standard_error (or None), count."""
        for row in rows:
            metric(str(row.get("metric")), "evaluations")
        self._at_step("evaluations", step, rows)

    def scores(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows with benchmark, metric, position (or None), and the lists sequences, counts and values."""
        for row in rows:
            metric(str(row.get("metric")), "evaluations")
        self._at_step("scores", step, rows)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows with sequence, anchor, sample, context, completion, ground_truth, and the reward and its parts."""
        self._at_step("samples", step, rows)

    def event(self, kind: str, message: str, **details: Any) -> None:
        """Record an event of this trial: `kind` in one word, `message` in one sentence."""
        self._files.event({**self._who, "kind": kind, "message": message}, details)

    def _at_step(self, table: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            common = {**self._who, "step": step, "written_at": self._clock.now()}
            self._files.write(table, [{**row, **common} for row in rows])


class FileSequence:
    """The files of one writer, with unique names: `<trial>-a<attempt>-<sequence>-<token>-<digest>.parquet`."""

    def __init__(self, study_folder: Location, trial_id: str, attempt: int, fence: Fence | None = None) -> None:
        self._folder, self._fence = storage_path(study_folder), fence or alone(study_folder)
        self._prefix = f"{checked_name(trial_id)}-a{attempt:03d}"
        self._token = secrets.token_hex(4)
        self._count = 0

    def write(self, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `rows` as the next file of `table`."""
        self._fence.check()
        put_in_place(build_table(table, rows), self._folder.subfolder("results", table), self._next_name())
        self._count += 1  # of what was written: a gap is a file that is gone

    def event(self, row: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        """Write a row of `events`, identified by the name of its file."""
        text = json.dumps(details, default=str, sort_keys=True) if details else None
        common = {"event_id": self._next_name(), "time": now(), "details": text, "host": socket.gethostname()}
        self.write("events", [{**row, **common}])

    def _next_name(self) -> str:
        return f"{self._prefix}-{self._count:06d}-{self._token}"


def now() -> datetime.datetime:
    """The present moment in UTC."""
    return datetime.datetime.now(datetime.UTC)


class Clock:
    """Timestamps that always increase, even if the clock is set back: their order decides between rows of one key."""

    def __init__(self) -> None:
        self._last = datetime.datetime.min.replace(tzinfo=datetime.UTC)

    def now(self, after: datetime.datetime | None = None) -> datetime.datetime:
        """The present moment, but later than all before, and than `after`."""
        latest = max(self._last, after or self._last)
        self._last = max(now(), latest + datetime.timedelta(microseconds=1))
        return self._last


def checked_name(trial_id: object) -> str:
    """A trial's identifier; refuses one that cannot be a file name."""
    name = str(trial_id)
    if not _SAFE_NAME.fullmatch(name):
        raise ResultsError(
            f"results: trial_id {name!r} cannot be a file name. "
            "Use letters, digits, '.', '_' and '-', starting with a letter or digit"
        )
    return name


def build_table(table: str, rows: Iterable[Mapping[str, Any]]) -> pyarrow.Table:
    """`rows` under the schema of `table`; refuses unknown columns, absent required ones and wrong types."""
    import pyarrow as pa

    rows, columns = list(rows), {column.name: column for column in schema.columns(table)}
    required = [name for name, column in columns.items() if column.required]
    for row in rows:
        for key in row:
            if key not in columns:
                raise unknown(f"column of {table}", key, columns, "See ebft_study/results/schema.py")
        missing = [name for name in required if row.get(name) is None]
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


def put_in_place(table: pyarrow.Table, folder: StoragePath, name: str) -> StoragePath:
    """Write `table` as a file that is there whole or not at all; its name ends with a digest of its content."""
    content = as_parquet(table)
    target = folder / f"{name}-{digest(content)}.parquet"
    target.write_bytes(content)
    return target


def fits_name(content: bytes, name: str) -> bool | None:
    """Whether a file's content is what its name says; None where the name has no digest."""
    match = _DIGEST.search(name)
    return digest(content) == match[1] if match else None


def trial_of(name: str) -> str | None:
    """The trial that wrote the file of this name; None for any other file."""
    match = _WRITTEN_BY_TRIAL.fullmatch(name)
    return match["trial_id"] if match else None


def digest(content: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a file."""
    return hashlib.sha256(content).hexdigest()[:16]


def as_parquet(table: pyarrow.Table) -> bytes:
    """The bytes of a Parquet file with a checksum on every page.

    A file of few rows is all description: what pays in a large one (compression, dictionaries, statistics) makes it
    larger, and takes most of the time of writing and reading it. Descriptions of columns are in large ones only.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink, is_large = pa.BufferOutputStream(), table.num_rows >= _SMALL
    if not is_large:
        fields = [field.remove_metadata() for field in table.schema]
        table = pa.Table.from_arrays(table.columns, schema=pa.schema(fields, metadata=table.schema.metadata))
    pq.write_table(
        table,
        sink,
        compression="zstd" if is_large else "none",
        use_dictionary=is_large,
        write_statistics=is_large,
        write_page_checksum=True,
    )
    return bytes(sink.getvalue().to_pybytes())
