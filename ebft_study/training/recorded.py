"""One attempt of a trial with everything it reports put on record; the same with and without Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pkgutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ebft_study.config import RunConfig
from ebft_study.results import TrialRecorder
from ebft_study.results.copies import read_mapping
from ebft_study.storage import StoragePath, storage_path
from ebft_study.training.services import Services
from ebft_study.training.tracking import WandbRecorder

LOOP = "ebft_study.training.loop:train"


@dataclasses.dataclass(frozen=True)
class Attempt:
    """Which start of which trial this is.

    `label` names the trial for people, `loop` is where the training loop is; `study_folder` and `start_from` are
    places, given as paths or URLs.
    """

    study: str
    study_folder: str
    trial_id: str
    label: str
    attempt: int
    start_from: str | None = None
    loop: str = LOOP

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        """The checkpoint folder to continue from, on a disk."""
        if self.start_from is None:
            yield None
        else:
            with storage_path(self.start_from).on_disk() as folder:
                yield folder


def train_recorded(
    config: RunConfig, attempt: Attempt, *, on_report: Any, rank: int = 0, world_size: int = 1
) -> dict[str, Any]:
    """Run the loop; returns its `Outcome` as a dictionary, with `started_at` (epoch seconds) and `train_seconds`."""
    started_at, begun = time.time(), time.monotonic()
    recorder = _recorder(config, attempt) if rank == 0 else None
    try:
        with attempt.checkpoint() as start_from:
            outcome = pkgutil.resolve_name(attempt.loop)(
                config,
                recorder=recorder,
                on_report=on_report,
                start_from=start_from,
                rank=rank,
                world_size=world_size,
                services=Services(owner=f"{attempt.trial_id}-{attempt.attempt}", rank=rank),
            )
    finally:
        if isinstance(recorder, WandbRecorder):
            recorder.close()
    return {**dataclasses.asdict(outcome), "started_at": started_at, "train_seconds": time.monotonic() - begun}


def _recorder(config: RunConfig, attempt: Attempt) -> Any:
    """The tables, with W&B beside them when the configuration asks for it."""
    folder, study, trial_id = storage_path(attempt.study_folder), attempt.study, attempt.trial_id
    rows = TrialRecorder(folder, study=study, trial_id=trial_id, attempt=attempt.attempt)
    if config.tracking.wandb == "off":
        return rows
    folder.local_dir.mkdir(parents=True, exist_ok=True)
    run_id = f"{study}-{trial_id}-{_begun(folder)}"
    return WandbRecorder(rows, config, study=study, run_id=run_id, label=attempt.label, folder=folder.local_dir)


def _begun(folder: StoragePath) -> str:
    """Tells a study from others of its name, which began at other moments."""
    record, _ = read_mapping(folder / "study.yaml")
    return hashlib.sha256(str((record or {}).get("created_at")).encode()).hexdigest()[:8]
