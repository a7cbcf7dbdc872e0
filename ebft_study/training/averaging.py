"""Exponential moving average of the weights (EMA), used for evaluation when asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """`average <- decay * average + (1 - decay) * weights` after every update; does nothing when `decay` is None."""

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.decay = decay
        self.weights: list[Tensor] = []
        if decay is not None:
            self.weights = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the current weights."""
        if self.decay is not None:
            for average, weight in zip(self.weights, model.parameters(), strict=True):
                average.lerp_(weight, 1.0 - self.decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights inside, and its own again afterwards."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _swap(self, model: nn.Module) -> None:
        if self.decay is not None:
            for index, parameter in enumerate(model.parameters()):
                self.weights[index], parameter.data = parameter.data, self.weights[index]

    def state(self) -> list[Tensor]:
        return self.weights

    def restore(self, state: list[Tensor]) -> None:
        """Copy a saved average back."""
        for average, saved in zip(self.weights, state, strict=True):
            average.copy_(saved)
