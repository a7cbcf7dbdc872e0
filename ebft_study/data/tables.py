"""Tabular data sets: local JSONL and Parquet files, and the Hugging Face hub, streamed with `datasets`.

A local file is read completely, JSON by Python's own parser: that of pyarrow, which `datasets` uses, ends the process
on some files. A hub data set is read once and cached, so that every trial of a study sees the same
text; `dataset_revision` pins it. With `max_examples` only part of it is downloaded.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebft_study import hub
from ebft_study.data.cache import Facts, cached_examples
from ebft_study.data.examples import SPLITS, Example, TextDataset, build_dataset, digest, split_of
from ebft_study.data.presets import PRESETS, Row, RowMapping, prompt_and_answer, raw_text
from ebft_study.data.unit_tests import read_assertions
from ebft_study.errors import DataError, one_line
from ebft_study.storage import open_file

if TYPE_CHECKING:
    from ebft_study.config import DataConfig

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SPLIT_NAMES = {
    "train": "train",
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "heldout"), "heldout"),
}
EVALUATION_SPLITS = ("validation", "heldout")
SHUFFLE_BUFFER = 10_000  # rows of a hub data set held in memory to mix them before the first max_examples are taken
ROWS_PER_BATCH = 1000
EVALUATION_ROWS = 10_000  # rows read beyond max_examples, a tenth of which go to validation and heldout
HUB_PROBLEMS = {
    "OfflineModeIsEnabled": "the hub does not answer, or HF_HUB_OFFLINE is set. Go online, or use a local file",
    "GatedRepoError": "needs permission. Accept its terms on the hub, then run 'hf auth login'",
    "RevisionNotFoundError": "has no revision {revision!r}. Check dataset_revision",
    "RepositoryNotFoundError": "is not on the hub, or is private. Check the name, or run 'hf auth login'",
}


def load_file(name: str, path: Path, config: DataConfig, preset: str | None) -> TextDataset:
    """Load a local .jsonl, .json or .parquet file, split by hash of content."""
    _check_file(path)
    applies = {"dataset_revision": False, "dataset_config": bool(preset and PRESETS[preset].config_maps_rows)}
    for key, is_used in applies.items():
        value = getattr(config, key)
        if value is not None and not is_used:
            raise DataError(f"{path}: {key}={value!r} is for hub data sets. Remove it")
    mapping = _row_mapping(config, preset)
    wanted = {*mapping.columns, *([mapping.tests_column] if mapping.tests_column else [])}
    try:
        rows = FORMATS[path.suffix](path, wanted)
        examples = list(_examples("train", rows, mapping, str(path)))
    except DataError:
        raise
    except Exception as error:  # any error that a user's file causes in the reader
        raise DataError(f"{path}: cannot be read ({one_line(error)}). Repair the file, or write it again") from None
    return _split(name, examples, config, mapping, {"source": str(path), "preset": preset})


def load_hub(name: str, hub_id: str, config: DataConfig, preset: str | None) -> TextDataset:
    """Load the hub data set `hub_id`, from the cache folder when it was read before with the same settings."""
    hub_config = PRESETS[preset].hub_config(config.dataset_config) if preset else config.dataset_config
    mapping = _row_mapping(config, preset)
    recipe = {
        "hub_id": hub_id,
        "config": hub_config,
        "revision": config.dataset_revision,
        "preset": preset,
        "mapping": config.model_dump(include={"text_column", "prompt_column", "answer_column", "dataset_config"}),
        "max_examples": config.max_examples,
    }
    download = functools.partial(_download, hub_id, hub_config, config, mapping)
    examples, facts = cached_examples(hub_id.replace("/", "--"), recipe, download)
    provenance = {"source": f"hub:{hub_id}", "config": hub_config, "preset": preset, **facts}
    return _split(name, examples, config, mapping, provenance)


def _download(
    hub_id: str, hub_config: str | None, config: DataConfig, mapping: RowMapping
) -> tuple[list[Example], Facts]:
    """Read examples of all splits at one commit; with `max_examples`, a mixed part of each split."""
    limit = None if config.max_examples is None else config.max_examples * 10 // 9 + EVALUATION_ROWS
    examples: list[Example] = []
    try:
        with _quiet() as datasets:
            import huggingface_hub

            hub.settle()
            commit = huggingface_hub.HfApi().dataset_info(hub_id, revision=config.dataset_revision, timeout=10).sha
            splits = datasets.load_dataset(hub_id, hub_config, revision=commit, streaming=True)
            for split, rows in splits.items():
                if limit is not None:
                    rows = rows.shuffle(seed=0, buffer_size=SHUFFLE_BUFFER).take(limit)
                examples += _examples(split, rows, mapping, hub_id)
    except DataError:
        raise
    except Exception as error:  # network, permissions, formats: the hub client has no common base class
        raise DataError(f"data set {hub_id!r}: {_hub_problem(config.dataset_revision, error)}") from None
    return examples, {"commit": commit}


def read_hub(hub_id: str, hub_config: str | None) -> list[Row]:
    """All rows of a small data set on the hub, its splits one after the other; the hub's client caches its files."""
    try:
        with _quiet() as datasets:
            hub.settle()
            splits = datasets.load_dataset(hub_id, hub_config)
            return [row for rows in splits.values() for row in rows]
    except Exception as error:  # network, permissions, formats: the hub client has no common base class
        raise DataError(f"data set {hub_id!r}: {_hub_problem(None, error)}") from None


