"""All studies of a storage folder as one DuckDB database: questions across studies are one query.

    ebft_study.catalog("studies").sql("SELECT study, trial_id FROM trials WHERE method = 'ebft' AND alpha = 1")

Its views hold what `reader.read_table` returns for each study, so they mean the same: one row per trial, step or
measurement, of the highest attempt, under the present schema.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING

from ebft_study.errors import ResultsError
from ebft_study.results import reader, schema
from ebft_study.storage import Location, StoragePath, in_parallel

if TYPE_CHECKING:
    import duckdb
    import pandas as pd
    import pyarrow


def catalog(storage: Location) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with the tables of all studies in a folder, read now: a view for each, and `problems`.

    In every view `study` is the name of the study's folder, so a copy of a study is another study. Trials are unique by
    (study, trial_id). Columns that a study lacks are NULL, as are values that are not a number; times are UTC.
    `problems` names the files that could not be read; a warning says how many there are.

    Args:
        storage: a folder or a URL (`s3://bucket/studies`) that holds studies.

    Raises:
        ResultsError: it holds none.
    """
    import duckdb
    import pyarrow as pa

    folders = reader.studies_in(storage)
    if not folders:
        raise ResultsError(f"{storage}: holds no studies. Give the folder whose subfolders they are")
    problems: list[dict[str, str]] = []
    connection = duckdb.connect()
    for table in schema.TABLES:
        of_studies = in_parallel(functools.partial(_content, table=table, problems=problems), folders)
        connection.register(table, pa.concat_tables(of_studies, promote_options="permissive"))
    fields = pa.schema([("study", pa.string()), ("problem", pa.string())])
    connection.register("problems", pa.Table.from_pylist(problems, schema=fields))
    if problems:
        message = f"{storage}: {len(problems)} files could not be read and are missing from the catalog; see its view"
        warnings.warn(f"{message} 'problems'", stacklevel=2)
    return connection


def _content(folder: StoragePath, table: str, problems: list[dict[str, str]]) -> pyarrow.Table:
    """One table of a study, under the present schema and the name of its folder."""
    messages: list[str] = []
    frame = reader.read_table(folder, table, messages)
    problems += ({"study": folder.name, "problem": message} for message in messages)
    return _typed(frame.assign(study=folder.name), table)


def _typed(frame: pd.DataFrame, table: str) -> pyarrow.Table:
    """The frame with the types of the schema: pandas has whole numbers with gaps as floats, and no type for gaps.

    Times have no time zone, which DuckDB could hand over only with a package of its own; all are UTC.
    """
    import pyarrow as pa

    content = reader.to_present_schema(pa.Table.from_pandas(frame, preserve_index=False), table)
    naive = [f.with_type(pa.timestamp("us")) if pa.types.is_timestamp(f.type) else f for f in content.schema]
    return content.cast(pa.schema(naive))
