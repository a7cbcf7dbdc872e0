"""What takes long to extract, download or tokenize, kept in the user's cache folder under a key of all it depends on.

A file is put in place by an atomic rename and checked by content hash when read: a damaged one is made again.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.torch
import torch

from ebft_study.data.examples import Example, content_hash, digest
from ebft_study.errors import DataError
from ebft_study.paths import cache_folder
from ebft_study.storage import atomic_write

Facts = dict[str, Any]  # JSON values that tell about what was made: counts, the commit that was read
Tensors = dict[str, torch.Tensor]

_SCHEMA = pa.schema([(name, pa.string()) for name in ("prompt", "answer", "origin")])


def cached_examples(
    name: str, recipe: Mapping[str, object], extract: Callable[[], tuple[list[Example], Facts]]
) -> tuple[list[Example], Facts]:
    """What `extract` returns, from the cache when `recipe`, and the code of this package, are unchanged."""
    path = _path(name, recipe, "parquet")
    found = _read_examples(path)
    if found is None:
        found = extract()
        _write(path, functools.partial(_write_examples, *found))
    return found


def cached_tensors(
    name: str, recipe: Mapping[str, object], make: Callable[[], tuple[Tensors, Facts]]
) -> tuple[Tensors, Facts]:
    """What `make` returns, from the cache when `recipe`, and the code of this package, are unchanged."""
    path = _path(name, recipe, "safetensors")
    found = _read_tensors(path)
    if found is None:
        found = make()
        _write(path, functools.partial(_write_tensors, *found))
    return found


def _path(name: str, recipe: Mapping[str, object], suffix: str) -> Path:
    key = digest(name, json.dumps(recipe, sort_keys=True), _own_source())
    return cache_folder() / "data" / f"{name}-{key[:16]}.{suffix}"


@functools.cache
def _own_source() -> str:
    folder = Path(__file__).parent
    return digest(*(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))))


def _tensors_hash(tensors: Tensors) -> str:
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(tensors[name].contiguous().numpy().data)
    return state.hexdigest()


def _read_examples(path: Path) -> tuple[list[Example], Facts] | None:
    """The examples in `path`; None where there is no file, or one that is damaged."""
    try:
        table = pq.read_table(path)
        examples = [Example(**row) for row in table.select(_SCHEMA.names).to_pylist()]
        metadata = table.schema.metadata
        if metadata[b"content"] != content_hash(examples).encode():
            return None
        return examples, json.loads(metadata[b"facts"])
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException):
        return None


def _write_examples(examples: list[Example], facts: Facts, path: Path) -> None:
    columns = {name: [getattr(example, name) for example in examples] for name in _SCHEMA.names}
    metadata = {"content": content_hash(examples), "facts": json.dumps(facts)}
    pq.write_table(pa.table(columns, schema=_SCHEMA.with_metadata(metadata)), path, compression="zstd")


def _read_tensors(path: Path) -> tuple[Tensors, Facts] | None:
    """The tensors in `path`; None where there is no file, or one that is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata, names = file.metadata(), list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
        if metadata["content"] != _tensors_hash(tensors):
            return None
        return tensors, json.loads(metadata["facts"])
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError):
        return None


def _write_tensors(tensors: Tensors, facts: Facts, path: Path) -> None:
    metadata = {"content": _tensors_hash(tensors), "facts": json.dumps(facts)}
    safetensors.torch.save_file(tensors, path, metadata=metadata)


def _write(path: Path, write: Callable[[Path], None]) -> None:
    try:
        with atomic_write(path) as temporary:
            write(temporary)
    except OSError as error:
        raise DataError(
            f"{path.parent}: cannot be written ({error.strerror}). Set EBFT_STUDY_CACHE to a folder that can"
        ) from None