def _row_mapping(config: DataConfig, preset: str | None) -> RowMapping:
    """Choose the row mapping: the preset's, the configured columns, or a column called text."""
    if preset is not None:
        return PRESETS[preset].mapping(config.dataset_config)
    if config.prompt_column is not None and config.answer_column is not None:
        return prompt_and_answer(config.prompt_column, config.answer_column)
    return raw_text(config.text_column or "text")


def _examples(split: str, rows: Iterable[Row], mapping: RowMapping, source: str) -> Iterator[Example]:
    """Yield an example per row, with origin "split:row"; an absent text becomes empty, and is dropped later."""
    for number, row in enumerate(rows):
        missing = [column for column in mapping.columns if number == 0 and column not in row]
        if missing:
            raise DataError(
                f"{source}: has no column {missing[0]!r}; its columns are {', '.join(row)}. "
                "Set text_column, or prompt_column and answer_column"
            )
        prompt, answer = mapping.pair({column: row.get(column) for column in mapping.columns})
        for text in (prompt, answer):
            if text is not None and not isinstance(text, str):
                raise DataError(
                    f"{source}: row {number}: {' and '.join(mapping.columns)} must be text, "
                    f"but one is {type(text).__name__}. Name other columns"
                )
        try:
            tests = read_assertions(row.get(mapping.tests_column), answer) if mapping.tests_column else None
        except ValueError as error:
            raise DataError(
                f"{source}: row {number}: column {mapping.tests_column!r} {error}. Repair or remove it"
            ) from None
        yield Example(prompt or "", answer or "", f"{split}:{number}", tests)


def _split(
    name: str, examples: list[Example], config: DataConfig, mapping: RowMapping, provenance: Mapping[str, object]
) -> TextDataset:
    """Build a data set with the source's splits if it has training and evaluation data, else split by content hash."""
    source_splits = [SPLIT_NAMES.get(example.origin.partition(":")[0]) for example in examples]
    available = set(source_splits) - {None}
    is_split = "train" in available and len(available) > 1
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for example, split in zip(examples, source_splits, strict=True):
        content = digest(example.prompt, example.answer)
        if not is_split:
            split = split_of(content)
        elif split in EVALUATION_SPLITS and not available.issuperset(EVALUATION_SPLITS):
            split = EVALUATION_SPLITS[int(content[:8], 16) % 2]  # one evaluation split serves as both
        if split is not None:
            splits[split].append(example)
    return build_dataset(
        name,
        has_answers=mapping.has_answers,
        splits=splits,
        provenance={**provenance, "split_by": "its own splits" if is_split else "content"},
        max_examples=config.max_examples,
    )


