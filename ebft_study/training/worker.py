"""What runs inside a Ray Train worker: the training loop, with its reports sent to Ray."""

from __future__ import annotations

import dataclasses
import pkgutil
import time
from pathlib import Path
from typing import Any

import ray.train
import torch

from ebft_study.config import RunConfig
from ebft_study.results import TrialRecorder

TRAIN = "ebft_study.training.loop:train"


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Train one trial; every worker of its group runs this.

    `settings`: run (a `RunConfig` as plain values), study, study_folder, trial_id, attempt, start_from (a checkpoint
    folder or None), threads (CPU threads of this worker), train (where the loop is, as `module:function`).

    Returns the loop's `Outcome` as a dictionary, with `started_at` (seconds since the epoch) and `train_seconds`.
    """
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(settings["threads"])
    train = pkgutil.resolve_name(settings["train"])
    started_at = time.time()
    outcome = train(
        RunConfig.model_validate(settings["run"]),
        recorder=_recorder(settings) if rank == 0 else None,
        on_report=_report,
        start_from=Path(settings["start_from"]) if settings["start_from"] else None,
        rank=rank,
        world_size=world_size,
    )
    return {**dataclasses.asdict(outcome), "started_at": started_at, "train_seconds": time.time() - started_at}


def _recorder(settings: dict[str, Any]) -> TrialRecorder:
    who = {key: settings[key] for key in ("study", "trial_id", "attempt")}
    return TrialRecorder(Path(settings["study_folder"]), **who)


def _report(metrics: dict[str, float], checkpoint_folder: Path | None) -> None:
    """Pass a report on to Ray Train, which copies the checkpoint into the attempt's folder before it returns."""
    checkpoint = ray.train.Checkpoint.from_directory(str(checkpoint_folder)) if checkpoint_folder else None
    name = f"checkpoint_{int(metrics['step']):08d}"
    ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=name)
