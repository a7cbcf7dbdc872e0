"""Exponential moving average of the weights (EMA), used for evaluation when asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ebft_study.networks.loading import trained_parameters


class WeightAverage:
    """`average <- decay * average + (1 - decay) * weights` after every update; does nothing when `decay` is None.

    It holds the trained weights alone, in float32: in fewer digits the small steps of an average would be lost.
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {}
        if decay is not None:
            self.weights = {name: p.detach().float().clone() for name, p in trained_parameters(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the current weights."""
        if self.decay is not None:
            for name, weight in trained_parameters(model).items():
                self.weights[name].lerp_(weight.float(), 1.0 - self.decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights inside, and its own again afterwards."""
        own = self._exchange(model, self.weights)
        try:
            yield
        finally:
            self._exchange(model, own)

    @torch.no_grad()
    def _exchange(self, model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy weights into the model; returns copies of what it had."""
        if self.decay is None:
            return {}
        parameters = trained_parameters(model)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
        return before
