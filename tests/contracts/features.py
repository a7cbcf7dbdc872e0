"""What every feature backend must hold. Subclass and give a `make` fixture that builds one for a network."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ebft_study.algorithm.anchors import Anchors, completions_at, find_anchors
from ebft_study.algorithm.features import Normalization
from ebft_study.data import Batch
from ebft_study.features import FeatureBackend, Features
from tests.references import naive_model
from tests.small_models import VOCABULARY, small_batch, small_model

Make = Callable[..., FeatureBackend]
"""`make(pooling=..., normalize=...)`: a backend at depths 0.25, 0.5, 0.75 of `small_model()`."""
DEPTHS = (0.25, 0.5, 0.75)


def anchors_in(batch: Batch, G: int) -> Anchors:
    return find_anchors(batch.document_ids, completion_length=G, stride=4, first_context_length=3)


def random_completions(anchors: Anchors, n: int, G: int, seed: int = 0) -> torch.Tensor:
    shape = (*anchors.positions.shape, n, G)
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


class FeatureContract:
    """Equal to plain forward passes, frozen, and the same for sampled and real completions."""

    @pytest.fixture
    def make(self) -> Make:
        raise AssertionError("give a builder of the backend under test")

    def test_sampling_the_ground_truth_gives_its_features(self, make: Make) -> None:
        batch = small_batch([[0] * 16, [0] * 11 + [-1] * 5])
        anchors = anchors_in(batch, 4)
        truth = completions_at(batch.tokens, anchors, 4)
        features = make().embed(batch, anchors, truth[:, :, None].expand(-1, -1, 2, -1))[0]
        for j in range(2):
            sampled, real = features.phi[:, :, j][anchors.valid], features.psi[anchors.valid]
            torch.testing.assert_close(sampled, real, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("pooling", ["last_token", "mean", "concat"])
    @pytest.mark.parametrize("normalize", typing.get_args(Normalization))
    def test_features_equal_a_plain_forward_pass_at_every_length(
        self, make: Make, pooling: str, normalize: str
    ) -> None:
        """Of packed documents and ragged rows, of samples and ground truth."""
        batch, plain = small_batch([[0] * 9 + [1] * 11, [0] * 13 + [-1] * 7]), small_model()
        anchors = anchors_in(batch, 4)
        completions = random_completions(anchors, 3, 4)
        both = make(pooling=pooling, normalize=normalize).embed(batch, anchors, completions, lengths=[2, 4])
        for length, features in zip([2, 4], both, strict=True):
            for s, b in anchors.valid.nonzero().tolist():
                a = int(anchors.positions[s, b])
                context = batch.tokens[s, 9:a] if s == 0 and a > 9 else batch.tokens[s, :a]

                def expected(completion: Any, context: Any = context, length: int = length) -> Any:
                    return naive_model.features(plain, context, completion[:length], [1, 2, 3], pooling, normalize)

                truth = expected(batch.tokens[s, a : a + 4])
                torch.testing.assert_close(features.psi[s, b], truth, atol=1e-5, rtol=1e-5)
                for j in range(3):
                    wanted = expected(completions[s, b, j])
                    torch.testing.assert_close(features.phi[s, b, j], wanted, atol=1e-5, rtol=1e-5)

    def test_asking_again_gives_the_same(self, make: Make) -> None:
        backend, batch = make(), small_batch([[0] * 16, [0] * 16])
        anchors = anchors_in(batch, 4)
        completions = random_completions(anchors, 2, 4)

        def asked() -> Features:
            # Another batch of the same content, as the next epoch brings it.
            again = Batch(batch.tokens.clone(), batch.document_ids, batch.answer_mask, batch.indices)
            return backend.embed(again, anchors, completions)[0]

        first, second = asked(), asked()
        torch.testing.assert_close(first.phi, second.phi, atol=1e-6, rtol=0)
        torch.testing.assert_close(first.psi, second.psi, atol=1e-6, rtol=0)

    def test_other_completions_of_known_contexts_have_their_own_features(self, make: Make) -> None:
        backend, batch, plain = make(), small_batch([[0] * 16]), small_model()
        anchors = anchors_in(batch, 4)
        known, new = random_completions(anchors, 3, 4), random_completions(anchors, 3, 4, seed=1)
        mixed = torch.cat([new[:, :, :1], known[:, :, 1:2], new[:, :, 2:]], dim=2)
        backend.embed(batch, anchors, known)
        features = backend.embed(batch, anchors, mixed)[0]
        for b, j in [(0, 0), (0, 1), (1, 2)]:
            a = int(anchors.positions[0, b])
            expected = naive_model.features(
                plain, batch.tokens[0, :a], mixed[0, b, j], [1, 2, 3], "last_token", "per_layer"
            )
            torch.testing.assert_close(features.phi[0, b, j], expected, atol=1e-5, rtol=1e-5)

    def test_features_carry_no_gradient(self, make: Make) -> None:
        batch = small_batch([[0] * 16])
        anchors = anchors_in(batch, 4)
        features = make().embed(batch, anchors, random_completions(anchors, 2, 4))[0]
        assert not features.phi.requires_grad
        assert not features.psi.requires_grad

    def test_layers_are_those_that_the_depths_stand_for(self, make: Make) -> None:
        assert make().indices == [1, 2, 3]
