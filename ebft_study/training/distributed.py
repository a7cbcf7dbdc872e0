"""Data-parallel workers: sums over all of them, and weights sharded among them (FSDP2).

    outside a step      every worker has its shard of each weight; the optimizer and the average of the weights see
                        nothing else
    `scoring`           embeddings and head are gathered, a layer when a pass runs it; its gradient is summed over all
                        workers, and divided among them, as soon as its backward pass is over
    `unsharded`         every worker has all weights, in the type of the passes: sampling, evaluations, frozen networks

Layers that are gathered one by one meet only if all workers run the same passes in the same order. So each gets as many
rows as the others and as many anchors, the rest of them padding (`training.update`); and the log-probabilities of
samples are scored again rather than differentiated through the many passes that drew them. With one worker, sums do
nothing, and no weights are sharded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ebft_study.networks.blocks import decoder_names
from ebft_study.networks.loading import trained_parameters
from ebft_study.networks.sharding import ATTRIBUTE, Shards, is_sharded, shards_of

# --- sums ------------------------------------------------------------------------------------------------------


def sum_over_workers(values: Iterable[float], world_size: int, device: torch.device) -> list[float]:
    """Element-wise sums of plain numbers over all workers."""
    return _reduce(list(values), dist.ReduceOp.SUM, world_size, device)


def max_over_workers(values: Iterable[float], world_size: int, device: torch.device) -> list[float]:
    """Element-wise maxima of plain numbers over all workers."""
    return _reduce(list(values), dist.ReduceOp.MAX, world_size, device)


def _reduce(numbers: list[float], operation: Any, world_size: int, device: torch.device) -> list[float]:
    if world_size == 1:
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=operation)
    return [float(number) for number in tensor]


def sum_gradients(model: nn.Module, world_size: int) -> None:
    """Add up the gradients of all workers in place; losses already divide by global totals.

    Those of sharded weights are added up by every backward pass.
    """
    if world_size == 1 or is_sharded(model):
        return
    parameters = list(trained_parameters(model).values())
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    offset = 0
    for parameter in parameters:
        parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter).clone()
        offset += parameter.numel()


# --- shards ----------------------------------------------------------------------------------------------------


def shard(model: nn.Module, *, world_size: int, precision: str) -> None:
    """Shard the weights of a causal LM among all workers, in place; every worker must start with the same ones.

    Args:
        precision: type of the gathered weights; each worker's shard keeps its own type, and gradients are summed in
            float32.
    """
    device = next(model.parameters()).device
    low = precision == "bfloat16"
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world_size,)),
        "reshard_after_forward": True,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if low else None,
            reduce_dtype=torch.float32 if low else None,
            cast_forward_inputs=False,
        ),
    }
    layers = [
        fully_shard(layer, **options)
        for layer in getattr(model.get_decoder(), decoder_names(model).layers)  # type: ignore[operator]
    ]
    # Embeddings and head, which may be one parameter, belong to the root.
    root = fully_shard(model, **options)
    for unit in (root, *layers):
        # Losses divide by global totals already: gradients are summed, not averaged.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        # A worker whose rows leave a weight without gradient (an expert, say) takes part in summing it.
        unit.set_reduce_scatter_unused_params(True, recurse=False)
    # Passes do not go through the root's own forward, so `scoring` gathers and releases it.
    root.set_reshard_after_backward(False, recurse=False)
    for before, after in pairwise(layers):
        before.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([before])
    # FSDP's guess at what comes before the first layer would be the last layer of an earlier pass.
    layers[0].set_modules_to_backward_prefetch([root])
    # The first pass through FSDP's hooks makes its module the root; ours would run a layer first.
    model.make_root = torch.clone  # type: ignore[assignment]
    register_fsdp_forward_method(model, "make_root")
    with torch.no_grad():
        model.make_root(torch.zeros((), device=device))  # type: ignore[operator]
    setattr(model, ATTRIBUTE, (_TrainedShards([root]), _TrainedShards(layers)))
    _TrainedShards([root]).release()


class _TrainedShards(Shards):
    """Units of FSDP. Gathered, they stay so; otherwise a pass through a layer gathers and releases it."""

    def __init__(self, units: Sequence[FSDPModule]) -> None:
        self.units = units

    def gather(self) -> None:
        for unit in self.units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()

    def release(self) -> None:
        for unit in self.units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


def scoring(model: nn.Module) -> AbstractContextManager[None]:
    """Context of the passes that gradients come from, which all workers run in the same order."""
    return shards_of(model)[0].gathered() if is_sharded(model) else nullcontext()


def shard_frozen(*networks: nn.Module) -> None:
    """Divide the weights of frozen networks among all workers, in place; those that networks share are divided once."""
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for network in networks:
        for parameter in network.parameters():
            owners.setdefault(parameter, []).append(network)
    groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for parameter, among in owners.items():
        groups.setdefault(tuple(map(id, among)), []).append(parameter)
    shards = {ids: _FrozenShards(parameters) for ids, parameters in groups.items()}
    for network in networks:
        setattr(network, ATTRIBUTE, tuple(own for ids, own in shards.items() if id(network) in ids))


class _FrozenShards(Shards):
    """Parameters of one type that never change: gathered at once, into one tensor."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters, self.shapes = parameters, [parameter.shape for parameter in parameters]
        n_workers, length = dist.get_world_size(), sum(shape.numel() for shape in self.shapes)
        self.own = parameters[0].new_zeros(-(-length // n_workers), requires_grad=False)
        first, start = dist.get_rank() * len(self.own), 0
        for parameter in parameters:  # one at a time: a copy of all of them might not fit
            low, high = (min(max(first - start + end, 0), parameter.numel()) for end in (0, len(self.own)))
            self.own[start + low - first : start + high - first] = parameter.detach().flatten()[low:high]
            start += parameter.numel()
        self.release()

    def gather(self) -> None:
        everything = self.own.new_empty(dist.get_world_size() * len(self.own))
        dist.all_gather_single(everything, self.own)
        start = 0
        for parameter, shape in zip(self.parameters, self.shapes, strict=True):
            parameter.data = everything[start : start + shape.numel()].view(shape)
            start += shape.numel()

    def release(self) -> None:
        for parameter in self.parameters:
            parameter.data = parameter.data.new_empty(0)


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor in full, which all workers must request at the same time; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a full tensor with the type, device and sharding of `like`."""
    moved = tensor.to(like.device, like.dtype, copy=True)
    if not isinstance(like, DTensor):
        return moved
    # Without the last copy a shard would keep the full tensor in memory.
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None).clone()
