"""Data sets in rows: local JSONL and Parquet files and the Hugging Face hub, all streamed through `datasets`.

A local file is read whole. A hub data set is read once and kept in the cache folder, so that every trial of a study
sees the same text; give `dataset_revision` to pin it. With `max_examples` only part of it is downloaded.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ebft_study.config import DataConfig
from ebft_study.data.cache import Facts, cached_examples
from ebft_study.data.examples import SPLITS, Example, TextDataset, build_dataset, digest, split_of
from ebft_study.data.presets import PRESETS, Mapped, Row, prompt_and_answer, raw_text
from ebft_study.errors import DataError, one_line
from ebft_study.paths import cache_folder

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SPLIT_NAMES = {
    "train": "train",
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "heldout"), "heldout"),
}
SHUFFLE_BUFFER = 10_000  # rows of a hub data set held in memory to mix them before the first max_examples are taken
EVALUATION_ROWS = 10_000  # rows read beyond max_examples, a tenth of which go to validation and heldout


def load_file(name: str, path: Path, config: DataConfig, preset: str | None) -> TextDataset:
    """The data set in a local .jsonl, .json or .parquet file, split by hash of content."""
    _check_file(path)
    if config.dataset_revision is not None:
        raise DataError(f"{path}: dataset_revision={config.dataset_revision!r} is for hub data sets. Remove it")
    if config.dataset_config is not None and not (preset and PRESETS[preset].config_maps_rows):
        raise DataError(f"{path}: dataset_config={config.dataset_config!r} is for hub data sets. Remove it")
    try:
        with _quiet() as datasets:
            rows = datasets.load_dataset(
                BUILDERS[path.suffix],
                data_files={"train": [str(path)]},
                split="train",
                streaming=True,
                cache_dir=str(cache_folder() / "data" / "datasets"),
            )
            examples = list(_examples("train", rows, _mapping(config, preset), str(path)))
    except DataError:
        raise
    except Exception as error:  # whatever the reader found in somebody's file
        raise DataError(f"{path}: {_damage(path, error)}") from None
    return _divided(name, examples, config, preset, {"source": str(path), "preset": preset})


def load_hub(name: str, hub_id: str, config: DataConfig, preset: str | None) -> TextDataset:
    """The hub data set `hub_id`, from the cache folder when it was read before with the same settings."""
    chosen = PRESETS[preset] if preset else None
    hub_config = chosen.hub_config(config.dataset_config or chosen.default_config) if chosen else config.dataset_config
    mapping = config.model_dump(include={"text_column", "prompt_column", "answer_column", "dataset_config"})
    recipe = {
        "hub_id": hub_id,
        "config": hub_config,
        "revision": config.dataset_revision,
        "preset": preset,
        "mapping": mapping,
        "max_examples": config.max_examples,
    }
    download = functools.partial(_download, hub_id, hub_config, config, preset)
    examples, facts = cached_examples(hub_id.replace("/", "--"), recipe, download)
    provenance = {
        "source": f"hub:{hub_id}",
        "config": hub_config,
        "preset": preset,
        **facts,
    }
    return _divided(name, examples, config, preset, provenance)


def _download(
    hub_id: str, hub_config: str | None, config: DataConfig, preset: str | None
) -> tuple[list[Example], Facts]:
    """Examples of all splits, and the commit they are from."""
    limit = None if config.max_examples is None else config.max_examples * 10 // 9 + EVALUATION_ROWS
    try:
        with _quiet() as datasets:
            import huggingface_hub

            commit = huggingface_hub.HfApi().dataset_info(hub_id, revision=config.dataset_revision, timeout=10).sha
            splits = datasets.load_dataset(hub_id, hub_config, revision=commit, streaming=True)
            return list(_rows_of_splits(splits, _mapping(config, preset), hub_id, limit)), {"commit": commit}
    except DataError:
        raise
    except Exception as error:  # network, permissions, formats: the hub client has no common base class
        raise DataError(_hub_problem(hub_id, config, error)) from None


def _rows_of_splits(splits: Mapping[str, Any], mapped: Mapped, source: str, limit: int | None) -> Iterator[Example]:
    """Examples of all splits; with a limit, of that many rows per split, mixed as far as the buffer reaches."""
    for split, rows in splits.items():
        chosen = rows if limit is None else rows.shuffle(seed=0, buffer_size=SHUFFLE_BUFFER).take(limit)
        yield from _examples(split, chosen, mapped, source)


def _examples(split: str, rows: Any, mapped: Mapped, source: str) -> Iterator[Example]:
    """An example per row, with origin "split:row"; absent texts become empty ones, which are counted and dropped."""
    for number, row in enumerate(rows):
        if number == 0:
            _check_columns(row, mapped, source)
        texts = mapped.pair({column: row.get(column) for column in mapped.columns})
        for text in texts:
            if text is not None and not isinstance(text, str):
                raise DataError(
                    f"{source}: row {number}: {' and '.join(mapped.columns)} must be text, "
                    f"but one is {type(text).__name__}. Name other columns"
                )
        yield Example(texts[0] or "", texts[1] or "", f"{split}:{number}")


def _check_columns(row: Row, mapped: Mapped, source: str) -> None:
    missing = [column for column in mapped.columns if column not in row]
    if missing:
        raise DataError(
            f"{source}: has no column {missing[0]!r}; its columns are {', '.join(row)}. "
            "Set text_column, or prompt_column and answer_column"
        )


def _mapping(config: DataConfig, preset: str | None) -> Mapped:
    """The row mapping: the preset's, the configured columns, or a column called text."""
    if preset is not None:
        return PRESETS[preset].mapped(config.dataset_config)
    if config.prompt_column is not None and config.answer_column is not None:
        return prompt_and_answer(config.prompt_column, config.answer_column)
    return raw_text(config.text_column or "text")


