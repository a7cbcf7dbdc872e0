"""Whole answers, sampled in process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ebft_study.algorithm.sampling import draw, nucleus
from ebft_study.networks.blocks import Decoder
from ebft_study.rollouts.answers import Answers, AnswerSampler, InProcessAnswers, Sampling
from tests.contracts.answers import AnswersContract
from tests.small_models import small_model


class TestInProcess(AnswersContract):
    @pytest.fixture
    def sampler(self) -> AnswerSampler:
        return InProcessAnswers()

    @pytest.fixture
    def model(self) -> nn.Module:
        return small_model()


def test_the_nucleus_is_the_smallest_set_that_has_the_probability() -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
    for top_p, expected in {
        0.0: [[0, 1, 0, 0], [1, 0, 0, 0]],
        0.4: [[0, 1, 0, 0], [1, 1, 0, 0]],
        0.65: [[0, 1, 0, 1], [1, 1, 1, 0]],
        0.95: [[1, 1, 1, 1], [1, 1, 1, 1]],
    }.items():
        assert torch.equal(nucleus(probabilities, top_p) > 0, torch.tensor(expected) > 0), top_p
    assert draw(probabilities, torch.tensor([[0.0, 0.99], [0.0, 0.99]]), top_p=0.0).tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("n_samples", [1, 3])
def test_prompts_that_are_over_change_nothing_for_the_others(n_samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, a prompt is decoded to its own end; together, those that are over are dropped."""
    model, left = small_model(), []
    keep = Decoder.keep

    def watched(self: Decoder, rows: torch.Tensor) -> None:
        left.append(int(rows.sum()))
        keep(self, rows)

    monkeypatch.setattr(Decoder, "keep", watched)
    prompts = [[3 + k % 5, 1, 4 + k % 3][: 1 + k % 3] for k in range(16)]

    def sample(numbers: list[int]) -> Answers:
        chosen = [prompts[k] for k in numbers]
        ends = frozenset(range(0, model.config.vocab_size, 6 // n_samples))
        sampling = Sampling(n_samples, max_tokens=24, temperature=1.0, end_tokens=ends)
        return InProcessAnswers().sample(model, chosen, sampling, key=(3,), ids=numbers)

    together = sample(list(range(16)))
    assert len(left) >= 2, left
    dropped = len(left)
    for k in range(16):
        alone = sample([k])
        length = alone.tokens.shape[-1]
        assert torch.equal(together.tokens[k, :, :length], alone.tokens[0])
        assert not together.tokens[k, :, length:].any()
        assert torch.equal(together.lengths[k], alone.lengths[0])
        assert torch.equal(together.ended[k], alone.ended[0])
        assert torch.allclose(together.log_probs[k, :, :length], alone.log_probs[0], atol=1e-5)
    assert len(left) == dropped
