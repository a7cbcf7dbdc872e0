"""Checkpoints: everything that the rest of a run depends on, verified before use.

A folder with `state.pt` (tensors and plain numbers, loaded with `weights_only=True`) and `checkpoint.json`, which
holds the step and the hash of the other file. A half-written or damaged checkpoint fails the hash and is passed over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ebft_study.errors import CheckpointError

STATE, RECORD = "state.pt", "checkpoint.json"


def save(folder: Path, state: dict[str, Any], *, step: int) -> None:
    """Write a checkpoint of `step` into an existing folder."""
    torch.save(state, folder / STATE)
    record = {"step": step, "sha256": _hash(folder / STATE)}
    (folder / RECORD).write_text(json.dumps(record))


def load(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint folder.

    Raises:
        CheckpointError: the folder is not a complete checkpoint.
    """
    if step_of(folder) is None:
        raise CheckpointError(f"{folder}: is not a complete checkpoint. Start from an earlier one, or from scratch")
    # Mapped, not read: a worker touches only what it copies, and workers of one machine share the pages.
    return torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)  # type: ignore[no-any-return]


def step_of(folder: Path) -> int | None:
    """The step of a complete checkpoint, None for anything else."""
    try:
        record = json.loads((folder / RECORD).read_text())
        complete = record["sha256"] == _hash(folder / STATE)
        return int(record["step"]) if complete else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def newest(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step directly below `folder`."""
    # Verifying costs a read of the file, so candidates are tried from the highest recorded step down.
    for candidate in sorted(_candidates(folder), key=_recorded_step, reverse=True):
        if step_of(candidate) is not None:
            return candidate
    return None


def _candidates(folder: Path) -> Iterator[Path]:
    return (path.parent for path in folder.glob(f"*/{RECORD}")) if folder.is_dir() else iter(())


def _recorded_step(folder: Path) -> int:
    try:
        return int(json.loads((folder / RECORD).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
