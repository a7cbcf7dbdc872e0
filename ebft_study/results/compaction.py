"""Merging the many small files of finished trials into one file per table."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING

import filelock

from ebft_study.errors import NoFileError, ResultsError
from ebft_study.results import completeness, reader, schema, writer
from ebft_study.storage import Location, StoragePath, in_parallel, storage_errors, storage_path

if TYPE_CHECKING:
    import pyarrow

_ENDED = ("finished", "stopped", "failed")


def compact(study_folder: Location) -> None:
    """Merge the files of trials that have ended; every row stays, and stays readable at every moment.

    The merged file, which lists the files it replaces, is complete before the first of them is removed: a crash
    in between leaves files that the reader ignores and the next compaction removes. `trials` stays as it is, one
    file per trial, so that a trial that is started again can replace its row. In a store, only the study's driver,
    which holds the study's lock, may compact.
    """
    results = storage_path(study_folder) / "results"
    if not results.exists():
        raise ResultsError(f"{study_folder}: holds no results. Give the folder of a study")
    trials = reader.read_table(study_folder, "trials")
    ended = set(trials.loc[trials["status"].isin(_ENDED), "trial_id"])
    with _locked(results):
        for table in schema.TABLES:
            if table != "trials":
                _compact_table(results / table, table, ended)


@contextlib.contextmanager
def _locked(results: StoragePath) -> Iterator[None]:
    if results.local is None:
        yield
        return
    lock = results.local / ".compact.lock"
    with storage_errors(results):
        lock.touch()  # the lock itself would make the folder of a study that is gone
    with filelock.FileLock(lock):
        yield


def _compact_table(folder: StoragePath, table: str, ended: set[str]) -> None:
    import pyarrow as pa

    files = [folder / name for name in folder.names() if name.endswith(".parquet") and not name.startswith(".")]
    compacted = [path for path in files if path.name.startswith(reader.COMPACTED_PREFIX)]
    replaced = {name for path in compacted for name in reader.merged_files(path)}
    leftovers = [path for path in files if path.name in replaced]
    if leftovers:  # a compaction was cut short, perhaps before it wrote the manifest
        _write_manifest(folder, [path.name for path in compacted if path.name not in replaced])
        in_parallel(lambda path: path.delete(), leftovers)
    small = [path for path in files if path.name not in replaced and writer.trial_of(path.name) in ended]
    if not small:
        return
    sources = [*(path for path in compacted if path.name not in replaced), *small]
    contents = in_parallel(lambda path: _content(path, table), sources)
    # Damaged files stay where they are: reading reports them, and nothing here may lose a row.
    readable = {path: content for path, content in zip(sources, contents, strict=True) if content is not None}
    if not readable:
        return
    merged = pa.concat_tables(readable.values(), promote_options="permissive")
    names = json.dumps([path.name for path in readable])
    writers = json.dumps(completeness.counted(readable))
    metadata = {
        **schema.arrow_schema(table).metadata,
        reader.MERGED_FROM: names.encode(),
        completeness.WRITERS: writers.encode(),
    }
    name = f"{reader.COMPACTED_PREFIX}{secrets.token_hex(8)}"
    target = writer.put_in_place(merged.replace_schema_metadata(metadata), folder, name)
    kept = [path.name for path in compacted if path.name not in replaced and path not in readable]
    _write_manifest(folder, [*kept, target.name])
    in_parallel(lambda path: path.delete(), readable)


def _write_manifest(folder: StoragePath, names: list[str]) -> None:
    (folder / reader.MANIFEST).write_bytes(json.dumps(sorted(names)).encode())


def _content(path: StoragePath, table: str) -> pyarrow.Table | None:
    try:
        return reader.read_file(path, table)
    except (NoFileError, ResultsError):
        return None
