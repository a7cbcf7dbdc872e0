"""Text for training and evaluation: `load_text` -> three splits, `tokenize` -> rows, `batch_indices` -> a batch."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from ebft_study import plugins
from ebft_study.data.builtin import SOURCES, load_builtin
from ebft_study.data.examples import SPLITS, Example, TextDataset
from ebft_study.data.imported import load_imported
from ebft_study.data.presets import PRESETS
from ebft_study.data.tables import FORMATS, HUB_ID, load_file, load_hub
from ebft_study.data.tokens import PADDING_DOCUMENT, Batch, TokenDataset, batch_indices, tokenize
from ebft_study.errors import DataError

if TYPE_CHECKING:
    from ebft_study.config import DataConfig

__all__ = [
    "PADDING_DOCUMENT",
    "SPLITS",
    "Batch",
    "Example",
    "TextDataset",
    "TokenDataset",
    "batch_indices",
    "load_text",
    "tokenize",
]


def load_text(config: DataConfig) -> TextDataset:
    """Load the data set that `config.dataset` names.

    Built-in, a preset (`preset:path` for a file), a function of the user (`package.module:name`), a file, or a hub id.
    """
    name = config.dataset
    source, _, location = name.partition(":")
    if (source in SOURCES or source in PRESETS) and (config.text_column or config.prompt_column):
        raise DataError(
            f"data set {source!r}: has its own columns, so text_column, prompt_column and answer_column do not apply. "
            "Remove them"
        )
    if name in SOURCES:
        if config.dataset_config or config.dataset_revision:
            raise DataError(f"data set {name!r}: has no dataset_config or dataset_revision. Remove them")
        return load_builtin(name, config.max_examples)
    if source in PRESETS:
        if location:
            return load_file(name, Path(location).expanduser(), config, source)
        return load_hub(name, PRESETS[source].hub_id, config, source)
    if plugins.is_path(name):
        return load_imported(config)
    path = Path(name).expanduser()
    if path.exists() or path.suffix in FORMATS:
        return load_file(name, path, config, None)
    if HUB_ID.fullmatch(name):
        return load_hub(name, name, config, None)
    names = [*SOURCES, *PRESETS]
    similar = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    remedy = f"use {', '.join(names)}, a .jsonl or .parquet file, a hub id 'owner/name', or package.module:name"
    raise DataError(f"unknown data set {name!r}: {f'did you mean {similar[0]!r}?' if similar else remedy}")
