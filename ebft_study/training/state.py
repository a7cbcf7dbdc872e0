"""The tensors of a checkpoint: whatever training has changed, and nothing else.

They are whole and go by the names of the trained parameters, whoever held which part of them: a run can continue with
another number of workers, sharded or not, and a checkpoint of adapters is small.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ebft_study.errors import CheckpointError
from ebft_study.networks.loading import trained_parameters
from ebft_study.training.averaging import WeightAverage
from ebft_study.training.sharding import full_tensor, shard_like

Tensors = dict[str, dict[str, Tensor]]
"""Kind (weights, average, or a state of the optimizer) -> name of a parameter -> tensor."""


def collect(model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage, *, keep: bool) -> Tensors:
    """All tensors, on the CPU. Every worker must call this; those without `keep` get none."""
    parameters = trained_parameters(model)
    held: Tensors = {"weights": {name: p.detach() for name, p in parameters.items()}, "average": average.weights}
    for name, parameter in parameters.items():
        for kind, tensor in optimizer.state[parameter].items():
            held.setdefault(kind, {})[name] = tensor
    kept: Tensors = {kind: {} for kind in held}
    for kind, tensors in held.items():
        for name, tensor in tensors.items():
            complete = full_tensor(tensor)
            if keep:
                kept[kind][name] = complete.cpu()
    return kept


@torch.no_grad()
def restore(tensors: Tensors, model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage) -> None:
    """Copy collected tensors back; every worker takes its part.

    Raises:
        CheckpointError: they are not those of the parameters that this run trains.
    """
    parameters = trained_parameters(model)
    _check(tensors["weights"], parameters)
    for name, parameter in parameters.items():
        parameter.copy_(shard_like(tensors["weights"][name], parameter))
        optimizer.state[parameter] = {
            kind: _optimizer_state(values[name], parameter)
            for kind, values in tensors.items()
            if kind not in ("weights", "average") and name in values
        }
    for name, own in average.weights.items():
        # A run may begin to average where its checkpoint did not: it starts from the weights, as every average does.
        own.copy_(shard_like(tensors["average"].get(name, tensors["weights"][name]), own))


def _optimizer_state(saved: Tensor, parameter: Tensor) -> Tensor:
    # The count of updates is a single number, whole on every worker.
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
