"""Attempts of a trial on disk: `<study folder>/train/<trial_id>-<attempt>/checkpoint_<step>/`.

Every start of a trial gets its own folder, so that an attempt that is still dying never writes into the next one.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path


def folder(study_folder: Path, trial_id: str, attempt: int) -> Path:
    return study_folder / "train" / f"{trial_id}-{attempt}"


def numbers(study_folder: Path, trial_id: str) -> list[int]:
    """The attempts that were started so far, in order."""
    pattern = re.compile(rf"{re.escape(trial_id)}-(\d+)")
    train = study_folder / "train"
    names = (path.name for path in train.iterdir()) if train.is_dir() else ()
    return sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))


def begin(study_folder: Path, trial_id: str) -> int:
    """Claim the next attempt, counted from 1, by creating its folder."""
    attempt = max(numbers(study_folder, trial_id), default=0)
    while True:
        attempt += 1
        try:
            folder(study_folder, trial_id, attempt).mkdir(parents=True)
        except FileExistsError:
            continue
        return attempt


def newest_checkpoint(study_folder: Path, trial_id: str, *, since: int = 0) -> Path | None:
    """The complete checkpoint of the highest step over all attempts, or over those from `since` on."""
    from ebft_study.training import checkpoint

    counted = (attempt for attempt in numbers(study_folder, trial_id) if attempt >= since)
    folders = (folder(study_folder, trial_id, attempt) for attempt in counted)
    found = [newest for path in folders if (newest := checkpoint.newest(path)) is not None]
    return max(found, key=lambda path: checkpoint.step_of(path) or 0, default=None)


def keep_checkpoint(attempt_folder: Path, written: Path, *, step: int, keep: int) -> Path:
    """Move a temporary checkpoint into its attempt's folder and remove all but the `keep` newest."""
    kept = attempt_folder / checkpoint_name(step)
    arriving = attempt_folder / f".{kept.name}.tmp"
    shutil.rmtree(arriving, ignore_errors=True)
    shutil.copytree(written, arriving)
    shutil.rmtree(kept, ignore_errors=True)
    arriving.rename(kept)
    for old in sorted(attempt_folder.glob("checkpoint_*"))[:-keep]:
        shutil.rmtree(old)
    return kept


def checkpoint_name(step: int) -> str:
    return f"checkpoint_{step:08d}"
