"""Reading results as pandas data frames, whatever state the study's writers left them in.

A file that cannot be read is skipped and named in `Results.problems`; files of an older schema get nulls for
columns that they lack. Of a step that several attempts reported, the highest attempt wins.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from operator import truediv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebft_study.errors import NoFileError, ResultsError, one_line
from ebft_study.results import completeness, copies, schema, writer
from ebft_study.results.metrics import METRICS, Metric, register
from ebft_study.results.record import unreadable_parts
from ebft_study.storage import Location, StoragePath, absolute, in_parallel, storage_path

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow

STUDIES_FOLDER = Path("studies")
COMPACTED_PREFIX = completeness.COMPACTED_PREFIX
MANIFEST = ".compacted.json"
"""File of a table's folder with the names of its compacted files: without one of them, most of a study is gone."""
MERGED_FROM = b"merged_from"
"""Key of a compacted file's metadata: the names of the files whose rows it holds, as JSON."""

_FILES_AT_ONCE = 500
"""Files whose rows are joined while others are still to be read: a column of its own for every row takes far more."""
_KEYS = {
    "trials": ["trial_id"],
    "metrics": ["trial_id", "step"],
    "evaluations": ["trial_id", "step", "benchmark", "metric", "position"],
    "scores": ["trial_id", "step", "benchmark", "metric", "position"],
    "samples": ["trial_id", "step", "benchmark", "sequence", "anchor", "sample"],
    "events": ["event_id"],
}
"""The columns that identify a row; of rows that agree in these, the highest attempt, then the newest, is kept."""
_ORDER = ("generation", "attempt", "written_at", "updated_at", "time")
"""The columns that say which of them is the newest, in any table."""


@dataclass(frozen=True)
class Results:
    """The tables of one study. `spec` is study.yaml; `problems` names files that could not be read, and why."""

    folder: StoragePath
    spec: dict[str, Any]
    trials: pd.DataFrame
    metrics: pd.DataFrame
    evaluations: pd.DataFrame
    scores: pd.DataFrame
    samples: pd.DataFrame
    events: pd.DataFrame
    problems: list[str] = field(default_factory=list)

    def best_checkpoint(self, trial_id: str) -> StoragePath | None:
        """The folder of a trial's best checkpoint by the study's objective; None before it has one."""
        paths = self.trials.loc[self.trials["trial_id"] == trial_id, "best_checkpoint"].dropna()
        return functools.reduce(truediv, str(paths.iloc[0]).split("/"), self.folder) if len(paths) else None


def load(study: Location, *, without: Collection[str] = ()) -> Results:
    """The results of a study, given its folder, its URL or its name (then looked up in ./studies).

    Args:
        without: tables that are not needed, and stay empty.
    """
    folder = find_study(study)
    problems: list[str] = []
    spec = read_spec(folder, problems)
    register_metrics(spec, problems)
    tables = {
        table: schema.arrow_schema(table).empty_table().to_pandas()
        if table in without
        else read_table(folder, table, problems)
        for table in schema.TABLES
    }
    problems += missing_files(folder)
    if "study" in spec:  # rows that were written before a study was renamed have its name of then
        tables = {table: rows.assign(study=spec["study"]) for table, rows in tables.items()}
    return Results(folder=folder, spec=spec, problems=problems, **tables)


def register_metrics(spec: dict[str, Any], problems: list[str]) -> None:
    """The metrics of users that a study has recorded, as their plug-ins declared them: none is imported.

    Before its tables are read: their columns follow.
    """
    provenance = spec.get("provenance")
    used = provenance.get("plugins") if isinstance(provenance, dict) else None
    for path, record in (used if isinstance(used, dict) else {}).items():
        declared = record.get("metric") if isinstance(record, dict) else None
        if declared is None:
            continue
        try:
            register(Metric.of_plugin(path, **declared), is_recorded=True)
        except (ResultsError, TypeError, ValueError, KeyError) as error:
            problems.append(f"study.yaml: the metric of {path} cannot be read ({one_line(error)})")


