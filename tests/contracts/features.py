"""What every feature backend must hold. Subclass and give a `make` fixture that builds one for a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ebft_study.algorithm.anchors import completions_at, find_anchors
from ebft_study.features import FeatureBackend
from tests.references import naive_model
from tests.small_models import small_batch, small_model


class FeatureContract:
    """Equal to plain forward passes, frozen, and the same for sampled and real completions."""

    @pytest.fixture
    def make(self) -> Callable[..., FeatureBackend]:
        raise AssertionError("give a builder of the backend under test")

    def embed(self, backend: FeatureBackend, G: int = 4) -> tuple[Any, Any, Any]:
        batch = small_batch([[0] * 16, [0] * 11 + [-1] * 5])
        anchors = find_anchors(batch.document_ids, completion_length=G, stride=4, first_context_length=4)
        truth = completions_at(batch.tokens, anchors, G)
        return batch, anchors, backend.embed(batch, anchors, truth[:, :, None].expand(-1, -1, 2, -1))[0]

    def test_sampling_the_ground_truth_gives_its_features(self, make: Callable[..., FeatureBackend]) -> None:
        _, anchors, features = self.embed(make(small_model()))
        for j in range(2):
            sampled, real = features.phi[:, :, j][anchors.valid], features.psi[anchors.valid]
            torch.testing.assert_close(sampled, real, atol=1e-5, rtol=1e-5)

    def test_features_equal_a_plain_forward_pass(self, make: Callable[..., FeatureBackend]) -> None:
        batch, anchors, features = self.embed(make(small_model()))
        plain = small_model()
        for b, a in enumerate(anchors.positions[0].tolist()):
            expected = naive_model.features(
                plain, batch.tokens[0, :a], batch.tokens[0, a : a + 4], [1, 2, 3], "last_token", "per_layer"
            )
            torch.testing.assert_close(features.psi[0, b], expected, atol=1e-5, rtol=1e-5)

    def test_features_carry_no_gradient(self, make: Callable[..., FeatureBackend]) -> None:
        _, _, features = self.embed(make(small_model()))
        assert not features.phi.requires_grad
        assert not features.psi.requires_grad
