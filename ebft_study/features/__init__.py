"""Embedding completions with a frozen network. Backends share the `FeatureBackend` protocol and one contract suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ebft_study.algorithm.anchors import Anchors
from ebft_study.algorithm.features import Normalization, Pooling
from ebft_study.data import Batch


@dataclass(frozen=True)
class Features:
    """phi of the samples and psi of the ground truth, per context."""

    phi: Tensor
    """[S, B, n, d] float32"""
    psi: Tensor
    """[S, B, d] float32"""


class FeatureBackend(Protocol):
    """Embeds `c : y` for sampled and ground-truth completions with one frozen network."""

    fingerprint: str
    """Identifies the network's weights."""
    indices: list[int]
    """Layers that the depths stand for, as `hidden_states` counts them."""
    pooling: Pooling
    normalize: Normalization

    def embed(
        self, batch: Batch, anchors: Anchors, completions: Tensor, *, lengths: Sequence[int] | None = None
    ) -> list[Features]:
        """Features of the first `length` tokens of `completions` [S, B, n, G], one entry per length (default: G)."""
        ...

    def drain_usage(self) -> dict[str, tuple[float, float]]:
        """Sums and counts of what the backend measured of itself since the last call, by name of the metric."""
        ...
