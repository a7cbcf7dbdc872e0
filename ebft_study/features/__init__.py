"""Embedding completions with a frozen network. Backends share the `FeatureBackend` protocol and one contract suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ebft_study.algorithm.anchors import Anchors
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

    def embed(
        self, batch: Batch, anchors: Anchors, completions: Tensor, *, lengths: Sequence[int] | None = None
    ) -> list[Features]:
        """Features of the first `length` tokens of `completions` [S, B, n, G], one entry per length (default: G)."""
        ...
