"""Data-parallel workers: sums over all of them, and weights sharded among them (FSDP2).

    outside `unsharded`  every worker has its shard of each weight; the optimizer and the average of the weights see
                         nothing else
    inside               every worker has all weights, and passes run as if there were one worker: as many as its own
                         rows need, in any order, through any part of the model
    at a step's end      `sum_gradients`: the sum of all workers' gradients, each worker receiving its shard

FSDP's own schedule gathers a layer for each of its passes and reduces in each backward pass. A step here has many, and
their number differs between workers, so those collectives would not meet; there is one round of each in a step instead.
With one worker, sums do nothing, and no weights are sharded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ebft_study.networks.blocks import decoder_names
from ebft_study.networks.loading import trained_parameters

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
    """Add up the gradients of all workers in place; losses already divide by global totals."""
    if is_sharded(model):
        _reduce_scatter_gradients(model)
        return
    if world_size == 1:
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
        precision: type of the gathered weights; each worker's shard keeps its own type, and gradients of several
            passes add up in float32.
    """
    device = next(model.parameters()).device
    low = precision == "bfloat16"
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world_size,)),
        "reshard_after_forward": False,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if low else None,
            reduce_dtype=torch.float32 if low else None,
            cast_forward_inputs=False,
        ),
    }
    for layer in getattr(model.get_decoder(), decoder_names(model).layers):  # type: ignore[operator]
        fully_shard(layer, **options)
    # Embeddings and head, which may be one parameter, belong to the root.
    fully_shard(model, **options)
    for unit in _units(model):
        # Losses divide by global totals already: gradients are summed, not averaged.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_reshard_after_backward(False, recurse=False)
        unit.set_requires_gradient_sync(False, recurse=False)
        # A worker without a single anchor has no gradients, but must take part in summing them.
        unit.set_reduce_scatter_unused_params(True, recurse=False)
    model.end_of_step = _end_of_step  # type: ignore[assignment]
    register_fsdp_forward_method(model, "end_of_step")
    # The first pass through FSDP's hooks makes its module the root; ours would run a layer first.
    with torch.no_grad():
        model.end_of_step(torch.zeros((), device=device))  # type: ignore[operator]
    _reshard(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on it."""
    return isinstance(model, FSDPModule)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Context in which every worker has all weights. All must enter and leave; what each one runs inside may differ."""
    for unit in _units(model):
        unit.unshard()
    try:
        yield
    finally:
        _reshard(model)


def _reduce_scatter_gradients(model: nn.Module) -> None:
    """Give every worker, inside `unsharded`, its shard of the sum of all workers' gradients."""
    assert isinstance(model, FSDPModule)
    # The first time moves all gradients to the type they are summed in, the second time sums them.
    for synchronize in (False, True):
        model.set_requires_gradient_sync(synchronize)
        probe = torch.zeros((), device=next(model.parameters()).device, requires_grad=True)
        model.end_of_step(probe).backward()  # type: ignore[operator]
    model.set_requires_gradient_sync(False)


def _end_of_step(probe: Tensor) -> Tensor:
    """Replaces the root's forward pass; the end of its backward pass is where FSDP reduces all gradients."""
    return probe.clone()


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


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _reshard(model: nn.Module) -> None:
    for unit in _units(model):
        unit.reshard()
