"""Cache of extracted, downloaded and tokenized data, in the user's cache folder.

The key of a file covers all that its content depends on, the source of this package included. A file is written
atomically and verified by content hash when read; a damaged one is made again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.torch
import torch

from ebft_study.data.examples import Example, content_hash, digest, tests_from_json, tests_to_json
from ebft_study.errors import DataError
from ebft_study.paths import cache_folder
from ebft_study.storage import atomic_write

Facts = dict[str, Any]  # JSON values that describe the data: counts, the commit that was read
Tensors = dict[str, torch.Tensor]
Value = TypeVar("Value")

_SCHEMA = pa.schema([(name, pa.string()) for name in ("prompt", "answer", "origin", "tests")])
_UNREADABLE = (OSError, KeyError, TypeError, ValueError, pa.ArrowException, safetensors.SafetensorError)


def cached_examples(
    name: str, recipe: Mapping[str, object], extract: Callable[[], tuple[list[Example], Facts]]
) -> tuple[list[Example], Facts]:
    """Return what `extract` returns, from the cache when `recipe`, and the code of this package, are unchanged."""
    return _cached(_path(name, recipe, "parquet"), _read_examples, _write_examples, extract)


def cached_tensors(
    name: str, recipe: Mapping[str, object], make: Callable[[], tuple[Tensors, Facts]]
) -> tuple[Tensors, Facts]:
    """Return what `make` returns, from the cache when `recipe`, and the code of this package, are unchanged."""
    return _cached(_path(name, recipe, "safetensors"), _read_tensors, _write_tensors, make)


def _cached(
    path: Path,
    read: Callable[[Path], tuple[Value, Facts]],
    write: Callable[[Value, Facts, Path], None],
    make: Callable[[], tuple[Value, Facts]],
) -> tuple[Value, Facts]:
    with contextlib.suppress(*_UNREADABLE):  # missing or damaged
        return read(path)
    made = make()
    _write(path, functools.partial(write, *made))
    return made


def _path(name: str, recipe: Mapping[str, object], suffix: str) -> Path:
    key = digest(name, json.dumps(recipe, sort_keys=True), _package_source())
    return cache_folder() / "data" / f"{name}-{key[:16]}.{suffix}"


@functools.cache
def _package_source() -> str:
    folder = Path(__file__).parent
    return digest(*(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))))


def _tensors_hash(tensors: Tensors) -> str:
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(tensors[name].contiguous().numpy().data)
    return state.hexdigest()


def _read_examples(path: Path) -> tuple[list[Example], Facts]:
    table = pq.read_table(path)
    rows = table.select(_SCHEMA.names).to_pylist()
    examples = [Example(**{**row, "tests": tests_from_json(row["tests"])}) for row in rows]
    metadata = table.schema.metadata
    if metadata[b"content"] != content_hash(examples).encode():
        raise ValueError("the content is not what was written")
    return examples, json.loads(metadata[b"facts"])


def _write_examples(examples: list[Example], facts: Facts, path: Path) -> None:
    rows = [{**vars(example), "tests": tests_to_json(example.tests)} for example in examples]
    metadata = {"content": content_hash(examples), "facts": json.dumps(facts)}
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA.with_metadata(metadata)), path, compression="zstd")


def _read_tensors(path: Path) -> tuple[Tensors, Facts]:
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    if metadata["content"] != _tensors_hash(tensors):
        raise ValueError("the content is not what was written")
    return tensors, json.loads(metadata["facts"])


def _write_tensors(tensors: Tensors, facts: Facts, path: Path) -> None:
    metadata = {"content": _tensors_hash(tensors), "facts": json.dumps(facts)}
    safetensors.torch.save_file(tensors, path, metadata=metadata)


def _write(path: Path, write: Callable[[Path], None]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            write(temporary)
    except OSError as error:
        raise DataError(
            f"{path.parent}: cannot be written ({error.strerror}). Set EBFT_STUDY_CACHE to a folder that can"
        ) from None
