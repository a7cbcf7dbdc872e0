"""The contract suites, applied to every backend that needs no other process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ebft_study.algorithm.anchors import Anchors
from ebft_study.data import Batch
from ebft_study.features import Features
from ebft_study.features.cache import MemoryCache, TieredCache
from ebft_study.features.embedder import Embedder, FeatureRequest
from ebft_study.features.keys import FeatureSpec
from ebft_study.features.local import LocalFeatures
from ebft_study.rollouts import RolloutBackend
from ebft_study.rollouts.strided import StridedRollouts
from tests.contracts.features import DEPTHS, FeatureContract, Make
from tests.contracts.rollouts import RolloutContract
from tests.small_models import small_model


class TestStridedRollouts(RolloutContract):
    @pytest.fixture
    def backend(self) -> RolloutBackend:
        return StridedRollouts()


class TestLocalFeatures(FeatureContract):
    @pytest.fixture
    def make(self) -> Make:
        def build(pooling: Any = "last_token", normalize: Any = "per_layer") -> LocalFeatures:
            return LocalFeatures(small_model(), depths=DEPTHS, pooling=pooling, normalize=normalize)

        return build


class InProcess:
    """A backend over an embedder, as the service is, without its actor."""

    pooling: Any
    normalize: Any
    fingerprint = "f"

    def __init__(self, embedder: Embedder, spec: FeatureSpec) -> None:
        self.embedder, self.spec = embedder, spec
        self.indices, self.pooling, self.normalize = embedder.indices(spec), spec.pooling, spec.normalize

    def embed(
        self, batch: Batch, anchors: Anchors, completions: Tensor, *, lengths: Sequence[int] | None = None
    ) -> list[Features]:
        (reply,) = self.embedder.embed([FeatureRequest.from_batch(self.spec, batch, anchors, completions, lengths)])
        return [Features(torch.tensor(phi), torch.tensor(psi)) for phi, psi in zip(reply.phi, reply.psi, strict=True)]

    def drain_usage(self) -> dict[str, tuple[float, float]]:
        return {}


@pytest.mark.parametrize("capacity", [0, 2**14, 2**24], ids=["no cache", "small cache", "cache"])
class TestEmbedder(FeatureContract):
    @pytest.fixture
    def make(self, capacity: int) -> Make:
        embedder = Embedder(small_model(), TieredCache(MemoryCache(capacity), None), fingerprint="f")

        def build(pooling: Any = "last_token", normalize: Any = "per_layer") -> InProcess:
            return InProcess(embedder, FeatureSpec(DEPTHS, pooling, normalize))

        return build
