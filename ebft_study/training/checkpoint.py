"""Checkpoints on disk: written, verified before use, and chosen for removal.

A folder with tensors in safetensors files of at most `FILE_BYTES`, and `checkpoint.json` with everything else: the
step, the metrics of that step, the plain values of the state, and the hashes of all files and of itself. A half-written
or damaged checkpoint fails a hash and is skipped. Version 0.1 kept tensors and values in one file, `state.pt`.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ebft_study.errors import CheckpointError, NoFileError, StorageError
from ebft_study.storage import Location, StoragePath, storage_path
from ebft_study.storage.filesystems import FULL_SIGNS

RECORD = "checkpoint.json"
FILE_BYTES = 5 * 10**9
"""Tensors beyond this begin another file, as on the Hugging Face hub."""
_PICKLED = "state.pt"
_FULL_BYTES = 2**20

Values = Mapping[int, float]
"""Step of a checkpoint -> the objective then, NaN where it was not measured."""


def save(
    folder: Path,
    state: Mapping[str, Any],
    *,
    step: int,
    metrics: Mapping[str, float] | None = None,
    complete: Callable[[Tensor], Tensor] = Tensor.cpu,
) -> None:
    """Write a checkpoint of `step` into an existing folder.

    Args:
        state: nested dictionaries of tensors and of values that JSON has.
        metrics: the latest at that step.
        complete: gives the whole tensor on the CPU. Tensors of one file at a time are asked for, in the order of
            `tensors_of`.
    """
    values, tensors = _split(state)
    try:
        files = _write(folder, tensors, complete)
        measured = {name: value for name, value in (metrics or {}).items() if math.isfinite(value)}
        record = {"step": step, "metrics": measured, "files": files, "state": values}
        (folder / RECORD).write_text(json.dumps({**record, "sha256": _seal(record)}))
    except (OSError, safetensors.SafetensorError) as error:
        if not any(sign in str(error) for sign in FULL_SIGNS) and shutil.disk_usage(folder).free > _FULL_BYTES:
            raise
        remedy = "Free some space, or set TMPDIR, then resume the study"
        raise StorageError(f"{folder}: a checkpoint cannot be written (No space left on device). {remedy}") from error


def tensors_of(state: Mapping[str, Any]) -> Iterable[Tensor]:
    """The tensors of a state in the order in which `save` writes them."""
    return _split(state)[1].values()


def load(folder: Path, *, verify: bool = True) -> dict[str, Any]:
    """The state in a checkpoint folder on a disk.

    Args:
        verify: read all files for their hashes first; of several workers one does.

    Raises:
        CheckpointError: the folder is not a complete checkpoint.
    """
    record = _record(storage_path(folder))
    if record is None or (verify and step_of(folder) is None):
        raise CheckpointError(f"{folder}: is not a complete checkpoint. Start from an earlier one, or from scratch")
    # Mapped, not read: a worker reads only the parts that it copies, and workers of one machine share the pages.
    if _PICKLED in record["files"]:
        return torch.load(folder / _PICKLED, map_location="cpu", weights_only=True, mmap=True)  # type: ignore[no-any-return]
    state: dict[str, Any] = record["state"]
    for name in record["files"]:
        with safetensors.safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no dictionary)
                *path, leaf = key.split("/")
                node = state
                for part in path:
                    node = node[part]
                node[leaf] = file.get_tensor(key)
    return state


def step_of(folder: Location) -> int | None:
    """The step of a complete checkpoint, None for anything else. Reads all of it."""
    path = storage_path(folder)
    try:
        record = _record(path)
        complete = record is not None and all(_digest(path / name) == sha for name, sha in record["files"].items())
    except (OSError, StorageError):
        return None
    return int(record["step"]) if record and complete else None


def has_all_files(folder: Location) -> bool:
    """Whether a checkpoint's record is whole and its files are there, their content unverified."""
    path = storage_path(folder)
    try:
        record = _record(path)
        return record is not None and set(record["files"]) <= set(path.names())
    except StorageError:
        return False


def recorded(folder: Location) -> tuple[int, dict[str, float]] | None:
    """Step and metrics as recorded in a checkpoint, its tensors unverified; None without a whole record.

    Raises:
        StorageError: the record cannot be read, which says nothing about it.
    """
    record = _record(storage_path(folder))
    return (record["step"], record["metrics"]) if record else None


def _record(folder: StoragePath) -> dict[str, Any] | None:
    """The record of a checkpoint: step, metrics, files with their hashes, and state; None without a whole one."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        if "files" in record:
            return record if record.pop("sha256") == _seal(record) else None
        files = {_PICKLED: record["sha256"]}
        return {"step": int(record["step"]), "metrics": dict(record.get("metrics", {})), "files": files}
    except (FileNotFoundError, NoFileError, ValueError, KeyError, TypeError):
        return None


def _seal(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _digest(path: Path | StoragePath) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _split(state: Mapping[str, Any], above: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The values of nested dictionaries, and their tensors by path: `tensors/weights/lm_head.weight`."""
    values: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            tensors[above + key] = value
        elif isinstance(value, Mapping):
            values[key], below = _split(value, f"{above}{key}/")
            tensors |= below
        else:
            values[key] = value
    return values, tensors


def _write(folder: Path, tensors: dict[str, Tensor], complete: Callable[[Tensor], Tensor]) -> dict[str, str]:
    """Write tensors into as few files as `FILE_BYTES` allows; returns the hash of each by its name."""
    parts: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if not parts or size > room:
            parts, room = [*parts, []], FILE_BYTES
        parts[-1].append(name)
        room -= size
    files: dict[str, str] = {}
    for number, names in enumerate(parts, start=1):
        file = folder / f"state-{number:05d}-of-{len(parts):05d}.safetensors"
        safetensors.torch.save_file({name: complete(tensors[name]).contiguous() for name in names}, file)
        files[file.name] = _digest(file)
    return files


def to_keep(
    values: Values, *, newest: int, best: int = 0, every_steps: int | None = None, mode: Literal["min", "max"] = "min"
) -> set[int]:
    """The steps of the `newest` last checkpoints, of the `best` ones, and of all multiples of `every_steps`."""
    last = sorted(values)[-max(newest, 1) :]
    regular = [step for step in values if every_steps and step % every_steps == 0]
    return {*last, *ranked(values, mode)[:best], *regular}


def ranked(values: Values, mode: Literal["min", "max"]) -> list[int]:
    """Steps with a measured objective, the best first; of equals the earlier step, which took less training."""
    sign = 1.0 if mode == "min" else -1.0
    return sorted(
        (step for step in values if math.isfinite(values[step])), key=lambda step: (sign * values[step], step)
    )
