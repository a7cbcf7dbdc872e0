"""What every rollout backend must hold. Subclass and give a `backend` fixture."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from ebft_study.algorithm.anchors import Anchors, find_anchors
from ebft_study.data import Batch
from ebft_study.rollouts import RolloutBackend
from tests.references import naive_model
from tests.small_models import VOCABULARY, small_batch, small_model

LONGEST = 24
"""Tokens of the longest prompt; a backend with a limit must take it with a completion of 4."""


class RolloutContract:
    """Shapes, determinism, exact length, true log-probabilities, true distribution."""

    @pytest.fixture
    def backend(self) -> RolloutBackend:
        raise AssertionError("give the backend under test")

    @pytest.fixture
    def model(self) -> nn.Module:
        return small_model()

    @pytest.mark.parametrize(("n", "G"), [(1, 1), (1, 4), (3, 4)])
    def test_completions_have_exactly_the_asked_shape(
        self, backend: RolloutBackend, model: nn.Module, n: int, G: int
    ) -> None:
        batch = small_batch([[0] * 16, [0] * 9 + [-1] * 7])
        anchors = find_anchors(batch.document_ids, completion_length=G, stride=3, first_context_length=2)
        noise = torch.rand(*anchors.positions.shape, n, G)
        rollouts = backend.sample(model, batch, anchors, noise=noise, temperature=0.6)
        assert rollouts.completions.shape == noise.shape == rollouts.log_probs.shape
        assert int(rollouts.completions.min()) >= 0
        assert int(rollouts.completions.max()) < VOCABULARY

    def test_the_same_noise_gives_the_same_completions(self, backend: RolloutBackend, model: nn.Module) -> None:
        batch = small_batch([[0] * 16])
        anchors = find_anchors(batch.document_ids, completion_length=4, stride=4, first_context_length=4)
        noise = torch.rand(*anchors.positions.shape, 2, 4)
        first, second = (backend.sample(model, batch, anchors, noise=noise, temperature=1.0) for _ in range(2))
        assert torch.equal(first.completions, second.completions)
        other = backend.sample(model, batch, anchors, noise=1 - noise, temperature=1.0)
        assert not torch.equal(first.completions, other.completions)

    @pytest.mark.parametrize("temperature", [0.6, 1.0])
    def test_log_probs_are_those_of_a_plain_forward_pass(
        self, backend: RolloutBackend, model: nn.Module, temperature: float
    ) -> None:
        batch = small_batch([[0] * 16])
        anchors = find_anchors(batch.document_ids, completion_length=4, stride=4, first_context_length=4)
        noise = torch.rand(*anchors.positions.shape, 2, 4)
        rollouts = backend.sample(model, batch, anchors, noise=noise, temperature=temperature)
        for b, a in enumerate(anchors.positions[0].tolist()):
            for j in range(2):
                with torch.no_grad():
                    expected = naive_model.completion_log_probs(
                        model, batch.tokens[0, :a], rollouts.completions[0, b, j], temperature
                    )
                torch.testing.assert_close(rollouts.log_probs[0, b, j], expected, atol=1e-4, rtol=0)

    def test_prompts_may_leave_room_for_nothing_but_the_completion(
        self, backend: RolloutBackend, model: nn.Module
    ) -> None:
        batch = small_batch([[0] * (LONGEST + 4)])
        anchors = Anchors(torch.tensor([[LONGEST]]), torch.tensor([[True]]))
        noise = torch.rand(1, 1, 2, 4)
        rollouts = backend.sample(model, batch, anchors, noise=noise, temperature=0.6)
        with torch.no_grad():
            expected = naive_model.completion_log_probs(
                model, batch.tokens[0, :LONGEST], rollouts.completions[0, 0, 1], 0.6
            )
        torch.testing.assert_close(rollouts.log_probs[0, 0, 1], expected, atol=1e-4, rtol=0)

    def test_without_anchors_there_is_nothing(self, backend: RolloutBackend, model: nn.Module) -> None:
        batch = small_batch([[0] * 8, [0] * 8])
        anchors = Anchors(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.bool))
        rollouts = backend.sample(model, batch, anchors, noise=torch.empty(2, 0, 3, 4), temperature=0.6)
        assert rollouts.completions.shape == rollouts.log_probs.shape == (2, 0, 3, 4)

    def test_documents_of_a_packed_row_do_not_see_each_other(self, backend: RolloutBackend, model: nn.Module) -> None:
        batch = small_batch([[0] * 7 + [1] * 9])
        anchors = Anchors(torch.tensor([[11]]), torch.tensor([[True]]))
        rollouts = backend.sample(model, batch, anchors, noise=torch.rand(1, 1, 1, 3), temperature=1.0)
        with torch.no_grad():
            own = naive_model.completion_log_probs(model, batch.tokens[0, 7:11], rollouts.completions[0, 0, 0], 1.0)
        torch.testing.assert_close(rollouts.log_probs[0, 0, 0], own, atol=1e-4, rtol=0)

    def test_samples_of_a_context_differ_and_so_do_those_of_equal_contexts(
        self, backend: RolloutBackend, model: nn.Module
    ) -> None:
        batch = small_batch([[0] * 8])
        twice = Batch(*(tensor.repeat(2, 1) if tensor.dim() == 2 else tensor.repeat(2) for tensor in (
            batch.tokens, batch.document_ids, batch.answer_mask, batch.indices)))  # fmt: skip
        anchors = Anchors(torch.tensor([[6], [6]]), torch.ones(2, 1, dtype=torch.bool))
        noise = torch.rand(2, 1, 8, 12, generator=torch.Generator().manual_seed(1))
        tokens = backend.sample(model, twice, anchors, noise=noise, temperature=2.0).completions
        assert len({tuple(row) for row in tokens.flatten(0, 2).tolist()}) == 16

    def test_first_tokens_follow_the_exact_softmax(self, backend: RolloutBackend, model: nn.Module) -> None:
        batch, n = small_batch([[0] * 6]), 4000
        anchors = find_anchors(batch.document_ids, completion_length=2, stride=4, first_context_length=4)
        noise = torch.rand(1, 1, n, 2, generator=torch.Generator().manual_seed(3))
        tokens = backend.sample(model, batch, anchors, noise=noise, temperature=0.8).completions[0, 0, :, 0]
        with torch.no_grad():
            expected = (model(batch.tokens[:, :4]).logits[0, -1] / 0.8).softmax(-1).double()
        counts = torch.bincount(tokens, minlength=VOCABULARY).double()
        # Cells with few expected counts are pooled, as the test's approximation needs.
        rare = expected * n < 5
        observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
        wanted = torch.cat([expected[~rare], expected[rare].sum()[None]]) * n
        assert chisquare(observed.numpy(), wanted.numpy(), sum_check=False).pvalue > 0.001
