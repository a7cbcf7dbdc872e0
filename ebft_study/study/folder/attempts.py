"""Attempts of a trial: `<study folder>/train/<trial_id>-<attempt>/checkpoint_<step>/`.

Every start of a trial gets its own folder, so that an attempt that has not ended yet never writes into the next one.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from operator import truediv
from pathlib import Path

from ebft_study.config import CheckpointConfig
from ebft_study.results import fence, read_table
from ebft_study.storage import Location, StoragePath, in_parallel, storage_errors, storage_path
from ebft_study.study.folder.trial_states import OPEN
from ebft_study.study.spec.study_spec import ObjectiveSpec
from ebft_study.training import checkpoint
from ebft_study.training.recorded import attempt_name

_BEGUN = ".begun"


def folder(study_folder: Location, trial_id: str, attempt: int) -> StoragePath:
    return storage_path(study_folder) / "train" / attempt_name(trial_id, attempt)


def numbers(study_folder: Location, trial_id: str) -> list[int]:
    """The attempts that were started so far, in order."""
    pattern = re.compile(rf"{re.escape(trial_id)}-(\d+)")
    names = (storage_path(study_folder) / "train").names()
    return sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))


def begin(study_folder: Location, trial_id: str, *, generation: int = 0) -> int:
    """Claim the next attempt by creating its folder; attempts count from 1, in a store from the driver's first."""
    first = fence.first_attempt(generation)
    own = range(first, first + fence.ATTEMPTS) if generation else range(first, sys.maxsize)
    attempt = max((number for number in numbers(study_folder, trial_id) if number in own), default=first - 1)
    storage_path(study_folder).subfolder("train")
    while True:
        attempt += 1
        attempt_folder = folder(study_folder, trial_id, attempt)
        if attempt_folder.local is None:  # stores have no empty folders, and the study's lock leaves one driver
            (attempt_folder / _BEGUN).write_bytes(b"")
            return attempt
        with storage_errors(attempt_folder):
            try:
                attempt_folder.local.mkdir()
            except FileExistsError:
                continue
        return attempt


def newest_checkpoint(study_folder: Location, trial_id: str, *, since: int = 0) -> StoragePath | None:
    """The complete checkpoint of the highest step over all attempts, or over those from `since` on."""
    ordered = reversed(_checkpoints(study_folder, trial_id, since))
    return next((saved.path for saved in ordered if checkpoint.step_of(saved.path)), None)


def checkpoint_at(study_folder: Location, trial_id: str, step: int, *, since: int = 0) -> StoragePath | None:
    """The complete checkpoint of a step, of the latest attempt that has one."""
    ordered = reversed([saved for saved in _checkpoints(study_folder, trial_id, since) if saved.step == step])
    return next((saved.path for saved in ordered if checkpoint.step_of(saved.path)), None)


def keep_checkpoint(attempt_folder: StoragePath, written: Path, *, step: int) -> StoragePath:
    """Move a temporary checkpoint into its attempt's folder, whole or not at all."""
    kept = attempt_folder / checkpoint_name(step)
    kept.upload(written, last=checkpoint.RECORD)
    return kept


def prune(
    study_folder: Location,
    trial_id: str,
    config: CheckpointConfig,
    objective: ObjectiveSpec,
    *,
    since: int = 0,
    until: int | None = None,
) -> str | None:
    """Remove the checkpoints of a trial, over all its attempts, that the settings do not keep.

    The newest ones always stay: another trial may be about to start from one. Those of attempts after `until` are not
    looked at: they are another driver's. Returns the best one that is left, as a path below the study's folder; None
    where the objective was not measured at any.
    """
    every = [saved for saved in _checkpoints(study_folder, trial_id) if until is None or saved.attempt <= until]
    current = {saved.step: saved for saved in every if saved.attempt >= since}  # of one step, the later attempt's
    values = _values(current, objective)
    keep = checkpoint.to_keep(
        values,
        newest=config.keep_checkpoints,
        best=config.keep_best,
        every_steps=config.keep_every_steps,
        mode=objective.mode,
    )
    # Of attempts before `since`, which nothing starts from while later ones have any, the last ones stay in reserve.
    earlier = sorted((saved for saved in every if saved.attempt < since), key=lambda saved: saved.attempt)
    kept = {current[step].path for step in keep} | {saved.path for saved in earlier[-config.keep_checkpoints :]}
    in_parallel(_remove, [saved.path for saved in every if saved.path not in kept])
    return _best({step: current[step] for step in keep}, objective)


