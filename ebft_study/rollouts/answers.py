"""Sampling whole answers to prompts: up to an end token, or a limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ebft_study.algorithm.anchors import Anchors
from ebft_study.algorithm.sampling import uniforms
from ebft_study.networks.blocks import Blocks, Decoder, Prefix, run_prefix, sample_tokens, states_before


@dataclass(frozen=True)
class Answers:
    """n answers of at most L tokens to each of S prompts."""

    tokens: Tensor
    """[S, n, L] int64; 0 after the end."""
    log_probs: Tensor
    """[S, n, L] float32, of the tempered policy, whatever the nucleus; 0 after the end. An engine does not know them
    where there is a nucleus: NaN."""
    lengths: Tensor
    """[S, n] int64: tokens of each answer, its end token included."""
    ended: Tensor
    """[S, n] bool: whether the end token was reached; without it the answer was cut at the limit."""
    policy_version: int | None = None
    """Number of updates of the sampling weights; None where the model itself was sampled from."""
    sync_seconds: float = 0.0
    """Time spent since the previous call on sending new weights to an engine."""

    @property
    def mask(self) -> Tensor:
        """[S, n, L] bool: the tokens of the answers."""
        return torch.arange(self.tokens.shape[-1], device=self.tokens.device) < self.lengths[..., None]

    def rows(self, part: slice) -> Answers:
        """The answers to some of the prompts."""
        return self._changed(lambda values: values[part])

    def spread(self, chosen: Tensor) -> Answers:
        """The answers to the `chosen` [S'] bool of more prompts; the others have answers of no tokens."""
        return self._changed(lambda values: spread_rows(values, chosen))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Answers:
        tensors = (self.tokens, self.log_probs, self.lengths, self.ended)
        tokens, log_probs, lengths, ended = map(change, tensors)
        longest = max(int(lengths.max()), 1) if lengths.numel() else 1
        return replace(
            self, tokens=tokens[..., :longest], log_probs=log_probs[..., :longest], lengths=lengths, ended=ended
        )

    def texts(self, tokenizer: object) -> list[list[str]]:
        """The answers as text [S][n], without special tokens."""
        return [
            [
                tokenizer.decode(tokens[:length], skip_special_tokens=True)  # type: ignore[attr-defined]
                for tokens, length in zip(row, lengths, strict=True)
            ]
            for row, lengths in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)
        ]


def spread_rows(values: Tensor, chosen: Tensor) -> Tensor:
    """Rows [s, ...] at the `chosen` places [S] bool of S rows; the others are 0."""
    rows = values.new_zeros(len(chosen), *values.shape[1:])
    rows[chosen] = values
    return rows


def no_answers(n_samples: int, device: torch.device) -> Answers:
    """The answers to no prompts."""
    empty = torch.zeros(0, n_samples, device=device)
    return Answers(empty[..., None].long(), empty[..., None], empty.long(), empty.bool())


@dataclass(frozen=True)
class Sampling:
    """How the answers to a prompt are sampled."""

    n_samples: int
    max_tokens: int
    """The limit, end token included."""
    temperature: float
    """0 takes the most probable token each time."""
    end_tokens: frozenset[int]
    """Tokens that end an answer."""
    top_p: float = 1.0
    """Tokens are drawn from the smallest set that has this probability."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


class AnswerSampler(Protocol):
    """Samples whole answers."""

    tokens_at_once: int
    """Tokens of answers that a call should sample at most, where there are more."""

    def sample(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        key: Sequence[int],
        ids: Sequence[int],
    ) -> Answers:
        """`n_samples` answers to each prompt, which is at least one token long; without prompts there are none.

        Args:
            key: with the prompt's entry of `ids`, the seed of its draws, whatever else is sampled with it.
        """
        ...


class InProcessAnswers:
    """Samples from the model itself: each prompt is run once, and all its answers are decoded together."""

    tokens_at_once = 2**16  # their keys and values are in memory

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        key: Sequence[int],
        ids: Sequence[int],
    ) -> Answers:
        """See `AnswerSampler.sample`."""
        device = next(model.parameters()).device
        if not prompts:
            return no_answers(sampling.n_samples, device)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        # An anchor is a position of its document: the place of the answer's first token, whatever is there.
        rows = [torch.tensor([*prompt, 0]) for prompt in prompts]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        padding = torch.arange(tokens.shape[1]) > lengths[:, None]
        anchors = Anchors(lengths[:, None].to(device), torch.ones(len(prompts), 1, dtype=torch.bool, device=device))
        noise = uniforms(key, ids, n_anchors=1, n_samples=sampling.n_samples, length=sampling.max_tokens)
        prefix = run_prefix(model, tokens.to(device), -padding.long().to(device))
        return decode_answers(model, prefix, anchors, sampling, noise=noise)


@torch.no_grad()
def decode_answers(model: nn.Module, prefix: Prefix, anchors: Anchors, sampling: Sampling, *, noise: Tensor) -> Answers:
    """Answers from the one anchor of each sequence on; `noise` [S, 1, n, L] fixes every draw."""
    S, _, n, limit = noise.shape
    device = prefix.states.device
    noise, ends = noise.to(device), torch.tensor(sorted(sampling.end_tokens), device=device)
    temperature, top_p = (1.0, 0.0) if sampling.is_greedy else (sampling.temperature, sampling.top_p)
    answers = torch.zeros(S, n, limit, dtype=torch.long, device=device)
    log_probs = torch.zeros(S, n, limit, device=device)
    lengths = torch.zeros(S, n, dtype=torch.long, device=device)
    ended = torch.zeros(S, n, dtype=torch.bool, device=device)
    decoder = Decoder(model, prefix, Blocks.of(prefix.document_ids, anchors, n), limit - 1)
    live = torch.arange(S, device=device)  # the prompts that are still decoded
    for t in range(limit):
        if t == 0:  # one distribution for all answers to a prompt
            states, draws = states_before(prefix, anchors), noise[..., 0]
        else:
            states, draws = decoder.advance(answers[live, :, t - 1]), noise[live, 0, :, t, None]
        drawn = sample_tokens(model, states, draws, temperature=temperature, top_p=top_p)
        tokens, scores = (values.reshape(len(live), n) for values in drawn)
        over = ended[live]
        answers[live, :, t] = torch.where(over, 0, tokens)
        log_probs[live, :, t] = torch.where(over, 0.0, scores)
        lengths[live] += ~over
        ended[live] = over | torch.isin(tokens, ends)
        unfinished = ~ended[live].all(dim=1)
        n_unfinished = int(unfinished.sum())
        if n_unfinished == 0:
            break
        if 2 * n_unfinished <= len(live):  # seldom, as what is kept is copied
            live = live[unfinished]
            decoder.keep(unfinished)
    longest = t + 1
    return Answers(answers[..., :longest], log_probs[..., :longest], lengths, ended)
