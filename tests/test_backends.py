"""The contract suites, applied to every backend there is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from ebft_study.features import FeatureBackend
from ebft_study.features.local import LocalFeatures
from ebft_study.rollouts import RolloutBackend
from ebft_study.rollouts.strided import StridedRollouts
from tests.contracts.features import FeatureContract
from tests.contracts.rollouts import RolloutContract


class TestStridedRollouts(RolloutContract):
    @pytest.fixture
    def backend(self) -> RolloutBackend:
        return StridedRollouts()


class TestLocalFeatures(FeatureContract):
    @pytest.fixture
    def make(self) -> Callable[..., FeatureBackend]:
        def build(network: nn.Module) -> FeatureBackend:
            return LocalFeatures(network, depths=(0.25, 0.5, 0.75), pooling="last_token", normalize="per_layer")

        return build