def best(study_folder: Location, trial_id: str, objective: ObjectiveSpec, *, since: int = 0) -> str | None:
    """The best checkpoint that a trial has, as `prune` returns it; removes nothing."""
    return _best({saved.step: saved for saved in _checkpoints(study_folder, trial_id, since)}, objective)


def damaged(study_folder: Location) -> list[str]:
    """Problems with checkpoints: records that are not whole, and best ones of ended trials that lack files.

    Hashes of weights are checked when a checkpoint is loaded.
    """
    trials = read_table(study_folder, "trials")
    ended = trials[trials["best_checkpoint"].notna() & ~trials["status"].isin(OPEN)]
    paths = [
        functools.reduce(truediv, best.split("/"), storage_path(study_folder)) for best in ended["best_checkpoint"]
    ]
    whole = in_parallel(checkpoint.has_all_files, paths)
    problems = {
        path: f"{path}: the best checkpoint of {trial} is damaged. Restore it"
        for path, trial, is_whole in zip(paths, ended["trial_id"], whole, strict=True)
        if not is_whole
    }
    for path in _recorded_folders(study_folder):
        if path not in problems and checkpoint.recorded(path) is None:
            problems[path] = f"{path}: {checkpoint.RECORD} is damaged, so this checkpoint does not count. Restore it"
    return list(problems.values())


def _recorded_folders(study_folder: Location) -> list[StoragePath]:
    """The checkpoints of all attempts that have a record: it is written last, and removed first."""
    train = storage_path(study_folder) / "train"
    attempt_folders = [train / name for name in train.names()]
    every = [attempt / name for attempt in attempt_folders for name in attempt.names() if not name.startswith(".")]
    return [path for path in every if checkpoint.RECORD in path.names()]


def checkpoint_name(step: int) -> str:
    return f"checkpoint_{step:08d}"


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint by its own record, unverified."""

    step: int
    metrics: dict[str, float]
    path: StoragePath

    @property
    def attempt(self) -> int:
        return int(self.path.parent.name.rpartition("-")[2])

    @property
    def below_study(self) -> str:
        return f"train/{self.path.parent.name}/{self.path.name}"


def _values(by_step: Mapping[int, _Checkpoint], objective: ObjectiveSpec) -> dict[int, float]:
    return {step: saved.metrics.get(objective.metric, math.nan) for step, saved in by_step.items()}


def _best(by_step: Mapping[int, _Checkpoint], objective: ObjectiveSpec) -> str | None:
    ranked = checkpoint.ranked(_values(by_step, objective), objective.mode)
    return by_step[ranked[0]].below_study if ranked else None


def _checkpoints(study_folder: Location, trial_id: str, since: int = 0) -> list[_Checkpoint]:
    """Checkpoints of a trial, ordered by step, then by attempt."""
    folders = [
        folder(study_folder, trial_id, attempt) for attempt in numbers(study_folder, trial_id) if attempt >= since
    ]
    paths = [
        attempt_folder / name
        for attempt_folder in folders
        for name in attempt_folder.names()
        if not name.startswith(".")
    ]
    records = in_parallel(checkpoint.recorded, paths)
    checkpoints = [_Checkpoint(*record, path) for record, path in zip(records, paths, strict=True) if record]
    return sorted(checkpoints, key=lambda saved: (saved.step, saved.attempt))


def _remove(path: StoragePath) -> None:
    """Delete a checkpoint, its record first: after a crash in between, no incomplete folder counts as a checkpoint."""
    (path / checkpoint.RECORD).delete()
    path.delete()
