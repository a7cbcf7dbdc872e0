"""Tabular data sets: local JSONL and Parquet files and the Hugging Face hub, streamed with `datasets`.

A local file is read completely. A hub data set is read once and cached, so that every trial of a study sees the same
text; `dataset_revision` pins it. With `max_examples` only part of it is downloaded.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebft_study import hub
from ebft_study.data.cache import Facts, cached_examples
from ebft_study.data.examples import SPLITS, Example, TextDataset, build_dataset, digest, split_of
from ebft_study.data.presets import PRESETS, Row, RowMapping, prompt_and_answer, raw_text
from ebft_study.data.unit_tests import read_assertions
from ebft_study.errors import DataError, one_line
from ebft_study.paths import cache_folder

if TYPE_CHECKING:
    from ebft_study.config import DataConfig

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SPLIT_NAMES = {
    "train": "train",
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "heldout"), "heldout"),
}
EVALUATION_SPLITS = ("validation", "heldout")
SHUFFLE_BUFFER = 10_000  # rows of a hub data set held in memory to mix them before the first max_examples are taken
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
    try:
        with _quiet() as datasets:
            rows = datasets.load_dataset(
                BUILDERS[path.suffix],
                data_files={"train": [str(path)]},
                split="train",
                streaming=True,
                cache_dir=str(cache_folder() / "data" / "datasets"),
            )
            examples = list(_examples("train", rows, mapping, str(path)))
    except DataError:
        raise
    except Exception as error:  # any error that a user's file causes in the reader
        raise DataError(f"{path}: {_damage(path, error)}") from None
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
    if path.suffix not in BUILDERS:
        raise DataError(f"{path}: is neither .jsonl nor .parquet. Convert it to one of them")
    try:
        with path.open("rb") as file:
            beginning = file.read(4096)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check its permissions") from None
    if not beginning.strip():
        raise DataError(f"{path}: is empty. Give a file with one example per row")
    if path.suffix == ".parquet" and not beginning.startswith(b"PAR1"):
        raise DataError(f"{path}: is not a Parquet file despite its name. Give a .parquet or .jsonl file")
    if path.suffix != ".parquet" and b"\0" in beginning:
        raise DataError(f"{path}: is a binary file, not JSON lines. Give a text file with one JSON object per line")


def _damage(path: Path, error: Exception) -> str:
    """Describe why a file could not be read: its first bad line, or the reader's message."""
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line) if line.strip() else {}
                except ValueError:
                    return f"line {number} is not valid JSON. Repair or remove it"
                if not isinstance(row, dict):
                    return f"line {number} is not a JSON object. Write one {{...}} per line"
    return f"cannot be read ({one_line(error)}). Repair the file, or make all rows hold the same types"


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
