"""One attempt of a trial with everything it reports put on record; the same with and without Ray."""

from __future__ import annotations

import dataclasses
import pkgutil
import time
from pathlib import Path
from typing import Any

from ebft_study.config import RunConfig
from ebft_study.results import TrialRecorder
from ebft_study.training.services import Services
from ebft_study.training.tracking import WandbRecorder, tracked

LOOP = "ebft_study.training.loop:train"


@dataclasses.dataclass(frozen=True)
class Attempt:
    """Which start of which trial this is; `label` names the trial for people, `loop` is where the training loop is."""

    study: str
    study_folder: str
    trial_id: str
    label: str
    attempt: int
    start_from: str | None = None
    loop: str = LOOP

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint folder to continue from."""
        return Path(self.start_from) if self.start_from else None


def train_recorded(
    config: RunConfig, attempt: Attempt, *, on_report: Any, rank: int = 0, world_size: int = 1
) -> dict[str, Any]:
    """Run the loop; returns its `Outcome` as a dictionary, with `started_at` (epoch seconds) and `train_seconds`."""
    started_at = time.time()
    recorder = _recorder(config, attempt) if rank == 0 else None
    try:
        outcome = pkgutil.resolve_name(attempt.loop)(
            config,
            recorder=recorder,
            on_report=on_report,
            start_from=attempt.checkpoint,
            rank=rank,
            world_size=world_size,
            services=Services(owner=f"{attempt.trial_id}-{attempt.attempt}", rank=rank),
        )
    finally:
        if isinstance(recorder, WandbRecorder):
            recorder.close()
    return {**dataclasses.asdict(outcome), "started_at": started_at, "train_seconds": time.time() - started_at}


def _recorder(config: RunConfig, attempt: Attempt) -> Any:
    folder, study, trial_id = Path(attempt.study_folder), attempt.study, attempt.trial_id
    rows = TrialRecorder(folder, study=study, trial_id=trial_id, attempt=attempt.attempt)
    return tracked(rows, config, study=study, trial_id=trial_id, label=attempt.label, folder=folder)
