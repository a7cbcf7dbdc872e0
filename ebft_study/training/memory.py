"""Plan a run's passes so that they fit into memory, before anything is loaded."""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from ebft_study.config import RunConfig
from ebft_study.cost import (
    Limits,
    ModelShape,
    StepShape,
    evaluation_flops,
    largest_plan,
    memory,
    step_cost,
    step_seconds,
)
from ebft_study.errors import ConfigError
from ebft_study.networks.lora import ALL
from ebft_study.training.engine_memory import engine_memory

_GIB = 2**30
CPU_BUDGET_BYTES = 4 * _GIB
"""Larger passes are no faster on a CPU, and trials share it. A model that needs more gets twice as much, and so on."""
USABLE = 0.9
"""Fraction of a GPU's or a machine's memory; the rest is for kernels' own buffers, fragmentation and libraries."""
LARGE_GPU_BYTES = 79 * _GIB
"""What `total_memory` finds on a card of 80 GB."""
_CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class MemoryPlan:
    """Numbers of sequences and anchors that a pass takes at a time, and the peak memory that it should need.

    Activations are computed again in the backward pass where the run says so or, with `auto` on a GPU, where a step
    should take less time with them, because more fits into a pass.
    """

    micro_batch_size: int
    anchors_at_once: int
    peak_bytes: float
    budget_bytes: float
    activation_checkpointing: bool = False

    def describe(self) -> str:
        """One line for the run's record."""
        again = ", activation_checkpointing" if self.activation_checkpointing else ""
        return (
            f"micro_batch_size={self.micro_batch_size}, anchors_at_once={self.anchors_at_once}{again}: "
            f"about {self.peak_bytes / _GIB:.2f} of {self.budget_bytes / _GIB:.2f} GiB"
        )


def plan_micro_batches(
    config: RunConfig, device: torch.device, *, world_size: int, gpu_fraction: float = 1.0
) -> MemoryPlan:
    """The plan of a run on this machine: `plan_for` a device with its memory."""
    total = total_memory(device)
    return plan_for(config, device.type, total_bytes=total, world_size=world_size, gpu_fraction=gpu_fraction)


def plan_for(
    config: RunConfig, device: str, *, total_bytes: float, world_size: int, gpu_fraction: float = 1.0
) -> MemoryPlan:
    """The best plan that fits; depends on the configuration, the shapes of the models and the type of machine alone.

    Reads no weights, so what cannot fit is refused before any are loaded. All workers and a resumed run make the same
    plan, whatever else uses the memory.

    Args:
        device: `cpu` or `cuda`; no such device is needed.
        total_bytes: of a GPU, or of the machine.
        gpu_fraction: the part of a GPU that is the worker's.

    Raises:
        ConfigError: not even the smallest plan fits, with the bytes it needs and what to change.
        ModelError: there is no such model.
    """
    for budget in budgets(config, device, total_bytes=total_bytes, gpu_fraction=gpu_fraction):
        try:
            return fit_memory(config, device, world_size=world_size, budget_bytes=budget)
        except ConfigError as error:
            refusal = error
    raise refusal


def fit_memory(config: RunConfig, device: str, *, world_size: int, budget_bytes: float) -> MemoryPlan:
    """The best plan that fits into a budget, on `cpu` or `cuda`; no such device is needed.

    Raises:
        ConfigError: see `cost.largest_plan`.
    """
    shape, network = shapes(config)
    step = StepShape.from_config(config, world_size=world_size, judge_parameters=judge_parameters(config))
    limits, wanted = Limits.on(device), config.training.activation_checkpointing
    choices = [wanted] if isinstance(wanted, bool) else [False, True] if device == "cuda" else [False]
    chosen = (config.training.micro_batch_size, config.training.anchors_at_once)
    found = list[tuple[float, MemoryPlan]]()
    for checkpointing in choices:
        step = replace(step, activation_checkpointing=checkpointing)
        try:
            plan = largest_plan(shape, network, step, budget_bytes=budget_bytes, limits=limits, given=chosen)
        except ConfigError as error:
            refusal = error
            continue
        peak = memory(shape, network, step, plan, limits=limits).peak_bytes
        seconds = step_seconds(shape, network, step, plan, limits=limits)
        made = MemoryPlan(plan.micro_batch_size, plan.anchors_at_once, peak, budget_bytes, checkpointing)
        found.append((seconds, made))
    if not found:
        raise refusal
    return min(found, key=lambda each: each[0])[1]


def smaller(config: RunConfig, device: str, plan: MemoryPlan) -> MemoryPlan | None:
    """The plan of one worker with passes of half as many sequences or, of single ones, of half as many anchors.

    None where they have one of each.
    """
    names = ("micro_batch_size", "anchors_at_once", "activation_checkpointing")
    changes = {name: getattr(plan, name) for name in names}
    name = next((name for name in names[:2] if changes[name] > 1), None)
    if name is None:
        return None
    changes[name] = math.ceil(changes[name] / 2)
    changed = config.model_copy(update={"training": config.training.model_copy(update=changes)})
    return replace(fit_memory(changed, device, world_size=1, budget_bytes=math.inf), budget_bytes=plan.budget_bytes)


