"""How a run's steps are cut so that they fit into memory, decided before the first one."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from ebft_study.config import RunConfig
from ebft_study.cost import Limits, MicroBatchPlan, ModelShape, StepShape, largest_plan, memory
from ebft_study.errors import ConfigError
from ebft_study.networks.lora import ALL

CPU_BUDGET_BYTES = 4 * 2**30
"""Larger passes are no faster on a CPU, and trials share it. A model that needs more gets what the machine has."""
GPU_FRACTION = 0.9
"""The rest is for kernels' own buffers and fragmentation."""


@dataclass(frozen=True)
class MemoryPlan:
    """A split and what it is expected to take."""

    split: MicroBatchPlan
    peak_bytes: float
    budget_bytes: float

    def describe(self) -> str:
        """One line for the run's record."""
        return (
            f"micro_batch_size={self.split.micro_batch_size}, anchors_at_once={self.split.anchors_at_once}: "
            f"about {self.peak_bytes / 2**30:.2f} of {self.budget_bytes / 2**30:.2f} GiB"
        )


def plan_micro_batches(config: RunConfig, device: torch.device, *, world_size: int) -> MemoryPlan:
    """The fewest passes that fit; depends on the configuration, the shapes of the models and the kind of device alone.

    Reads no weights, so what cannot fit is refused before any are loaded.

    Raises:
        ConfigError: not even the smallest split fits, with the bytes it needs and what to change.
        ModelError: there is no such model.
    """
    for budget in budgets(config, device):
        try:
            return fit_memory(config, device.type, world_size=world_size, budget_bytes=budget)
        except ConfigError as error:
            refusal = error
    raise refusal


def fit_memory(config: RunConfig, device: str, *, world_size: int, budget_bytes: float) -> MemoryPlan:
    """The fewest passes that fit into a budget, on `cpu` or `cuda`; no such device is needed.

    Raises: see `choose_split`.
    """
    shape, network = shapes(config)
    step, limits = StepShape.from_config(config, world_size=world_size), Limits.on(device)
    given = (config.training.micro_batch_size, config.training.anchors_at_once)
    split = largest_plan(shape, network, step, budget_bytes=budget_bytes, limits=limits, given=given)
    return MemoryPlan(split, memory(shape, network, step, split, limits=limits).peak_bytes, budget_bytes)


def budgets(config: RunConfig, device: torch.device) -> list[float]:
    """Bytes that a worker may use: the first is aimed at, the last is not to be exceeded."""
    if config.training.memory_budget_gib is not None:
        return [config.training.memory_budget_gib * 2**30]
    if device.type == "cuda":
        return [GPU_FRACTION * torch.cuda.get_device_properties(device).total_memory]
    return [CPU_BUDGET_BYTES, float(psutil.virtual_memory().total)]


def shapes(config: RunConfig) -> tuple[ModelShape, ModelShape]:
    """Of the generator, with its adapters, and of the whole feature network."""
    from ebft_study.networks.loading import (
        read_config,  # models' libraries take seconds, which a study's driver may never need
    )

    own = ModelShape.from_config(read_config(config.model, revision=config.model_revision))
    name = config.features.feature_network
    network = own if name == "base" else ModelShape.from_config(read_config(name))
    if config.lora.lora_rank == 0:
        return own, network
    targets = None if config.lora.lora_targets == (ALL,) else config.lora.lora_targets
    return own.with_adapters(config.lora.lora_rank, targets), network
