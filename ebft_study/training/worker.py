"""Run the training loop in a Ray Train worker, with its reports sent to Ray."""

from __future__ import annotations

import functools
import socket
from pathlib import Path
from typing import Any

import ray.train
import torch

from ebft_study.config import RunConfig
from ebft_study.results import Fence
from ebft_study.storage import storage_errors
from ebft_study.training.recorded import Attempt, train_recorded


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Train one trial; every worker of its group runs this.

    `settings`: run (a `RunConfig` as plain values), attempt (an `Attempt`), threads (CPU threads of this worker).
    Returns what `train_recorded` returns.
    """
    context, attempt = ray.train.get_context(), Attempt(**settings["attempt"])
    torch.set_num_threads(settings["threads"])
    return train_recorded(
        RunConfig.model_validate(settings["run"]),
        attempt,
        on_report=functools.partial(_report, Fence(attempt.study_folder, attempt.generation)),
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
    )


def _report(fence: Fence, metrics: dict[str, float], checkpoint_folder: Path | None) -> None:
    """Forward a report to Ray Train, which copies the checkpoint into the attempt's folder before it returns."""
    checkpoint = ray.train.Checkpoint.from_directory(str(checkpoint_folder)) if checkpoint_folder else None
    name = f"checkpoint_{int(metrics['step']):08d}"
    fence.check()  # Ray would begin the folder of a study anew that was deleted or unmounted
    with storage_errors(fence.folder):
        ray.train.report({**metrics, "host": socket.gethostname()}, checkpoint=checkpoint, checkpoint_dir_name=name)
