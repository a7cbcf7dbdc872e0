"""Checkpoints on disk: written, verified before use, and chosen for removal.

A folder with `state.pt` (tensors and plain numbers, loaded with `weights_only=True`) and `checkpoint.json`, which
holds the step, the metrics of that step, and the hash of the other file. A half-written or damaged checkpoint fails
the hash and is skipped.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from ebft_study.errors import CheckpointError, StorageError
from ebft_study.storage import Location, storage_path

STATE, RECORD = "state.pt", "checkpoint.json"
_FULL_BYTES = 2**20

Values = Mapping[int, float]
"""Step of a checkpoint -> the objective then, NaN where it was not measured."""


def save(folder: Path, state: dict[str, Any], *, step: int, metrics: Mapping[str, float] | None = None) -> None:
    """Write a checkpoint of `step` into an existing folder; `metrics` are the latest at that step."""
    try:
        torch.save(state, folder / STATE)
        with (folder / STATE).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        measured = {name: value for name, value in (metrics or {}).items() if math.isfinite(value)}
        (folder / RECORD).write_text(json.dumps({"step": step, "sha256": digest, "metrics": measured}))
    except (OSError, RuntimeError) as error:  # torch has its own error for a disk that takes no more
        if shutil.disk_usage(folder).free > _FULL_BYTES:
            raise
        remedy = "Free some space, or set TMPDIR, then resume the study"
        raise StorageError(f"{folder}: a checkpoint cannot be written (No space left on device). {remedy}") from error


def load(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint folder on a disk.

    Raises:
        CheckpointError: the folder is not a complete checkpoint.
    """
    if step_of(folder) is None:
        raise CheckpointError(f"{folder}: is not a complete checkpoint. Start from an earlier one, or from scratch")
    # Mapped, not read: a worker reads only the parts that it copies, and workers of one machine share the pages.
    return torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)  # type: ignore[no-any-return]


def step_of(folder: Location) -> int | None:
    """The step of a complete checkpoint, None for anything else. Reads all of it."""
    path = storage_path(folder)
    try:
        record = json.loads((path / RECORD).read_bytes())
        with (path / STATE).open("rb") as file:
            complete = record["sha256"] == hashlib.file_digest(file, "sha256").hexdigest()
        return int(record["step"]) if complete else None
    except (OSError, StorageError, ValueError, KeyError, TypeError):
        return None


def recorded(folder: Location) -> tuple[int, dict[str, float]] | None:
    """Step and metrics as recorded in a checkpoint, unverified; None without a readable record."""
    try:
        record = json.loads((storage_path(folder) / RECORD).read_bytes())
        return int(record["step"]), dict(record.get("metrics", {}))
    except (OSError, StorageError, ValueError, KeyError, TypeError):
        return None


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
