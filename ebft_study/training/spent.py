"""The cost of a run: FLOPs by phase, sampled tokens, time and energy, and the counters behind them.

FLOPs are those of the cost model for the passes that the run makes: sequences and prompts count as full, every
completion as distinct, whole answers at their mean length. All numbers are of all workers.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ebft_study.config import RunConfig
from ebft_study.cost import Limits, MicroBatchPlan, StepCost, StepShape, answers_flops, step_cost
from ebft_study.networks.loading import trained_parameters
from ebft_study.training.energy import EnergyMeter
from ebft_study.training.memory import MemoryPlan, evaluated_sequence_flops, shapes

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass
class Spent:
    """Sums since the base model, with what a checkpoint brought; NaN: not known. See `results.metrics.COST`."""

    rollout_flops: float = 0.0
    feature_flops: float = 0.0
    scoring_flops: float = 0.0
    evaluation_flops: float = 0.0
    sampled_tokens: float = 0.0
    update_seconds: float = 0.0
    cpu_seconds: float = 0.0
    energy_joules: float = 0.0

    @staticmethod
    def from_checkpoint(saved: Mapping[str, float] | None) -> Spent:
        """What led to a checkpoint; unknown for those of version 0.1, which do not say."""
        if saved is None:
            return Spent(**dict.fromkeys((field.name for field in dataclasses.fields(Spent)), math.nan))
        return Spent(**saved)

    def add_update(self, cost: StepCost, *, sampled_tokens: float, seconds: float) -> None:
        self.rollout_flops += cost.rollouts.flops
        self.feature_flops += cost.features.flops
        self.scoring_flops += cost.scoring.flops
        self.sampled_tokens += sampled_tokens
        self.update_seconds += seconds

    def row(self) -> dict[str, float]:
        """Columns of `metrics`, without those that are not known."""
        values = {"flops": self.rollout_flops + self.feature_flops + self.scoring_flops, **dataclasses.asdict(self)}
        return {name: value for name, value in values.items() if not math.isnan(value)}


class CostMeter:
    """The cost of the updates and evaluations of a run, and the counters of its devices."""

    def __init__(self, config: RunConfig, plan: MemoryPlan, device: torch.device, *, world_size: int) -> None:
        self._config, self._shapes = config, shapes(config)
        again = plan.activation_checkpointing
        self._step = StepShape.from_config(config, world_size=world_size, activation_checkpointing=again)
        self._energy, self._cpu = EnergyMeter(device, world_size=world_size), time.process_time()
        self._limits = Limits.on(device.type)
        self.set_passes(plan)

    def set_passes(self, plan: MemoryPlan) -> None:
        """Count the updates to come with the passes of another plan."""
        self._passes = MicroBatchPlan(plan.micro_batch_size, plan.anchors_at_once)
        self._costs: dict[StepShape, StepCost] = {}

    def update(self, *, samples: bool, sampled_tokens: float = 0.0) -> StepCost:
        """The cost of an update by the method, or by SFT where it samples nothing.

        Whole answers count at the mean length of those that were sampled.
        """
        step = self._step if samples else dataclasses.replace(self._step, method="sft")
        if samples and step.whole_answers:
            mean = sampled_tokens / (step.batch_size * step.n_samples)
            step = dataclasses.replace(step, completion_length=max(round(mean), 1))
        if step not in self._costs:
            self._costs[step] = step_cost(*self._shapes, step, plan=self._passes, limits=self._limits)
        return self._costs[step]

    def evaluation(self, *, sequences: int, completion_length: int) -> float:
        """FLOPs of an evaluation at completion lengths of which the longest is given."""
        return sequences * evaluated_sequence_flops(self._config, completion_length=completion_length)

    def answers(self, tokens: float, pairs: float, drawn: float) -> float:
        """FLOPs of sampling answers: tokens run, keys that they met, and tokens drawn."""
        return answers_flops(self._shapes[0], tokens, pairs, drawn)

    def lap(self) -> tuple[float, float]:
        """Processor seconds of this process, and joules of its device, since the last call."""
        before, self._cpu = self._cpu, time.process_time()
        return self._cpu - before, self._energy.lap()

    def parameters(self, model: nn.Module) -> dict[str, float]:
        """Numbers of parameters, as columns of `trials`; the feature network's are those up to its deepest layer."""
        network = self._shapes[1]
        cut = network.cut(self._step.depths)
        norm = network.hidden_size if cut.n_layers < network.n_layers else 0  # the final one goes with the last layer
        return {
            "parameters": float(sum(p.numel() for p in model.parameters())),
            "trainable_parameters": float(sum(p.numel() for p in trained_parameters(model).values())),
            "feature_parameters": float(cut.body_parameters - norm),
        }
