"""A training loop with the real one's interface and nothing to learn: quick, and able to misbehave when told to.

Workers find it as `fake_training:train`. What it does follows from the settings that a test's study varies:
    cfm_loss at step k   2 + learning_rate + 1 / (1 + k)
    ce_loss              3 - learning_rate
    weight_decay         seconds per step
    gamma = 0.5          the worker kills itself with SIGKILL at step 2, unless it started from a checkpoint
    gamma = 0.25         raises an error that only the user can mend
    learning_rate = 0    stays at step 3 for ever, unless it started from a checkpoint
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import torch

from ebft_study.config import RunConfig
from ebft_study.errors import DataError
from ebft_study.training import RunResult, checkpoint


def train(
    config: RunConfig,
    *,
    recorder: Any,
    on_report: Any,
    start_from: Path | None = None,
    rank: int = 0,
    world_size: int = 1,
    services: Any = None,
) -> RunResult:
    started = time.perf_counter()
    first = step = 0 if start_from is None else checkpoint.load(start_from)["step"]
    if recorder:
        recorder.event("started" if start_from is None else "resumed", f"step {step}")
    if config.loss.gamma == 0.25:
        raise DataError("training.gamma=0.25: the fake refuses it. Use another")
    metrics = _metrics(config, step)
    if step == 0 and recorder:
        recorder.metrics(0, metrics)
    on_report({**metrics, "step": float(step)}, None)
    startup = time.perf_counter() - started
    while step < config.total_steps:
        time.sleep(config.optimizer.weight_decay)
        step += 1
        if config.loss.gamma == 0.5 and first == 0 and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        while config.optimizer.learning_rate == 0 and first == 0 and step > 3:
            time.sleep(0.05)
        metrics = _metrics(config, step)
        if recorder:
            recorder.metrics(step, metrics)
        if step % config.checkpoint.checkpoint_every_steps == 0 or step == config.total_steps:
            with tempfile.TemporaryDirectory() as folder:
                if rank == 0:
                    checkpoint.save(Path(folder), {"step": step, "weights": torch.zeros(3)}, step=step, metrics=metrics)
                on_report({**metrics, "step": float(step)}, Path(folder) if rank == 0 else None)
    return RunResult("finished", "", step, metrics, startup)


def _metrics(config: RunConfig, step: int) -> dict[str, float]:
    cfm = 2.0 + config.optimizer.learning_rate + 1.0 / (1 + step)
    ce = 3.0 - config.optimizer.learning_rate
    return {"ce_loss": ce, "cfm_loss": cfm, "sequences_seen": float(step * config.training.batch_size)}


def prepare(configs: Any, **_: Any) -> dict[str, Any]:
    return {"data": {"fake": {"fingerprint": "0"}}, "configurations": len(configs)}


def read_config(name: str, *, revision: str | None = None) -> Any:
    """The sizes of a model, from which the disk of its checkpoints follows."""
    return types.SimpleNamespace(
        model_type="qwen2", hidden_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=256
    )
