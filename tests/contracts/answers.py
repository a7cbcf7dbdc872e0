"""The contract of whole-answer samplers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ebft_study.rollouts.answers import Answers, AnswerSampler, Sampling

PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5], [3, 5]]
LIMIT, N = 6, 5
SAMPLING = Sampling(N, LIMIT, 0.8, frozenset({7, 2}))


@torch.no_grad()
def distribution(model: nn.Module, context: Sequence[int], temperature: float) -> Tensor:
    """log p(. | context) by a plain forward pass."""
    return (model(torch.tensor([list(context)])).logits[0, -1].double() / temperature).log_softmax(dim=-1)


class AnswersContract:
    """Subclasses provide `sampler` and `model`, of at least 10 tokens."""

    def sample(
        self,
        sampler: AnswerSampler,
        model: nn.Module,
        prompts: Sequence[Sequence[int]] = PROMPTS,
        key: Sequence[int] = (5,),
        ids: Sequence[int] = range(len(PROMPTS)),
        **changes: Any,
    ) -> Answers:
        return sampler.sample(model, prompts, replace(SAMPLING, **changes), key=key, ids=ids)

    def test_greedy_answers_follow_the_most_probable_token(self, sampler: AnswerSampler, model: nn.Module) -> None:
        greedy = self.sample(sampler, model, temperature=0.0, n_samples=1)
        for s, prompt in enumerate(PROMPTS):
            answer: list[int] = []
            while len(answer) < LIMIT and not {7, 2} & set(answer[-1:]):
                answer.append(int(distribution(model, [*prompt, *answer], 1.0).argmax()))
            assert greedy.tokens[s, 0, : int(greedy.lengths[s, 0])].tolist() == answer

    def test_log_probs_are_those_of_the_tempered_policy(self, sampler: AnswerSampler, model: nn.Module) -> None:
        answers = self.sample(sampler, model)
        for s, prompt in enumerate(PROMPTS):
            for j in range(N):
                length = int(answers.lengths[s, j])
                tokens = answers.tokens[s, j, :length].tolist()
                for t, token in enumerate(tokens):
                    expected = distribution(model, [*prompt, *tokens[:t]], 0.8)[token]
                    assert float(answers.log_probs[s, j, t]) == pytest.approx(float(expected), abs=1e-4)

    def test_an_answer_ends_with_its_first_end_token(self, sampler: AnswerSampler, model: nn.Module) -> None:
        answers = self.sample(sampler, model, n_samples=40)
        assert 0 < int(answers.ended.sum()) < answers.ended.numel()
        ends = torch.isin(answers.tokens, torch.tensor([2, 7])) & answers.mask
        last = torch.arange(answers.tokens.shape[-1]) == answers.lengths[..., None] - 1
        assert torch.equal(ends, last & answers.ended[..., None])
        assert bool((answers.lengths[~answers.ended] == LIMIT).all())
        assert not answers.tokens[~answers.mask].any()
        assert not answers.log_probs[~answers.mask].any()

    def test_what_else_is_sampled_changes_nothing(self, sampler: AnswerSampler, model: nn.Module) -> None:
        together, alone = self.sample(sampler, model), self.sample(sampler, model, prompts=PROMPTS[2:3], ids=[2])
        length = min(together.tokens.shape[-1], alone.tokens.shape[-1])
        assert torch.equal(together.tokens[2, :, :length], alone.tokens[0, :, :length])
        assert torch.equal(together.lengths[2], alone.lengths[0])

    def test_without_prompts_there_are_no_answers(self, sampler: AnswerSampler, model: nn.Module) -> None:
        answers = self.sample(sampler, model, prompts=[], ids=[])
        assert answers.tokens.shape[:2] == answers.lengths.shape == answers.ended.shape == (0, N)

    def test_key_and_id_are_the_seed(self, sampler: AnswerSampler, model: nn.Module) -> None:
        first, again = self.sample(sampler, model), self.sample(sampler, model)
        assert torch.equal(first.tokens, again.tokens)
        for other in (self.sample(sampler, model, key=(6,)), self.sample(sampler, model, ids=[9, 8, 7, 6])):
            assert not torch.equal(other.tokens[..., :1], first.tokens[..., :1])
        assert len({tuple(tokens) for tokens in first.tokens[0].tolist()}) > 1

    def test_draws_have_the_frequencies_of_the_policy(self, sampler: AnswerSampler, model: nn.Module) -> None:
        answers = self.sample(sampler, model, prompts=[[3, 1, 4]], ids=[0], n_samples=4000, max_tokens=1)
        expected = distribution(model, [3, 1, 4], 0.8).exp()
        counts = torch.bincount(answers.tokens.flatten(), minlength=len(expected))
        assert float(((counts - 4000 * expected).square() / (4000 * expected)).sum()) < 2.5 * len(expected)

    def test_top_p_draws_from_the_nucleus_alone(self, sampler: AnswerSampler, model: nn.Module) -> None:
        answers = self.sample(sampler, model, prompts=[[3, 1, 4]], ids=[0], n_samples=4000, max_tokens=1, top_p=0.5)
        probabilities = distribution(model, [3, 1, 4], 0.8).exp()
        order = probabilities.argsort(descending=True)
        size = 1 + int((probabilities[order].cumsum(0) < 0.5).sum())
        assert 1 < size < len(order)
        assert set(answers.tokens.flatten().tolist()) == set(order[:size].tolist())
        share = float((answers.tokens == order[0]).double().mean())
        assert share == pytest.approx(float(probabilities[order[0]] / probabilities[order[:size]].sum()), abs=0.04)
