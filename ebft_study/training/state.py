"""The state of a run as plain numbers and tensors: what training has changed, and nothing else.

Tensors are complete and go by the names of the trained parameters, whichever worker had which part of them: a run can
resume with another number of workers, sharded or not, and a checkpoint of adapters is small.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ebft_study.errors import CheckpointError
from ebft_study.methods import MetricAccumulator, Observations
from ebft_study.networks.loading import trained_parameters
from ebft_study.training import checkpoint
from ebft_study.training.distributed import full_tensor, shard_like
from ebft_study.training.spent import Spent
from ebft_study.training.update import Run

Tensors = dict[str, dict[str, Tensor]]
"""Kind (weights, average, or a state of the optimizer) -> name of a parameter -> tensor."""


def save(run: Run, folder: Path) -> None:
    """Write a checkpoint of a run into an existing folder.

    Every worker must call this, and the first one writes: sharded tensors are gathered one after another.
    """
    state = {
        "step": run.step,
        "tokens_seen": run.tokens_seen,
        "spent": dataclasses.asdict(run.spent),
        "tally": {**dataclasses.asdict(run.accumulator), "steps": run.accumulated_steps},
        "latest": run.latest,
        "tensors": _tensors(run),
    }
    if run.rank == 0:
        checkpoint.save(
            folder, state, step=run.step, metrics=run.latest, complete=lambda tensor: full_tensor(tensor).cpu()
        )
    else:
        for tensor in checkpoint.tensors_of(state):
            full_tensor(tensor)


def _tensors(run: Run) -> Tensors:
    """This worker's tensors, or its shards of them."""
    parameters = trained_parameters(run.model)
    tensors: Tensors = {
        "weights": {name: p.detach() for name, p in parameters.items()},
        "average": dict(run.average.weights),
    }
    for name, parameter in parameters.items():
        for kind, tensor in run.optimizer.state[parameter].items():
            tensors.setdefault(kind, {})[name] = tensor
    return tensors


@torch.no_grad()
def restore(run: Run, folder: Path) -> None:
    """Continue a run from a checkpoint folder, which the first worker verifies; every worker takes its part of it.

    Raises:
        CheckpointError: the folder is no checkpoint of this run's trained parameters.
    """
    saved = checkpoint.load(folder, verify=run.rank == 0)
    if "tensors" not in saved:
        raise CheckpointError(f"{folder}: an older version wrote it. Continue with that one, or start from scratch")
    run.step, run.tokens_seen, run.latest = saved["step"], saved["tokens_seen"], saved["latest"]
    run.spent = Spent.from_checkpoint(saved.get("spent"))
    run.accumulator, run.accumulated_steps = _accumulator(saved["tally"]), saved["tally"]["steps"]
    tensors, parameters = saved["tensors"], trained_parameters(run.model)
    _check(tensors["weights"], parameters)
    for name, parameter in parameters.items():
        parameter.copy_(shard_like(tensors["weights"][name], parameter))
        # The optimizer's states are those of the phase that the checkpoint was written in; a new phase starts its own.
        run.optimizer.state[parameter] = {
            kind: _optimizer_state(values[name], parameter)
            for kind, values in tensors.items()
            if kind not in ("weights", "average") and name in values
        }
    for name, average in run.average.weights.items():
        # A run may begin to average where its checkpoint did not: it starts from the weights, as every average does.
        average.copy_(shard_like(tensors["average"].get(name, tensors["weights"][name]), average))


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> int:
    """Give a model the weights of a checkpoint as evaluations see them, averaged if the run averages; returns the step.

    Raises:
        CheckpointError: see `restore`.
    """
    saved = checkpoint.load(folder)
    tensors, parameters = saved["tensors"], trained_parameters(model)
    weights = tensors["average"] or tensors["weights"]
    _check(weights, parameters)
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
    return int(saved["step"])


def _accumulator(tally: dict[str, Any]) -> MetricAccumulator:
    """Observations since the last row of metrics; version 0.1 saved sums, counts and peaks under names of their own."""
    if "observed" in tally:
        return MetricAccumulator({name: Observations(**moments) for name, moments in tally["observed"].items()})
    sums, counts, peaks = tally["sums"], tally["counts"], tally.get("peaks", {})
    peaks = {**peaks, "parity_mean_difference_max": peaks.get("parity_max_difference", -math.inf)}
    return MetricAccumulator(
        {
            name: Observations(
                count=counts[name] or 1.0,
                total=total,
                squares=sums.get(f"{name}_squared", 0.0),
                largest=peaks.get(f"{name}_max", -math.inf),
                smallest=-peaks.get(f"{name}_negative_min", -math.inf),
            )
            for name, total in sums.items()
            if not name.endswith("_squared")
        }
    )


def _optimizer_state(saved: Tensor, parameter: Tensor) -> Tensor:
    # The count of updates is a single number, complete on every worker.
    return shard_like(saved, parameter) if saved.dim() else saved.to(parameter.device, copy=True)


def _check(weights: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    ours = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if theirs == ours:
        return
    name = min(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    raise CheckpointError(
        f"checkpoint: parameter {name!r} has the shape {theirs.get(name)} in it and {ours.get(name)} in this run. "
        "Continue with the model and the lora settings that it was written with, or start from scratch"
    )