def find_study(study: Location) -> StoragePath:
    """The folder of a study given by folder, URL or name."""
    path = storage_path(study)
    in_studies = storage_path(STUDIES_FOLDER) / str(study)
    return _first([path] if path.local is None else [path, in_studies], study, STUDIES_FOLDER)


def find_in(study: Location, storage: Location) -> StoragePath:
    """The folder of a study given by its name in a storage folder, by its own folder, or by its URL."""
    if "://" in str(study):
        return find_study(study)
    in_storage = storage_path(storage) / str(study)
    return _first([in_storage] if in_storage.local is None else [in_storage, storage_path(study)], study, storage)


def _first(candidates: list[StoragePath], study: Location, storage: Location) -> StoragePath:
    """The first of several folders that holds a study; refuses a `study` that none of them is."""
    for folder in candidates:
        if _holds_study(folder):
            return folder
    if candidates[0].local is None:
        raise ResultsError(f"{candidates[0]}: holds no study. Check the URL: it ends with the study's name")
    here = storage_path(storage)
    names = ", ".join(folder.name for folder in studies_in(here))
    hint = f"Studies there: {names}" if names else f"No studies in {absolute(here)}"
    raise ResultsError(f"{study}: is neither a study's folder nor the name of one in {storage}. {hint}")


def studies_in(storage: Location) -> list[StoragePath]:
    """The folders of all studies in a folder, by name."""
    here = storage_path(storage)
    return [here / name for name in here.names() if _holds_study(here / name)]


def _holds_study(folder: StoragePath) -> bool:
    return copies.either_exists(folder / "study.yaml") or (folder / "results").exists()


def read_spec(folder: StoragePath, problems: list[str]) -> dict[str, Any]:
    """The content of study.yaml; empty where it cannot be read, and `problems` then says why."""
    path = folder / "study.yaml"
    try:
        content, problem = copies.read_mapping(path)
    except FileNotFoundError:
        content, problem = None, f"{path}: no such file; the question and the settings of the study are unknown"
    if problem:
        problems.append(problem)
    elif content is not None and copies.is_changed(path, content):
        problems.append(f"{path}: was changed by hand since the study began; 'ebft-study status' names the changes")
    unreadable = dict(unreadable_parts(content or {}))
    problems.extend(f"{path}: {where}; it is left out. Restore it" for where in unreadable.values())
    return {key: part for key, part in (content or {}).items() if key not in unreadable}


def read_table(
    study_folder: Location, table: str, problems: list[str] | None = None, columns: Iterable[str] | None = None
) -> pd.DataFrame:
    """One table of a study, duplicates resolved; names of unreadable files are added to `problems`.

    Args:
        columns: those to read, besides the ones that identify and order rows; default: all. Many trials have a file
            each, and most of its columns are settings.
    """
    import pyarrow as pa

    folder = storage_path(study_folder) / "results" / table
    read = None if columns is None else frozenset([*columns, *_KEYS[table], *_ORDER])
    parts = _read_files(folder, table, [] if problems is None else problems, read)
    rows = pa.concat_tables(parts or [_present_schema(table, read).empty_table()], promote_options="permissive")
    frame = _resolve_duplicates(rows.to_pandas(), table)
    return _without_unread(frame) if table == "trials" and "method" in frame else frame


def _without_unread(trials: pd.DataFrame) -> pd.DataFrame:
    """Trials without values of settings that their method does not read, which earlier versions recorded."""
    from ebft_study.config import unread_settings

    for method in trials["method"].dropna().unique():
        names = [name for name in trials.columns if name in unread_settings(method)]
        rows = trials["method"] == method
        recorded = [name for name in names if trials.loc[rows, name].notna().any()]
        trials[recorded] = trials[recorded].mask(rows)
    return trials


def check_table(study_folder: Location, table: str, problems: list[str]) -> None:
    """Add the names of unreadable files of a table to `problems`, without its rows: a file of known digest is whole."""
    _read_files(storage_path(study_folder) / "results" / table, table, problems, frozenset())