def budgets(config: RunConfig, device: str, *, total_bytes: float, gpu_fraction: float = 1.0) -> list[float]:
    """Bytes that a worker may use: the first number is the aim, the last one the limit.

    A colocated engine sleeps during training, but the trainer keeps the memory of its largest pass when it wakes.

    Raises:
        ConfigError: the engine leaves nothing.
    """
    if config.training.memory_budget_gib is not None:
        return [config.training.memory_budget_gib * _GIB]
    if device == "cuda":
        return [USABLE * own_fraction(config, gpu_fraction) * total_bytes]
    engine = engine_memory(config, device, shapes(config)[0]).total_bytes if config.uses_engine else 0.0
    limit, doubled = USABLE * total_bytes - engine, float(CPU_BUDGET_BYTES)
    if limit <= 0:
        raise ConfigError(
            f"rollout.backend='vllm': memory={total_bytes / _GIB:.3g} GiB, and the engine takes {engine / _GIB:.3g} "
            "GiB, weights in /dev/shm included. Use a smaller vllm.kv_cache_gib or model, or backend=strided"
        )
    aims = list[float]()
    while doubled < limit:
        aims, doubled = [*aims, doubled], 2 * doubled
    return [*aims, limit]


def own_fraction(config: RunConfig, gpu_fraction: float) -> float:
    """The part of a GPU that is the worker's own, without that of an engine beside it.

    Raises:
        ConfigError: the engine leaves nothing.
    """
    colocated = config.uses_engine and config.vllm.placement == "colocated"
    rest = gpu_fraction - (config.vllm.gpu_memory_utilization if colocated else 0.0)
    if rest <= 0:
        raise ConfigError(
            f"vllm.gpu_memory_utilization={config.vllm.gpu_memory_utilization:g}: a worker has {gpu_fraction:g} of "
            "a GPU, and the engine takes all of it. Use a smaller one, more gpus_per_worker, or placement=own"
        )
    return rest


def total_memory(device: torch.device) -> float:
    """Bytes of the GPU, or of the machine (or container), in whole GiB: cards of one type report slightly different."""
    if device.type == "cuda":
        total = float(torch.cuda.get_device_properties(device).total_memory)
    else:
        total = min(float(psutil.virtual_memory().total), _container_limit())
    return total - total % _GIB or total


def shortage(device: torch.device, plan: MemoryPlan) -> str:
    """What to say where less memory is free than a plan needs, before anything is loaded; '' where there is enough."""
    free = free_memory(device)
    if free >= plan.peak_bytes:
        return ""
    return (
        f"{free:.0f} bytes ({free / _GIB:.3g} GiB) of memory are free, and a step needs about {plan.peak_bytes:.0f} "
        f"({plan.peak_bytes / _GIB:.3g} GiB): the run may end for lack of it. End other programs, run fewer trials at "
        "a time, or set training.memory_budget_gib"
    )


def free_memory(device: torch.device) -> float:
    """Bytes that this process can have: of the GPU, or of the machine (or container)."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    return min(float(psutil.virtual_memory().available), _container_limit())


def _container_limit() -> float:
    """Bytes that the control group of a container may use, in version 1 or 2; infinite without limit."""
    for file in _CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            return float(file.read_text())
    return math.inf


def shapes(config: RunConfig) -> tuple[ModelShape, ModelShape]:
    """Shapes of the generator, adapters included, and of the feature network, all its layers included."""
    base = _shape(config.model, config.model_revision)
    name = config.features.feature_network
    network = base if name == "base" else _shape(name, None)
    if config.lora.lora_rank == 0:
        return base, network
    targets = None if config.lora.lora_targets == (ALL,) else config.lora.lora_targets
    return base.with_adapters(config.lora.lora_rank, targets), network


def judge_shape(config: RunConfig) -> ModelShape | None:
    """Shape of the judge, all its layers included; None without one."""
    return None if config.evaluation.judge is None else _shape(config.evaluation.judge, None)


def evaluated_sequence_flops(config: RunConfig, *, completion_length: int) -> float:
    """FLOPs of the evaluation of one sequence at completion lengths of which the longest is given, judge included."""
    evaluation, (model, network), judge = config.evaluation, shapes(config), judge_shape(config)
    changes: dict[str, Any] = {"completion_length": completion_length, "n_samples": evaluation.cfm_samples}
    contexts = {"whole_answers": False, "context_length": config.rollout.context_length}
    step = StepShape.from_config(config, method="ebft", batch_size=1, **contexts, **changes)
    flops = evaluation_flops(model, network, step)
    if judge is None:
        return flops
    length = evaluation.judge_completion_length
    of_judge: dict[str, Any] = {"depths": evaluation.judge_depths, "pooling": evaluation.judge_pooling}
    judged = step_cost(model, judge, replace(step, completion_length=length, **of_judge))
    return flops + judged.features.flops + (judged.rollouts.flops if length != completion_length else 0.0)


def judge_parameters(config: RunConfig) -> int:
    """Weights that a worker holds for the judge besides those of the feature network."""
    judge, (_, network) = judge_shape(config), shapes(config)
    if judge is None:
        return 0
    needed = judge.cut(config.evaluation.judge_depths).body_parameters
    if not config.judge_is_feature_network:
        return needed
    if config.features.backend == "service" or (config.lora.lora_rank > 0 and config.features.is_base):
        return 0
    return max(needed - network.cut(config.features.depths).body_parameters, 0)


@functools.cache
def _shape(name: str, revision: str | None) -> ModelShape:
    from ebft_study.networks.loading import read_config  # loads transformers, which a study's driver may never need

    return ModelShape.from_config(read_config(name, revision=revision))
