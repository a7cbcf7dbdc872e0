"""Methods: the computation of one optimizer step. All share one signature, from a micro-batch to its gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ebft_study.algorithm.anchors import Anchors
from ebft_study.data import Batch


@dataclass(frozen=True)
class LossDenominators:
    """Denominators of a step's losses, counted over all micro-batches of all workers."""

    contexts: float
    """Valid anchors."""
    ce_tokens: float
    """Tokens that carry cross-entropy."""
    policy_version: int = 0
    """Updates that the weights have seen."""


@dataclass
class MetricAccumulator:
    """Sums and counts of logged quantities; they add up over micro-batches, steps and workers."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    """Largest values."""

    def add(self, name: str, total: float | Tensor, count: float) -> None:
        """Add `count` observations that sum to `total`."""
        self.sums[name] = self.sums.get(name, 0.0) + float(total)
        self.counts[name] = self.counts.get(name, 0.0) + count

    def add_valid(self, name: str, values: Tensor, valid: Tensor) -> None:
        """Add the entries of `values` [S, B, ...] whose anchor is valid [S, B]."""
        chosen = values[valid]
        self.add(name, chosen.double().sum(), float(chosen.numel()))

    def peak(self, name: str, value: float | Tensor) -> None:
        """Keep the largest `value` seen."""
        self.peaks[name] = max(self.peaks.get(name, -math.inf), float(value))

    @contextmanager
    def seconds(self, name: str, device: torch.device) -> Iterator[None]:
        """Time a phase; on a GPU, wait for its kernels so that each phase pays for its own."""
        started = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.add(name, time.perf_counter() - started, 0.0)

    def total(self, name: str) -> tuple[float, float]:
        """Sum and count of the observations so far."""
        return self.sums.get(name, 0.0), self.counts.get(name, 0.0)

    def mean(self, name: str) -> float:
        """Mean of the observations; NaN if there were none."""
        count = self.counts.get(name, 0.0)
        return self.sums[name] / count if count else float("nan")


class Method(Protocol):
    """One way to update the generator."""

    def backward(
        self,
        model: nn.Module,
        batch: Batch,
        anchors: Anchors,
        *,
        noise: Tensor,
        denominators: LossDenominators,
        accumulator: MetricAccumulator,
    ) -> float:
        """Add this micro-batch's share of the loss's gradient to the parameters, and return that share.

        `noise` [S, B, n, G] drives the rollouts, if there are any.
        """
        ...


def differentiate(loss: Tensor) -> float:
    """Backward pass of a part of the loss, in the precision that its forward pass chose; returns its value."""
    if loss.requires_grad:
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()
    return float(loss.detach())
