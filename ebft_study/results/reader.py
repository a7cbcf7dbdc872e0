"""Reading results as pandas data frames, whatever state the study's writers left them in.

A file that cannot be read is skipped and named in `Results.problems`; files of an older schema get nulls for
columns that they lack. Of a step that several attempts reported, the highest attempt wins.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ebft_study.errors import ResultsError
from ebft_study.results import schema

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow

STUDIES_FOLDER = Path("studies")
MERGED_FROM = b"merged_from"

# What identifies a row; of rows that agree in these, the one of the highest attempt, then the newest, is kept.
_KEYS = {
    "trials": ["trial_id"],
    "metrics": ["trial_id", "step"],
    "evaluations": ["trial_id", "step", "benchmark", "metric", "position"],
    "samples": ["trial_id", "step", "sequence", "anchor", "sample"],
    "events": ["event_id"],
}


@dataclass(frozen=True)
class Results:
    """The tables of one study. `spec` is study.yaml; `problems` names files that could not be read, and why."""

    folder: Path
    spec: dict[str, Any]
    trials: pd.DataFrame
    metrics: pd.DataFrame
    evaluations: pd.DataFrame
    samples: pd.DataFrame
    events: pd.DataFrame
    problems: list[str] = field(default_factory=list)


def load(study: str | Path) -> Results:
    """The results of a study, given its folder or its name (then looked up in ./studies)."""
    folder = find_study(study)
    problems: list[str] = []
    spec = _read_spec(folder, problems)
    tables = {table: read_table(folder, table, problems) for table in schema.TABLES}
    return Results(folder=folder, spec=spec, problems=problems, **tables)


def find_study(study: str | Path) -> Path:
    """The folder of a study given by folder or name."""
    for folder in (Path(study), STUDIES_FOLDER / study):
        if (folder / "study.yaml").is_file() or (folder / "results").is_dir():
            return folder
    known = sorted(path.parent.name for path in STUDIES_FOLDER.glob("*/study.yaml"))
    there = f"Studies here: {', '.join(known)}" if known else f"No studies in {STUDIES_FOLDER.resolve()}"
    raise ResultsError(f"{study}: is neither a study's folder nor the name of one in ./{STUDIES_FOLDER}. {there}")


def read_table(study_folder: Path, table: str, problems: list[str] | None = None) -> pd.DataFrame:
    """One table of a study, duplicates resolved; names of unreadable files are added to `problems`."""
    import pyarrow as pa

    noted: list[str] = []
    parts = _read_files(Path(study_folder) / "results" / table, table, noted)
    if problems is not None:
        problems.extend(noted)
    empty = schema.arrow_schema(table).empty_table()
    together = pa.concat_tables([empty, *parts], promote_options="permissive")
    return _resolve_duplicates(together.to_pandas(), table)


def read_file(path: Path, table: str) -> pyarrow.Table:
    """One results file under the present schema; raises `ResultsError` when it is not one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        content = pq.ParquetFile(path).read(use_threads=False)  # for files this small, threads only cost
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ResultsError(f"{path}: cannot be read as Parquet ({_one_line(error)}). Remove or restore it") from None
    metadata = content.schema.metadata or {}
    if b"schema_version" not in metadata or metadata.get(b"table", table.encode()) != table.encode():
        raise ResultsError(f"{path}: is not a file of the table {table!r}. Move it out of the results folder")
    try:
        return _to_present_schema(content, table)
    except pa.ArrowException as error:
        raise ResultsError(f"{path}: does not fit the table {table!r} ({_one_line(error)}). Remove it") from None


def merged_files(path: Path) -> set[str]:
    """Names of the files whose rows are all in the compacted file `path`; empty for any other file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (pa.ArrowException, OSError):
        return set()
    return set(json.loads(metadata.get(MERGED_FROM, b"[]")))


def _read_files(folder: Path, table: str, problems: list[str]) -> list[pyarrow.Table]:
    """All readable files; starts over when a compaction takes files away meanwhile."""
    for _ in range(20):
        noted: list[str] = []
        try:
            parts = [part for path in _visible(folder) if (part := _try_file(path, table, noted)) is not None]
        except FileNotFoundError:
            continue
        problems.extend(noted)
        return parts
    raise ResultsError(f"{folder}: files keep disappearing while they are read. Try again when the study is idle")


def _visible(folder: Path) -> list[Path]:
    """Files of a table that are in place, and not already contained in a compacted one."""
    paths = sorted(p for p in folder.glob("*") if p.is_file() and not p.name.startswith((".", "_")))
    merged = {name for path in paths if path.name.startswith("compacted-") for name in merged_files(path)}
    return [path for path in paths if path.name not in merged]


def _try_file(path: Path, table: str, problems: list[str]) -> pyarrow.Table | None:
    try:
        return read_file(path, table)
    except ResultsError as error:
        problems.append(str(error))
        return None


def _to_present_schema(content: pyarrow.Table, table: str) -> pyarrow.Table:
    """Known columns cast to today's type, absent ones null, others kept: they are someone's data."""
    import pyarrow as pa

    present = schema.arrow_schema(table)
    if content.schema.equals(present):
        return content
    known = [
        content[f.name].cast(f.type) if f.name in content.column_names else pa.nulls(content.num_rows, f.type)
        for f in present
    ]
    extra = [name for name in content.column_names if name not in present.names]
    nullable = [f.with_nullable(True) for f in present] + [content.schema.field(name) for name in extra]
    return pa.Table.from_arrays(known + [content[name] for name in extra], schema=pa.schema(nullable))


def _resolve_duplicates(frame: pd.DataFrame, table: str) -> pd.DataFrame:
    """One row per key. Rows of `metrics` at one step complete each other: a later non-null value wins."""
    keys = _KEYS[table]
    newest = next(name for name in ("written_at", "updated_at", "time") if name in frame.columns)
    ordered = frame.sort_values(["attempt", newest], kind="stable", na_position="first")
    if table == "metrics" and ordered.duplicated(keys).any():
        ordered = ordered.groupby(keys, sort=False, as_index=False).last()[list(frame.columns)]
    kept = ordered.drop_duplicates(keys, keep="last")
    order = ["time"] if table == "events" else keys
    return kept.sort_values(order, kind="stable").reset_index(drop=True)


def _read_spec(folder: Path, problems: list[str]) -> dict[str, Any]:
    path = folder / "study.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path}: no such file; what was asked and run is unknown")
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"{path}: cannot be read ({_one_line(error)})")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path}: holds {type(content).__name__}, not a mapping")
        return {}
    return content


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
