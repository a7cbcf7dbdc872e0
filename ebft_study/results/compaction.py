"""Merging the many small files of finished trials into one file per table."""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

from ebft_study.errors import ResultsError
from ebft_study.results import reader, schema, writer

if TYPE_CHECKING:
    import pyarrow

_WRITTEN_BY_TRIAL = re.compile(r"(?P<trial_id>.+)-a\d+-\d{6}-[0-9a-f]{8}\.parquet")
_OVER = ("finished", "stopped", "failed")


def compact(study_folder: Path) -> None:
    """Merge the files of trials that are over; every row stays, and stays readable at every moment.

    The merged file, which lists the files it replaces, is in place before the first of them is removed: a crash
    in between leaves files that the reader ignores and the next compaction removes. `trials` stays as it is, one
    file per trial, so that a trial that is started again can replace its row.
    """
    results = Path(study_folder) / "results"
    if not results.is_dir():
        raise ResultsError(f"{study_folder}: holds no results. Give the folder of a study")
    trials = reader.read_table(Path(study_folder), "trials")
    over = set(trials.loc[trials["status"].isin(_OVER), "trial_id"])
    with filelock.FileLock(results / ".compact.lock"):
        for table in schema.TABLES:
            if table != "trials":
                _compact_table(results / table, table, over)


def _compact_table(folder: Path, table: str, over: set[str]) -> None:
    import pyarrow as pa

    compacted = sorted(folder.glob("compacted-*.parquet"))
    for name in {name for path in compacted for name in reader.merged_files(path)}:
        (folder / name).unlink(missing_ok=True)
    compacted = [path for path in compacted if path.exists()]
    small = [path for path in sorted(folder.glob("*.parquet")) if _trial_of(path) in over]
    if not small:
        return
    # Damaged files stay where they are: reading reports them, and nothing here may lose a row.
    readable = {path: content for path in [*compacted, *small] if (content := _content(path, table)) is not None}
    merged = pa.concat_tables(readable.values(), promote_options="permissive")
    names = json.dumps([path.name for path in readable])
    metadata = {**schema.arrow_schema(table).metadata, reader.MERGED_FROM: names.encode()}
    target = folder / f"compacted-{secrets.token_hex(8)}.parquet"
    writer.put_in_place(merged.replace_schema_metadata(metadata), target)
    for path in readable:
        path.unlink()


def _trial_of(path: Path) -> str | None:
    match = _WRITTEN_BY_TRIAL.fullmatch(path.name)
    return match["trial_id"] if match else None


def _content(path: Path, table: str) -> pyarrow.Table | None:
    try:
        return reader.read_file(path, table)
    except ResultsError:
        return None
