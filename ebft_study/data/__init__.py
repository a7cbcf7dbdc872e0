"""Text for training and evaluation: sources, splits, tokens.

`load_text` gives a data set in three splits; `tokenize` turns one split into rows of tokens; `batch_indices` says
which rows an optimizer step uses.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from ebft_study.config import DataConfig
from ebft_study.data.builtin import SOURCES, load_builtin
from ebft_study.data.encoding import tokenize
from ebft_study.data.examples import SPLITS, Example, TextDataset
from ebft_study.data.presets import PRESETS
from ebft_study.data.tables import BUILDERS, HUB_ID, load_file, load_hub
from ebft_study.data.tokens import PADDING_DOCUMENT, Batch, TokenDataset, batch_indices
from ebft_study.errors import DataError

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
    """The data set that `config.dataset` names, in splits train, validation and heldout."""
    name = config.dataset
    known, _, location = name.partition(":")
    if known in SOURCES or known in PRESETS:
        _refuse_columns(known, config)
    if name in SOURCES:
        if config.dataset_config or config.dataset_revision:
            raise DataError(f"data set {name!r}: has no dataset_config or dataset_revision. Remove them")
        return load_builtin(name, config.max_examples)
    if known in PRESETS:
        if location:
            return load_file(name, Path(location).expanduser(), config, known)
        return load_hub(name, PRESETS[known].hub_id, config, known)
    path = Path(name).expanduser()
    if path.exists() or path.suffix in BUILDERS:
        return load_file(name, path, config, None)
    if HUB_ID.fullmatch(name):
        return load_hub(name, name, config, None)
    raise DataError(f"unknown data set {name!r}: {_suggestion(name)}")


def _refuse_columns(name: str, config: DataConfig) -> None:
    if config.text_column or config.prompt_column:
        raise DataError(
            f"data set {name!r}: has its own columns, so text_column, prompt_column and answer_column do not apply. "
            "Remove them"
        )


def _suggestion(name: str) -> str:
    known = [*SOURCES, *PRESETS]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"use {', '.join(known)}, a .jsonl or .parquet file, or a hub id 'owner/name'"
