"""Strided block-parallel sampling in process, with a shared prefix (appendix F).

A decoded token never changes earlier keys and values, and the prefix is the same for all samples. So the sequence is
run once, its keys and values are reused, and each of the G - 1 further passes advances all n * B blocks by one token.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from ebft_study.algorithm.anchors import Anchors
from ebft_study.data import Batch
from ebft_study.networks.blocks import Backend, Blocks, Decoder, Prefix, run_prefix, sample_tokens, states_before
from ebft_study.networks.sharding import unsharded
from ebft_study.rollouts import Rollouts
from ebft_study.rollouts.answers import AnswerSampler, InProcessAnswers


class StridedRollouts:
    """The default backend: exact, in process, nothing recomputed.

    Where gradients are enabled, the sampled log-probabilities carry them, so no second forward pass is needed.
    """

    engine = ""

    def __init__(self, attention: Backend = "auto") -> None:
        """`attention`: of decoding."""
        self.attention: Backend = attention

    def answers_of(self, model: nn.Module) -> contextlib.AbstractContextManager[AnswerSampler]:
        """See `RolloutBackend.answers_of`."""
        return contextlib.nullcontext(InProcessAnswers())

    def update_weights(self, model: nn.Module, version: int) -> None:
        """Do nothing: `sample` reads the model's own weights."""

    def close(self) -> None:
        """Do nothing: nothing was started."""

    def sample(
        self,
        model: nn.Module,
        batch: Batch,
        anchors: Anchors,
        *,
        noise: Tensor,
        temperature: float,
        prefix: Prefix | None = None,
    ) -> Rollouts:
        """See `RolloutBackend.sample`. A batch without anchors gives empty tensors."""
        S, B, n, G = noise.shape
        if B == 0:
            empty = torch.empty(S, 0, n, G, device=batch.tokens.device)
            return Rollouts(empty.long(), empty)
        with unsharded(model):
            return _sample(model, batch, anchors, noise.to(batch.tokens.device), temperature, prefix, self.attention)


def _sample(
    model: nn.Module,
    batch: Batch,
    anchors: Anchors,
    noise: Tensor,
    temperature: float,
    prefix: Prefix | None,
    attention: Backend,
) -> Rollouts:
    S, B, n, G = noise.shape
    prefix = prefix or run_prefix(model, batch.tokens, batch.document_ids)
    # The token before an anchor predicts the first completion token, one distribution for all n samples.
    tokens, log_probs = sample_tokens(model, states_before(prefix, anchors), noise[..., 0], temperature=temperature)
    sampled, scores = [tokens], [log_probs]
    decoder = Decoder(model, prefix, Blocks.of(batch.document_ids, anchors, n), G - 1, backend=attention)
    for t in range(1, G):
        states = decoder.advance(sampled[-1].flatten(1))
        tokens, log_probs = sample_tokens(model, states, noise[..., t].flatten(1)[..., None], temperature=temperature)
        sampled.append(tokens.view(S, B, n))
        scores.append(log_probs.view(S, B, n))
    return Rollouts(torch.stack(sampled, dim=-1), torch.stack(scores, dim=-1))
