"""The disk that the checkpoints of a study need, and whether it is there."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ebft_study import text
from ebft_study.config import RunConfig
from ebft_study.cost.shapes import FLOAT32_BYTES
from ebft_study.storage import StoragePath
from ebft_study.study.forecast.trial_groups import trial_groups
from ebft_study.study.resolving.resolved import ResolvedStudy
from ebft_study.training.memory import shapes

_STATES = 2
"""AdamW's averages of the gradients and of their squares."""


@dataclass(frozen=True)
class CheckpointDisk:
    """Bytes of the checkpoints of all trials, at most: early stopping leaves fewer."""

    each_bytes: float
    """Of one checkpoint, of the trials with the largest."""
    kept: int
    """By one of these trials."""
    kept_bytes: float
    """By all trials, and what those that run at a time have written before they remove an old one."""
    written_bytes: float
    """In the temporary folder, by trials that run at a time."""

    def describe(self) -> str:
        """One line for the plan."""
        total = f"{text.size(self.kept_bytes)} of disk"
        return f"checkpoints: up to {total}, {self.kept} of {text.size(self.each_bytes)} per trial"

    def shortages(self, folder: StoragePath, *, are_here: bool = True) -> list[str]:
        """What to say where less is free, before anything starts.

        Args:
            folder: of the study; of a store nothing is known.
            are_here: trials run on this machine, whose temporary folder they use.
        """
        wanted = list[tuple[Path, float, str]]()
        if folder.local is not None:
            present = sum(path.lstat().st_size for path in folder.local.glob("train/*/checkpoint_*/*"))
            remedy = "a smaller keep_checkpoints or keep_best, lora_rank, or another --storage"
            wanted.append((folder.local, max(self.kept_bytes - present, 0.0), f"Use {remedy}"))
        if are_here:
            wanted.append((Path(tempfile.gettempdir()), self.written_bytes, "Set TMPDIR to a folder with more room"))
        users: dict[int, list[tuple[Path, float, str]]] = {}
        for want in wanted:
            users.setdefault(_existing(want[0]).stat().st_dev, []).append(want)
        lines = list[str]()
        for shares in users.values():
            path, _, remedy = shares[0]
            needed, free = sum(size for _, size, _ in shares), shutil.disk_usage(_existing(path)).free
            if needed > free:
                lines.append(f"{path}: checkpoints need {text.size(needed)}, and {text.size(free)} are free. {remedy}")
        return lines


def study_disk(study: ResolvedStudy) -> CheckpointDisk:
    """The disk of a study."""
    trials = [(group.example.run, group.number) for group in trial_groups(study)]
    return checkpoint_disk(trials, concurrency=min(study.concurrency, study.n_trials))


def checkpoint_disk(trials: Sequence[tuple[RunConfig, int]], *, concurrency: int) -> CheckpointDisk:
    """The disk of trials: the settings of each kind, and how many have them. Reads the shapes of models."""
    sizes = [checkpoint_bytes(run) for run, _ in trials]
    kept = [most_kept(run) for run, _ in trials]
    largest = sizes.index(max(sizes))
    total = sum(size * n * number for size, n, (_, number) in zip(sizes, kept, trials, strict=True))
    at_a_time = concurrency * sizes[largest]
    return CheckpointDisk(sizes[largest], kept[largest], total + at_a_time, at_a_time)


def checkpoint_bytes(run: RunConfig) -> int:
    """Bytes of a checkpoint's tensors: trained weights, AdamW's states, and the average of the weights."""
    model, _ = shapes(run)
    width = 2 if run.training.weight_dtype == "bfloat16" else FLOAT32_BYTES
    average = 0 if run.optimizer.ema_decay is None else FLOAT32_BYTES
    return model.n_trainable * ((1 + _STATES) * width + average)


def most_kept(run: RunConfig) -> int:
    """Most checkpoints of a trial that stay: the newest, the best, and those at multiples; no more than are written."""
    settings, steps = run.checkpoint, run.total_steps
    written = math.ceil(steps / settings.checkpoint_every_steps)
    regular = steps // settings.keep_every_steps if settings.keep_every_steps else 0
    return min(max(settings.keep_checkpoints, 1) + settings.keep_best + regular, written)


def _existing(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(folder for folder in (path, *path.resolve().parents) if folder.exists())