def _divided(
    name: str, examples: list[Example], config: DataConfig, preset: str | None, provenance: Mapping[str, object]
) -> TextDataset:
    """Examples in the data set's own splits when it has them, else split by hash of content."""
    given = {SPLIT_NAMES.get(_split_name(example)) for example in examples}
    own_splits = "train" in given and len(given - {None}) > 1
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for example in examples:
        content = digest(example.prompt, example.answer)
        if not own_splits:
            splits[split_of(content)].append(example)
            continue
        split = SPLIT_NAMES.get(_split_name(example))
        if split in ("validation", "heldout") and not {"validation", "heldout"} <= given:
            split = ("validation", "heldout")[int(content[:8], 16) % 2]  # one evaluation split serves as both
        if split is not None:
            splits[split].append(example)
    return build_dataset(
        name,
        has_answers=_mapping(config, preset).has_answers,
        splits=splits,
        provenance={**provenance, "split_by": "its own splits" if own_splits else "content"},
        max_examples=config.max_examples,
    )


def _split_name(example: Example) -> str:
    return example.origin.partition(":")[0]


# --- errors ----------------------------------------------------------------------------------------------------


def _check_file(path: Path) -> None:
    """Refuses what is not a non-empty JSONL or Parquet file, before any library stumbles over it."""
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
    """What is wrong with a file that could not be read: its first bad line, or what the reader said."""
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line) if line.strip() else {}
                except ValueError:
                    return f"line {number} is not valid JSON. Mend or remove it"
                if not isinstance(row, dict):
                    return f"line {number} is not a JSON object. Write one {{...}} per line"
    return f"cannot be read ({one_line(error)}). Mend the file, or make all rows hold the same types"


def _hub_problem(hub_id: str, config: DataConfig, error: Exception) -> str:
    kind = type(error).__name__
    if kind == "OfflineModeIsEnabled":
        return f"data set {hub_id!r}: is on the hub and HF_HUB_OFFLINE is set. Unset it, or use a local file"
    if kind == "GatedRepoError":
        return f"data set {hub_id!r}: needs permission. Accept its terms on the hub, then run 'hf auth login'"
    if kind == "RevisionNotFoundError":
        return f"data set {hub_id!r}: has no revision {config.dataset_revision!r}. Check dataset_revision"
    if kind == "RepositoryNotFoundError":
        return f"data set {hub_id!r}: is not on the hub, or is private. Check the name, or run 'hf auth login'"
    if "Connect" in kind or "Timeout" in kind or "Network" in kind:
        return f"data set {hub_id!r}: the hub cannot be reached ({one_line(error)}). Go online, or use a local file"
    if "onfig" in str(error):
        return f"data set {hub_id!r}: {one_line(error)}. Set dataset_config"
    return f"data set {hub_id!r}: cannot be read ({kind}: {one_line(error)}). Check its name, configuration and columns"


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """The `datasets` library without its log lines (errors are raised), and with progress bars on terminals only."""
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
