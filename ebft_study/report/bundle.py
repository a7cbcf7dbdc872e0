"""A study as one archive for a referee, and the check of such an archive.

    quickstart.zip
      MANIFEST.json           digests of all files, versions, fingerprints of data and models
      study.yaml
      results/<table>/<table>.parquet     one file per table, rows of several attempts resolved
      report.html, figures/   made of these tables
      tables/                 as LaTeX, Markdown and CSV
      notebooks/              executed ones, if there are any

An unpacked bundle is a study's folder: `ebft-study report` and `ebft_study.read_results` read it. Checkpoints are not
part of it. Texts of errors and events are searched for credentials (`results.redaction`). Equal content gives equal
bytes: the report is dated by its newest row.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from ebft_study import __version__, terminal
from ebft_study.analysis.summary import summarize
from ebft_study.config import parse_yaml
from ebft_study.errors import ConfigError, ResultsError, one_line
from ebft_study.report import collected, page
from ebft_study.report.table import FORMATS
from ebft_study.results import TABLES, Results, archive, copies, load, read_table, schema
from ebft_study.results.reader import register_metrics
from ebft_study.results.redaction import redacted
from ebft_study.results.writer import as_parquet
from ebft_study.storage import StoragePath, open_file, storage_path

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow

SPEC, REPORT = "study.yaml", "report.html"
CHECKED_FOR_CREDENTIALS = ("trials", "events")
RECORDED = ("created_at", "file", "git_revision", "versions", "provenance")
"""Parts of study.yaml that the manifest repeats."""
MAX_VALUES, MAX_TABLE_BYTES, BATCH_BYTES = 10**8, 2**32, 2**28
_NUMBER = re.compile(r"[−-]?\d+(?:\.\d+)?")
_MINUS = str.maketrans("−", "-")


def bundle(study: StoragePath, target: Path | None = None, notebooks: Sequence[Path] = ()) -> Path:
    """Write the archive of a study; returns it.

    Args:
        target: default: `<study>.zip` in the current folder.
        notebooks: executed ones, besides those that lie in the study's folder.

    Raises:
        ResultsError: a table or a notebook cannot be read.
    """
    files = {SPEC: _spec(study)}
    for table in TABLES:
        files[_parquet(table)] = _table(study, table)
    for name, content in [*_notebooks_of(study), *map(_read, notebooks)]:
        files[f"notebooks/{name}"] = _executed(name, content, study)
    with tempfile.TemporaryDirectory() as place:
        files |= _rendered(load(_laid_out(files, _folder(place, study.name))))
    spec = yaml.safe_load(files[SPEC])
    about = {name: json.loads(json.dumps(spec.get(name), default=str)) for name in RECORDED if spec.get(name)}
    content = archive.pack(files, {"study": study.name, "written_by": __version__, **about})
    chosen = target or Path(f"{study.name}.zip")
    chosen.parent.mkdir(parents=True, exist_ok=True)
    storage_path(chosen).write_bytes(content)
    return chosen


@dataclass(frozen=True)
class BundleCheck:
    """What a check found in order."""

    study: str
    n_files: int
    n_trials: int
    is_rendered: bool
    """Whether tables and report were made again and compared."""
    written_by: str

    def in_words(self) -> str:
        found = f"{self.study}: {self.n_files} files as recorded, tables of {self.n_trials} trials readable; "
        if self.is_rendered:
            return f"{found}tables and report made again from them: the same numbers"
        return (
            f"{found}tables and report not made again: written by ebft-study {self.written_by}, this is {__version__}"
        )


def check(source: Path) -> BundleCheck:
    """Verify an archive, which may come from anyone: nothing in it is executed or written but to a temporary folder.

    Raises:
        ResultsError: in one line, what is damaged.
    """
    about, files = archive.unpack(source)
    required = {SPEC, REPORT, *map(_parquet, TABLES)}
    if required - files.keys():
        raise ResultsError(f"{source}: lacks {sorted(required - files.keys())[0]!r}: it is no bundle of a study")
    _check_spec(source, files[SPEC])
    for table in TABLES:
        _check_table(source, files[_parquet(table)], table)
    name, written_by = (terminal.one_line(str(about.get(key)), 100) for key in ("study", "written_by"))
    given = {part: files[part] for part in required - {REPORT}}
    with tempfile.TemporaryDirectory() as place:
        folder = _laid_out(given, _folder(place, name))
        try:
            results = load(folder)
            again = _rendered(results) if written_by == __version__ and not results.problems else None
        except Exception as error:  # tables may hold anything that their schema allows
            what = f"{type(error).__name__}: {one_line(error)}".replace(f"{place}/", "")
            raise ResultsError(f"{source}: no report can be made of its tables ({what})") from None
    if results.problems:
        raise ResultsError(f"{source}: {results.problems[0].replace(f'{place}/', '')}")
    if again is not None:
        _compare(source, files, again)
    return BundleCheck(name, len(files) + 1, len(results.trials), again is not None, written_by)


# --- what is put in --------------------------------------------------------------------------------------------


def _spec(study: StoragePath) -> bytes:
    """study.yaml, or its copy, without credentials and without references within it."""
    try:
        record, _ = copies.read_mapping(study / SPEC)
    except FileNotFoundError:
        record = None
    if record is None:
        raise ResultsError(f"{study}: {SPEC} cannot be read. Restore it, then bundle the study")
    register_metrics(record, [])
    text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=110)
    return redacted(text).encode()


def _table(study: StoragePath, table: str) -> bytes:
    """A table as one Parquet file, without columns that hold nothing."""
    import pyarrow as pa

    problems: list[str] = []
    frame = read_table(study, table, problems)
    if problems:
        raise ResultsError(f"{problems[0]}. A bundle without these rows would show other numbers")
    if table in CHECKED_FOR_CREDENTIALS:
        frame = _without_credentials(frame)
    fields = schema.arrow_schema(table)
    kept = pa.schema([f for f in fields if not f.nullable or frame[f.name].notna().any()], metadata=fields.metadata)
    content = pa.Table.from_pandas(frame[kept.names], schema=kept, preserve_index=False)
    return as_parquet(content.replace_schema_metadata(fields.metadata))


def _without_credentials(frame: pd.DataFrame) -> pd.DataFrame:
    texts = frame.select_dtypes(include=["object", "string"]).columns
    clean = {name: frame[name].map(lambda cell: redacted(cell) if isinstance(cell, str) else cell) for name in texts}
    return frame.assign(**clean)


def _notebooks_of(study: StoragePath) -> list[tuple[str, bytes]]:
    names = [name for name in study.names() if name.endswith(".ipynb") and not name.startswith(".")]
    return [(name, (study / name).read_bytes()) for name in sorted(names)]


def _read(notebook: Path) -> tuple[str, bytes]:
    try:
        with open_file(notebook) as file:
            return notebook.name, file.read()
    except OSError as error:
        raise ResultsError(f"{notebook}: cannot be read ({one_line(error)})") from None


def _executed(name: str, content: bytes, study: StoragePath) -> bytes:
    """A notebook with outputs, without credentials; refuses one that was not executed."""
    try:
        text = content.decode()
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code" and "".join(cell["source"])]
        is_executed = all(cell["execution_count"] is not None for cell in cells)
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{name}: is no notebook ({one_line(error)})") from None
    if not is_executed:
        raise ResultsError(
            f"{name}: has cells without a result. Execute it first: EBFT_STUDY={study} jupyter execute --inplace {name}"
        )
    return redacted(text).encode()


def _rendered(results: Results) -> dict[str, bytes]:
    """Report, figures and tables to copy, made of the tables of a study; they are written into its folder."""
    study, folder = summarize(results), results.folder
    page.write_summary(study, written=_newest(results))
    files = {f"figures/{name}": (folder / "figures" / name).read_bytes() for name in (folder / "figures").names()}
    files[REPORT] = (folder / REPORT).read_bytes()
    for name, table in collected.tables(study).items():
        files |= {f"tables/{name}.{ending}": make(table).encode() for make, ending in FORMATS.values()}
    return files


def _newest(results: Results) -> str:
    """The time of the newest row of `trials`, as the date of a report that is the same whenever it is made."""
    moments = results.trials["updated_at"].dropna()
    return f"of the results of {moments.max():%Y-%m-%d %H:%M} UTC" if len(moments) else "of no results"


def _parquet(table: str) -> str:
    return f"results/{table}/{table}.parquet"


def _folder(place: str, study: str) -> Path:
    """The folder of a report: its name is that of a study without trials."""
    return Path(place) / (study if archive.is_name(study) else "study")


def _laid_out(files: Mapping[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


# --- what is checked -------------------------------------------------------------------------------------------


def _check_spec(source: Path, content: bytes) -> None:
    """Refuse what takes far more memory or time than bytes."""
    try:
        parse_yaml(content.decode(), source=f"{source}: {SPEC}")
    except (ConfigError, UnicodeDecodeError) as error:
        raise ResultsError(f"{source}: {SPEC} cannot be read ({one_line(error)})") from None


def _check_table(source: Path, content: bytes, table: str) -> None:
    """Refuse a table of another schema, and one far larger than its file, where what is repeated takes no space."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = f"{source}: {_parquet(table)}"
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        _check_schema(where, file.schema_arrow, schema.arrow_schema(table))
        groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
        chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
        is_large = sum(chunk.num_values for chunk in chunks) > MAX_VALUES
        # No text is longer than its column: batches of this many rows stay small, whatever is repeated in them.
        longest = max((chunk.total_uncompressed_size for chunk in chunks), default=0)
        batches = iter(()) if is_large else file.iter_batches(max(1, min(2**16, BATCH_BYTES // max(1, longest))))
        is_large |= any(size > MAX_TABLE_BYTES for size in itertools.accumulate(batch.nbytes for batch in batches))
    except (pa.ArrowException, OSError, OverflowError, UnicodeDecodeError) as error:
        raise ResultsError(f"{where} cannot be read as Parquet ({one_line(error)})") from None
    if is_large:
        raise ResultsError(
            f"{where} holds more than {MAX_VALUES} values or {MAX_TABLE_BYTES} bytes: too large to check"
        )


def _check_schema(where: str, found: pyarrow.Schema, declared: pyarrow.Schema) -> None:
    types = dict(zip(found.names, found.types, strict=True))
    for field in declared:
        if types.get(field.name, None if not field.nullable else field.type) != field.type:
            raise ResultsError(f"{where}: column {field.name} is {types.get(field.name, 'missing')}, not {field.type}")


def _compare(source: Path, files: Mapping[str, bytes], again: Mapping[str, bytes]) -> None:
    """Refuse tables and a report that are not those of the results; drawings are compared by nobody."""
    for part in ("tables/", REPORT):
        theirs, ours = ({name for name in each if name.startswith(part)} for each in (files, again))
        if theirs != ours:
            raise ResultsError(f"{source}: {sorted(theirs ^ ours)[0]!r} does not belong to its results, or is missing")
        for name in sorted(ours):
            line = first_difference(_text(files[name]), _text(again[name]))
            if line:
                raise ResultsError(f"{source}: {name} does not follow from its results: {line}")


def _text(content: bytes) -> str:
    """A file as text, without drawings."""
    return re.sub(r"<svg\b.*?</svg>", "", content.decode(errors="replace"), flags=re.DOTALL)


def first_difference(one: str, other: str) -> str:
    """The first line in which two texts differ, or nothing; numbers may differ by one in their last digit.

    Another processor or another version of a numeric library rounds otherwise.
    """
    lines, others = one.splitlines(), other.splitlines()
    for line, again in zip(lines, others, strict=False):
        if line != again and not _is_close(line, again):
            return f"{line.strip()[:120]!r} instead of {again.strip()[:120]!r}"
    return "" if len(lines) == len(others) else f"{len(lines)} lines instead of {len(others)}"


def _is_close(line: str, again: str) -> bool:
    if _NUMBER.split(line) != _NUMBER.split(again):
        return False
    return all(map(_is_same_number, _NUMBER.findall(line), _NUMBER.findall(again)))


def _is_same_number(one: str, other: str) -> bool:
    decimals = [len(each.partition(".")[2]) for each in (one, other)]
    difference = abs(float(one.translate(_MINUS)) - float(other.translate(_MINUS)))
    return one == other or (decimals[0] == decimals[1] > 0 and difference <= 1.01 * math.pow(10, -decimals[0]))
