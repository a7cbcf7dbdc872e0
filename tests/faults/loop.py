"""A training loop whose every row follows from the settings and the step, so that two studies can be compared."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from ebft_study.config import RunConfig
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
    step = 0
    if start_from is not None:
        state = checkpoint.load(start_from)
        step = int(state["step"])
        assert state["tensors"]["weights"].tolist() == weights(config, step).tolist(), "a damaged checkpoint was loaded"
    recorder.event("started" if start_from is None else "resumed", f"step {step}")
    on_report({**measured(config, step), "step": float(step)}, None)
    if step == 0:
        _record(config, recorder, step)
    every = config.checkpoint.checkpoint_every_steps
    while step < config.total_steps:
        step += 1
        is_checkpoint = step % every == 0 or step == config.total_steps
        if is_checkpoint:
            _record(config, recorder, step)
        else:
            recorder.metrics(step, {"loss": 1.0 / step})
        if is_checkpoint:
            with tempfile.TemporaryDirectory() as folder:
                state = {"step": step, "tensors": {"weights": weights(config, step)}}
                checkpoint.save(Path(folder), state, step=step, metrics=measured(config, step))
                on_report({**measured(config, step), "step": float(step)}, Path(folder))
    recorder.event("finished", f"step {step}")
    return RunResult("finished", "", step, measured(config, step), 0.0)


def measured(config: RunConfig, step: int) -> dict[str, float]:
    """The best checkpoint is neither the first nor the last one."""
    rate = config.optimizer.learning_rate
    return {
        "ce_loss": 3.0 - rate,
        "cfm_loss": 2.0 + rate + abs(step - 4) / 8,
        "sequences_seen": float(step * config.training.batch_size),
    }


def weights(config: RunConfig, step: int) -> torch.Tensor:
    return torch.arange(64, dtype=torch.float32) * config.optimizer.learning_rate + step


def _record(config: RunConfig, recorder: Any, step: int) -> None:
    values = measured(config, step)
    recorder.metrics(step, values)
    value, row = values["cfm_loss"], {"benchmark": "validation", "metric": "cfm_loss", "position": None}
    recorder.evaluations(step, [{**row, "value": value, "standard_error": None, "count": 3}])
    recorder.scores(step, [{**row, "sequences": [0, 1], "counts": [1, 2], "values": [value, value + 1]}])
    sample = {"sequence": 3, "anchor": 16, "sample": 0, "context": "a", "completion": f"{step}", "reward": value}
    recorder.samples(step, [sample])