def missing_files(study_folder: Location) -> list[str]:
    """Attempts of which files of results were written and are gone."""
    results = storage_path(study_folder) / "results"
    tables = [results / table for table in schema.TABLES if table != "trials"]
    return completeness.missing_files(
        results, lambda: [path for table in tables for path in visible_files(table, table.name)]
    )


def cell_value(value: Any) -> Any:
    """A cell of a table as a plain Python value: arrays become tuples, missing values None."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return tuple(value)
    return None if value != value else value


# --- files -----------------------------------------------------------------------------------------------------


def read_file(path: StoragePath, table: str, columns: frozenset[str] | None = None) -> pyarrow.Table:
    """One results file under the present schema; raises `ResultsError` when it is not one.

    Args:
        columns: those to read, default all; a file without a digest is read whole, as only reading shows its damage.
    """
    content = path.read_bytes()
    is_whole = writer.fits_name(content, path.name)
    if is_whole is False:
        raise ResultsError(f"{path}: is damaged: its content does not fit the digest in its name. Restore it")
    return _parse(content, path, table, columns if is_whole else None)


def read_trial(path: StoragePath, problems: list[str], columns: frozenset[str] | None = None) -> pyarrow.Table | None:
    """A file of `trials`, or its copy where they differ; None where neither can be read.

    Damage to either is named in `problems`.
    """
    content, problem, is_whole = copies.read_verified(path)
    try:
        table = None if content is None else _parse(content, path, "trials", columns if is_whole else None)
    except ResultsError as error:
        table, problem = None, str(error)
    if problem:
        problems.append(problem)
    return table


def trial_rows(path: StoragePath) -> list[dict[str, Any]] | None:
    """The rows of a file of `trials`, without columns that the schema does not have; None where it cannot be read."""
    content = read_trial(path, [])
    if content is None:
        return None
    names = {column.name for column in schema.columns("trials")}
    return [{key: value for key, value in row.items() if key in names} for row in content.to_pylist()]


def merged_files(path: StoragePath) -> set[str]:
    """Names of the files whose rows are all in the compacted file `path`; empty for any other file."""
    try:
        return set(json.loads(completeness.metadata(path).get(MERGED_FROM, b"[]")))
    except (ValueError, TypeError):
        return set()


def _read_files(
    folder: StoragePath, table: str, problems: list[str], columns: frozenset[str] | None
) -> list[pyarrow.Table]:
    """The rows of all readable files; starts over when a compaction removes files meanwhile."""
    for _ in range(20):
        new_problems = _missing(folder)
        try_file = functools.partial(_try_file, table=table, problems=new_problems, columns=columns)
        files = visible_files(folder, table)
        try:
            groups = (files[start : start + _FILES_AT_ONCE] for start in range(0, len(files), _FILES_AT_ONCE))
            parts = [joined for group in groups for joined in _joined(in_parallel(try_file, group))]
        except FileNotFoundError:
            continue
        problems.extend(sorted(new_problems))
        return parts
    raise ResultsError(f"{folder}: files keep disappearing while they are read. Try again when the study is idle")


def _joined(parts: Iterable[pyarrow.Table | None]) -> list[pyarrow.Table]:
    """The rows of some files as one table, in one piece; nothing for none."""
    import pyarrow as pa

    tables = [part for part in parts if part is not None]
    return tables if len(tables) < 2 else [pa.concat_tables(tables, promote_options="permissive").combine_chunks()]


def visible_files(folder: StoragePath, table: str) -> list[StoragePath]:
    """Files of a table that exist, and are not contained in a compacted one."""
    names = folder.names()
    if table == "trials":
        names = sorted({copies.name_of_copied(name) or name for name in names})
    names = [name for name in names if not name.startswith((".", "_"))]
    compacted = [folder / name for name in names if name.startswith(COMPACTED_PREFIX)]
    merged = {name for path in compacted for name in merged_files(path)}
    return [folder / name for name in names if name not in merged]


def _missing(folder: StoragePath) -> list[str]:
    """Problems with compacted files that should be there; what a compaction replaces meanwhile is there again."""
    problems: list[str] = []
    for _ in range(3):
        try:
            expected = json.loads((folder / MANIFEST).read_bytes())
            gone = set(expected if isinstance(expected, list) else [expected]) - set(folder.names())
            problems = [
                f"{folder / name}: is missing, and with it the rows of ended trials. Restore it"
                for name in sorted(gone)
            ]
        except FileNotFoundError:
            return []
        except (NoFileError, ValueError, TypeError, RecursionError):
            return [f"{folder / MANIFEST}: cannot be read. The next compaction writes it again"]
        if not problems:
            break
    return problems


def _try_file(
    path: StoragePath, table: str, problems: list[str], columns: frozenset[str] | None
) -> pyarrow.Table | None:
    if table == "trials":
        named: list[str] = []
        content = read_trial(path, named, columns)
        if content is None and not named:
            raise FileNotFoundError(path)  # its rows are in another file by now
        problems.extend(named)
        return content
    try:
        return read_file(path, table, columns)
    except (NoFileError, ResultsError) as error:
        problems.append(str(error))
        return None


def _parse(stored: bytes, path: StoragePath, table: str, columns: frozenset[str] | None) -> pyarrow.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # For files this small, threads and reading ahead only cost.
        file = pq.ParquetFile(pa.BufferReader(stored), page_checksum_verification=True, pre_buffer=False)
        content = file.read(None if columns is None else _present_schema(table, columns).names, use_threads=False)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path}: cannot be read as Parquet ({one_line(error)}). Remove or restore it") from None
    metadata = content.schema.metadata or {}
    if b"schema_version" not in metadata or metadata.get(b"table", table.encode()) != table.encode():
        raise ResultsError(f"{path}: is not a file of the table {table!r}. Move it out of the results folder")
    try:
        return to_present_schema(content, table, columns)
    except pa.ArrowException as error:
        raise ResultsError(f"{path}: does not fit the table {table!r} ({one_line(error)}). Remove it") from None


def _present_schema(table: str, columns: frozenset[str] | None) -> pyarrow.Schema:
    """The schema of a table, or of some of its columns."""
    return _some_of(table, columns, tuple(METRICS))


@functools.cache
def _some_of(table: str, columns: frozenset[str] | None, _metrics: tuple[str, ...]) -> pyarrow.Schema:
    import pyarrow as pa

    whole = schema.arrow_schema(table)
    return whole if columns is None else pa.schema([f for f in whole if f.name in columns], metadata=whole.metadata)


def to_present_schema(content: pyarrow.Table, table: str, columns: frozenset[str] | None = None) -> pyarrow.Table:
    """Columns of the schema (or of `columns`) cast to today's type, absent ones null.

    Others are kept: they are someone's data, or of a file that was read whole.
    """
    import pyarrow as pa

    present = _present_schema(table, columns)
    if content.schema.equals(present):
        return content
    by_name, known = dict(zip(content.column_names, content.columns, strict=True)), set(present.names)
    cast = [by_name[f.name].cast(f.type) if f.name in by_name else pa.nulls(content.num_rows, f.type) for f in present]
    extra = [name for name in content.column_names if name not in known]
    nullable = [f.with_nullable(True) for f in present] + [content.schema.field(name) for name in extra]
    return pa.Table.from_arrays(cast + [content[name] for name in extra], schema=pa.schema(nullable))


def _resolve_duplicates(frame: pd.DataFrame, table: str) -> pd.DataFrame:
    """One row per key. Rows of `metrics` at one step complete each other: a later non-null value wins."""
    keys = _KEYS[table]
    order = ["time"] if table == "events" else keys
    if order == keys and not frame.duplicated(keys).any():
        rows = frame[keys].sort_values(keys, kind="stable").index
        return frame if rows.is_monotonic_increasing else frame.take(rows.to_numpy()).reset_index(drop=True)
    newness = [name for name in _ORDER if name in frame.columns]
    ordered = frame.sort_values(newness, kind="stable", na_position="first")
    if table == "metrics" and ordered.duplicated(keys).any():
        ordered = ordered.groupby(keys, sort=False, as_index=False).last()[list(frame.columns)]
    newest = ordered.drop_duplicates(keys, keep="last")
    return newest.sort_values(order, kind="stable").reset_index(drop=True)