def _check_file(path: Path) -> None:
    """Refuse a file that is empty or neither JSONL nor Parquet before a library fails on it."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder. Give one .jsonl or .parquet file")
    if not path.exists():
        raise DataError(f"{path}: no such file. Check the path")
    if path.suffix not in FORMATS:
        raise DataError(f"{path}: is neither .jsonl nor .parquet. Convert it to one of them")
    try:
        with open_file(path) as file:
            beginning = file.read(4096)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check its permissions") from None
    if not beginning.strip():
        raise DataError(f"{path}: is empty. Give a file with one example per row")
    if path.suffix == ".parquet" and not beginning.startswith(b"PAR1"):
        raise DataError(f"{path}: is not a Parquet file despite its name. Give a .parquet or .jsonl file")
    if path.suffix != ".parquet" and b"\0" in beginning:
        raise DataError(f"{path}: is a binary file, not JSON lines. Give a text file with one JSON object per line")


def _json_rows(path: Path, wanted: Collection[str]) -> list[Row]:
    """The `wanted` columns of all rows; the first one has every column of the file."""
    rows, names = list[dict[str, Any]](), dict[str, None]()
    for where, text in _json_texts(path):
        try:
            parsed = json.loads(text, object_pairs_hook=_without_repetition)
            if "\\u" in text:  # a half of a surrogate pair is no text
                json.dumps(parsed, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            problem = error if isinstance(error, _RepeatedKeyError) else "is not valid JSON"
            if isinstance(error, RecursionError):
                problem = "is nested too deeply"
            raise DataError(f"{path}: {where}{problem}. Repair or remove it") from None
        for row in parsed if isinstance(parsed, list) and not where else [parsed]:
            if not isinstance(row, dict):
                raise DataError(f"{path}: {where}is not a JSON object. Write one {{...}} per line")
            names |= dict.fromkeys(row)
            rows.append({name: row[name] for name in wanted if name in row})
    return [{**dict.fromkeys(names), **row} if number == 0 else row for number, row in enumerate(rows)]


def _json_texts(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a file that are not blank, with their numbers in words; one text, if it is a single list."""
    with path.open("rb") as file:
        lines = enumerate(file, start=1)
        for number, line in lines:
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.lstrip().startswith("[") and number == 1:
                    yield "", text + file.read().decode()
                    return
            except UnicodeDecodeError:
                raise DataError(f"{path}: line {number} is not UTF-8. Write the file in UTF-8") from None
            if text.strip():
                yield f"line {number} ", text


class _RepeatedKeyError(ValueError):
    """A JSON object has a key twice, and only one could count."""


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise _RepeatedKeyError(f"has {repeated!r} twice")
    return mapping


def _parquet_rows(path: Path, wanted: Collection[str]) -> Iterator[Row]:
    """The `wanted` columns of all rows; the first one has every column of the file."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        names = file.schema_arrow.names
        for name in wanted:
            if names.count(name) > 1:
                raise DataError(f"{path}: has {names.count(name)} columns {name!r}. Rename or remove all but one")
        columns = dict.fromkeys(names)
        for batch in file.iter_batches(ROWS_PER_BATCH, columns=[name for name in names if name in wanted]):
            for row in batch.to_pylist():
                yield {**columns, **row}
                columns = {}


FORMATS: dict[str, Callable[[Path, Collection[str]], Iterable[Row]]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
}
"""Ending of a file -> its reader."""


def _hub_problem(revision: str | None, error: Exception) -> str:
    kind, text = type(error).__name__, one_line(error)
    if kind in HUB_PROBLEMS:
        return HUB_PROBLEMS[kind].format(revision=revision)
    if any(word in kind for word in ("Connect", "Timeout", "Network")):
        return f"the hub cannot be reached ({text}). Go online, or use a local file"
    if "onfig" in str(error):
        return f"{text}. Set dataset_config"
    return f"cannot be read ({kind}: {text}). Check its name, configuration and columns"


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Import `datasets` without its log lines (errors are raised), and with progress bars on terminals only."""
    import datasets

    verbosity, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
