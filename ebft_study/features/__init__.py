"""Embedding completions with a frozen network. Backends share the `FeatureBackend` protocol and one contract suite.

local.py      the network in the training process
service.py    one network for all trials of a study, in a Ray actor, and the trials' client
embedder.py   what that actor does: many requests, few passes, nothing computed twice
keys.py       the digest of everything that a feature depends on
cache.py      features by key, in memory and on disk
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ebft_study.algorithm.anchors import Anchors
from ebft_study.algorithm.features import Normalization, Pooling
from ebft_study.data import Batch

if TYPE_CHECKING:
    from ebft_study.config import RunConfig
    from ebft_study.networks.blocks import Backend


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
    """Layers at the configured depths, numbered as `hidden_states` is."""
    pooling: Pooling
    normalize: Normalization

    def embed(
        self, batch: Batch, anchors: Anchors, completions: Tensor, *, lengths: Sequence[int] | None = None
    ) -> list[Features]:
        """Embed the first `length` tokens of `completions` [S, B, n, G]; one entry per length (default: G)."""
        ...

    def free_prefix(self) -> None:
        """Free what is kept of the batch that was embedded last."""
        ...

    def drain_usage(self) -> dict[str, tuple[float, float]]:
        """Return (sum, count) of each metric that the backend has measured since the last call."""
        ...


@dataclass(frozen=True)
class NetworkOptions:
    """The network of a feature service and the size of its cache, as plain values. Needs no Ray."""

    name: str
    revision: str | None
    random_weights: bool
    precision: str
    device: str
    attention: Backend
    memory_bytes: int
    disk_bytes: int
    threads: int = 1

    @staticmethod
    def from_config(config: RunConfig, *, device: torch.device, threads: int = 1) -> NetworkOptions:
        """Return the options for a run's feature network, which serves all depths, poolings and normalisations."""
        features, (name, revision) = config.features, config.feature_model
        return NetworkOptions(
            name=name,
            revision=revision,
            random_weights=features.random_weights,
            precision=config.training.precision,
            device=device.type,
            attention=config.training.attention,
            memory_bytes=int(features.cache_memory_gib * 2**30),
            disk_bytes=int(features.cache_disk_gib * 2**30),
            threads=threads,
        )

    @property
    def service_name(self) -> str:
        """Name of the actor: the same for all runs that can share a service."""
        identity = {key: value for key, value in dataclasses.asdict(self).items() if key != "threads"}
        return f"features-{hashlib.blake2b(json.dumps(identity).encode(), digest_size=6).hexdigest()}"
