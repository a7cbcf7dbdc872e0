"""Methods: the computation of one optimizer step. All share one signature, from a micro-batch to its gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ebft_study.algorithm.anchors import Anchors
from ebft_study.algorithm.losses import cross_entropy_loss
from ebft_study.data import Batch
from ebft_study.networks.blocks import Prefix, next_token_log_probs
from ebft_study.results.metrics import AGGREGATED, QUANTITIES, REGISTER, Aggregation, Metric, unknown

if TYPE_CHECKING:
    from ebft_study.config import LossConfig


@dataclass(frozen=True)
class LossDenominators:
    """Denominators of a step's losses, counted over all micro-batches of all workers."""

    contexts: float
    """Valid anchors."""
    ce_tokens: float
    """Tokens that carry cross-entropy."""
    policy_version: int = 0
    """Updates that the weights have seen."""


@dataclass(frozen=True)
class Observations:
    """Moments of what was observed of one quantity; those of several parts add up to those of the whole."""

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    largest: float = -math.inf
    smallest: float = math.inf

    def __add__(self, other: Observations) -> Observations:
        return Observations(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            max(self.largest, other.largest),
            min(self.smallest, other.smallest),
        )

    def aggregated(self, how: Aggregation, *, steps: int, workers: int) -> float:
        """The value of a metric of this quantity; see `Aggregation`."""
        mean = self.total / self.count
        values: dict[Aggregation, float] = {
            "mean": mean,
            "std": math.sqrt(max(self.squares / self.count - mean * mean, 0.0)),
            "effective_fraction": self.total * mean / self.squares if self.squares else math.nan,
            "min": self.smallest,
            "max": self.largest,
            "sum": self.total,
            "per_step": self.total / steps,
            "per_worker": self.total / steps / workers,
        }
        return values[how]


@dataclass
class MetricAccumulator:
    """Observations of registered quantities (`results.metrics`): of micro-batches, steps and workers."""

    observed: dict[str, Observations] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.observed:
            _metrics_of(name)

    def add(self, name: str, total: float | Tensor, count: float) -> None:
        """Add `count` observations that sum to `total`.

        A number that the parts of a step add up to takes any positive count where the part has observations.
        """
        if any(entry.aggregation in _BY_VALUE for entry in _metrics_of(name)):
            raise ValueError(f"{name}: a metric of it needs the single values. Use add_valid")
        self._add(name, Observations(count, float(total)))

    def add_valid(self, name: str, values: Tensor, valid: Tensor) -> None:
        """Add the entries of `values` [S, B, ...] whose anchor is valid [S, B]."""
        by_value, chosen = {entry.aggregation for entry in _metrics_of(name)} & _BY_VALUE, values[valid].double()
        if not by_value or not chosen.numel():
            self._add(name, Observations(float(chosen.numel()), float(chosen.sum())))
            return
        moments = torch.stack([chosen.sum(), chosen.square().sum(), chosen.max(), chosen.min()])
        self._add(name, Observations(float(chosen.numel()), *moments.tolist()))

    @contextmanager
    def seconds(self, name: str, device: torch.device) -> Iterator[None]:
        """Time a phase; on a GPU, wait for its kernels so that each phase pays for its own."""
        started = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.add(name, time.perf_counter() - started, 1.0)

    def of(self, name: str) -> Observations:
        """The observations of a quantity so far."""
        return self.observed.get(name, Observations())

    def mean(self, name: str) -> float:
        """Mean of the observations; NaN if there were none."""
        return self.of(name).total / self.of(name).count if self.of(name).count else math.nan

    def row(self, *, steps: int = 1, workers: int = 1) -> dict[str, float]:
        """The value of every metric with an observation in these steps of all workers."""
        return {
            entry.name: self.of(entry.quantity).aggregated(entry.aggregation, steps=steps, workers=workers)
            for entry in AGGREGATED
            if self.of(entry.quantity).count
        }

    def _add(self, name: str, more: Observations) -> None:
        self.observed[name] = self.of(name) + more


_BY_VALUE: frozenset[Aggregation] = frozenset({"std", "effective_fraction", "min", "max"})
"""Aggregations that do not follow from sum and count."""


def _metrics_of(quantity: str) -> tuple[Metric, ...]:
    """The metrics that follow from a quantity; refuses a name from which none does, which no row would hold."""
    if quantity not in QUANTITIES:
        raise unknown("metric", quantity, QUANTITIES, REGISTER)
    return QUANTITIES[quantity]


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


@runtime_checkable
class SamplesAhead(Protocol):
    """A method that samples for all micro-batches of a step before it computes the gradient of the first."""

    def prepare(
        self,
        model: nn.Module,
        parts: Sequence[tuple[Batch, Anchors]],
        *,
        policy_version: int,
        accumulator: MetricAccumulator,
    ) -> None:
        """Sample for the micro-batches `parts`, in the order in which `backward` is going to be called with them."""
        ...


def cross_entropy_term(
    model: nn.Module,
    prefix: Prefix,
    batch: Batch,
    config: LossConfig,
    denominators: LossDenominators,
    accumulator: MetricAccumulator,
) -> float:
    """Add the gradient of `gamma * CE` of the sequences, and return its value; without gamma it is only measured."""
    mask = batch.ce_mask(config.ce_region)
    with torch.set_grad_enabled(config.gamma > 0):
        log_probs = next_token_log_probs(model, prefix.states, batch.tokens)
        loss = config.gamma * cross_entropy_loss(log_probs, mask, denominator=denominators.ce_tokens)
    accumulator.add("train_ce_loss", -log_probs.detach()[mask].double().sum(), float(mask.sum()))
    return differentiate(loss)


def differentiate(loss: Tensor) -> float:
    """Backward pass of a part of the loss, in the precision that its forward pass chose; returns its value."""
    if loss.requires_grad:
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()
    return float(loss.detach())
