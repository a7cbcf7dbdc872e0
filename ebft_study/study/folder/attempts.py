"""Attempts of a trial: `<study folder>/train/<trial_id>-<attempt>/checkpoint_<step>/`.

Every start of a trial gets its own folder, so that an attempt that is still dying never writes into the next one.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from ebft_study.config import CheckpointConfig
from ebft_study.storage import Location, StoragePath, in_parallel, storage_errors, storage_path
from ebft_study.study.spec.study_spec import ObjectiveSpec
from ebft_study.training import checkpoint

_BEGUN = ".begun"


def folder(study_folder: Location, trial_id: str, attempt: int) -> StoragePath:
    return storage_path(study_folder) / "train" / f"{trial_id}-{attempt}"


def numbers(study_folder: Location, trial_id: str) -> list[int]:
    """The attempts that were started so far, in order."""
    pattern = re.compile(rf"{re.escape(trial_id)}-(\d+)")
    names = (storage_path(study_folder) / "train").names()
    return sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))


def begin(study_folder: Location, trial_id: str) -> int:
    """Claim the next attempt, counted from 1, by creating its folder."""
    attempt = max(numbers(study_folder, trial_id), default=0)
    while True:
        attempt += 1
        own = folder(study_folder, trial_id, attempt)
        if own.local is None:  # stores have no empty folders, and the study's lock leaves one driver
            (own / _BEGUN).write_bytes(b"")
            return attempt
        with storage_errors(own):
            try:
                own.local.mkdir(parents=True)
            except FileExistsError:
                continue
        return attempt


def newest_checkpoint(study_folder: Location, trial_id: str, *, since: int = 0) -> StoragePath | None:
    """The complete checkpoint of the highest step over all attempts, or over those from `since` on."""
    recorded = _recorded(study_folder, trial_id, since)
    return next((one for _, one in sorted(recorded, reverse=True, key=_order) if checkpoint.step_of(one)), None)


def keep_checkpoint(own: StoragePath, written: Path, *, step: int) -> StoragePath:
    """Move a temporary checkpoint into its attempt's folder, whole or not at all."""
    kept = own / checkpoint_name(step)
    kept.upload(written, last=checkpoint.RECORD)
    return kept


def prune(
    study_folder: Location, trial_id: str, config: CheckpointConfig, objective: ObjectiveSpec, *, since: int = 0
) -> str | None:
    """Remove what the settings do not keep of a trial's checkpoints, over all its attempts.

    The newest ones always stay: another trial may be about to start from one. Returns the best one that is left, as a
    path below the study's folder; None where the objective was not measured at any.
    """
    values: dict[int, float] = {}
    places: dict[int, StoragePath] = {}
    everything = sorted(_recorded(study_folder, trial_id, 0), key=_order)
    found = [one for one in everything if _attempt(one[1]) >= since]
    for (step, metrics), where in found:  # of a step that two attempts did, the later one
        values[step], places[step] = metrics.get(objective.metric, math.nan), where
    keep = checkpoint.to_keep(
        values,
        newest=config.keep_checkpoints,
        best=config.keep_best,
        every_steps=config.keep_every_steps,
        mode=objective.mode,
    )
    # Of attempts before `since`, which nothing starts from while later ones have any, the last ones stay in reserve.
    earlier = sorted((where for _, where in everything if _attempt(where) < since), key=_attempt)
    kept = {places[step] for step in keep} | {*earlier[-config.keep_checkpoints :]}
    in_parallel(_remove, [where for _, where in everything if where not in kept])
    best = checkpoint.ranked({step: values[step] for step in keep}, objective.mode)
    return _below_study(places[best[0]]) if best else None


def checkpoint_name(step: int) -> str:
    return f"checkpoint_{step:08d}"


Recorded = tuple[tuple[int, dict[str, float]], StoragePath]


def _recorded(study_folder: Location, trial_id: str, since: int) -> list[Recorded]:
    """Step, metrics and place of all checkpoints of a trial, unverified."""
    counted = (attempt for attempt in numbers(study_folder, trial_id) if attempt >= since)
    folders = [folder(study_folder, trial_id, attempt) for attempt in counted]
    found = [own / name for own in folders for name in own.names() if not name.startswith(".")]
    records = in_parallel(checkpoint.recorded, found)
    return [(record, where) for record, where in zip(records, found, strict=True) if record is not None]


def _order(one: Recorded) -> tuple[int, int]:
    """By step, then by attempt."""
    (step, _), where = one
    return step, _attempt(where)


def _attempt(where: StoragePath) -> int:
    return int(where.parent.name.rpartition("-")[2])


def _remove(where: StoragePath) -> None:
    """First what makes it a checkpoint: a crash in between leaves nothing that looks like one."""
    (where / checkpoint.RECORD).delete()
    where.delete()


def _below_study(where: StoragePath) -> str:
    return f"train/{where.parent.name}/{where.name}"
