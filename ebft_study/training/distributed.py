"""Collectives over data-parallel workers. With one worker everything here does nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from ebft_study.evaluation import Measured, Moments
from ebft_study.methods import MetricAccumulator
from ebft_study.networks.loading import trained_parameters
from ebft_study.training.sharding import is_sharded, reduce_scatter_gradients


def sum_over_workers(values: Iterable[float], world_size: int, device: torch.device) -> list[float]:
    """Element-wise sums of plain numbers over all workers."""
    numbers = list(values)
    if world_size == 1:
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return [float(number) for number in tensor]


def sum_gradients(model: nn.Module, world_size: int) -> None:
    """Add up the gradients of all workers in place; losses already divide by global totals."""
    if is_sharded(model):
        reduce_scatter_gradients(model)
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


def sum_accumulator(
    accumulator: MetricAccumulator,
    names: Iterable[str],
    world_size: int,
    device: torch.device,
    *,
    peaks: Iterable[str] = (),
) -> MetricAccumulator:
    """The tally of all workers together; `names` and `peaks` fix the order, the same on all of them."""
    keys = sorted(names)
    sums = sum_over_workers((accumulator.sums.get(key, 0.0) for key in keys), world_size, device)
    counts = sum_over_workers((accumulator.counts.get(key, 0.0) for key in keys), world_size, device)
    found = _largest([accumulator.peaks.get(key, -math.inf) for key in sorted(peaks)], world_size, device)
    largest = {key: value for key, value in zip(sorted(peaks), found, strict=True) if value > -math.inf}
    return MetricAccumulator(dict(zip(keys, sums, strict=True)), dict(zip(keys, counts, strict=True)), largest)


def _largest(numbers: list[float], world_size: int, device: torch.device) -> list[float]:
    if world_size == 1:
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [float(number) for number in tensor]


def sum_measured(
    measured: Measured, keys: Iterable[tuple[str, int | None]], world_size: int, device: torch.device
) -> Measured:
    """Evaluation sums of all workers together; quantities that no worker met are left out."""
    total: Measured = {}
    for key in keys:
        mine = measured.get(key, Moments())
        moments = Moments(*sum_over_workers((mine.x, mine.m, mine.xx, mine.xm, mine.mm), world_size, device))
        if moments.m:
            total[key] = moments
    return total
