"""AdamW, and its form for weights that have too few digits for small steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from ebft_study.config import OptimizerConfig

ROUNDING_STREAM = 2
_AT_ONCE = 2**22
"""Weights that are updated at a time, so that their float32 copies take little memory."""


def new_optimizer(
    parameters: Sequence[nn.Parameter],
    config: OptimizerConfig,
    *,
    learning_rate: float,
    rounding_key: Callable[[], Sequence[int]],
) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only.

    Args:
        rounding_key: called in every step; stochastic rounding is a function of what it returns.
    """
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": learning_rate, "betas": config.betas, "fused": True}
    if config.rounding == "nearest":
        return torch.optim.AdamW(groups, **options)
    return StochasticAdamW(groups, key=rounding_key, **options)


class StochasticAdamW(torch.optim.AdamW):
    """AdamW for bfloat16 weights: computed in float32, and rounded so that no step is lost on average.

    The states are rounded in the same way: with beta close to 1, averages of gradients move by small steps, too.
    """

    def __init__(self, groups: Any, *, key: Callable[[], Sequence[int]], **options: Any) -> None:
        """Take AdamW's arguments; `key` is called in every step, and the noise is a function of what it returns."""
        super().__init__(groups, **options)
        self._key = key

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every weight that has a gradient; `closure` is not supported."""
        assert closure is None
        seed = int(np.random.SeedSequence([*self._key()]).generate_state(1, np.uint64)[0])
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                device = parameter.device
                generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
                self._update(parameter, group, generator)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any], generator: torch.Generator) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        tensors = (parameter, state["exp_avg"], state["exp_avg_sq"], parameter.grad)
        for parts in zip(*(_local(tensor).view(-1).split(_AT_ONCE) for tensor in tensors), strict=True):
            weight, average, square, gradient = (part.float() for part in parts)
            adamw(
                [weight], [gradient], [average], [square], [], [state["step"].clone()],
                fused=True, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
            for part, exact in zip(parts, (weight, average, square), strict=False):
                part.copy_(round_stochastically(exact, generator))
        state["step"] += 1


def _local(tensor: Any) -> Tensor:
    """This worker's shard, in the same memory; any other tensor as it is."""
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def round_stochastically(exact: Tensor, generator: torch.Generator) -> Tensor:
    """One of the two bfloat16 neighbours of each float32 number, at random, so that the mean is the number; [N] -> [N].

    A number halfway between them becomes either one equally often, and a bfloat16 number stays as it is.
    """
    draws = torch.empty(-(-len(exact) // 4), dtype=torch.int64, device=exact.device)
    noise = draws.random_(-(2**63), None, generator=generator).view(torch.int16)[: len(exact)]
    # The upper half of a float32 number is the bfloat16 number below it; noise in the lower half carries over into it.
    bits = exact.view(torch.int32) + (noise.int() & 0xFFFF)
    return (bits >> 16).short().view(torch.bfloat16)
