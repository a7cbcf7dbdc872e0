"""Sampling completions from the current policy. Backends share the `RolloutBackend` protocol and one contract suite."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from ebft_study.algorithm.anchors import Anchors, find_anchors
from ebft_study.data import Batch
from ebft_study.networks.blocks import Prefix
from ebft_study.rollouts.answers import AnswerSampler

if TYPE_CHECKING:
    from ebft_study.config import RolloutConfig


@dataclass(frozen=True)
class Rollouts:
    """n completions of exactly G tokens for every anchor of a batch."""

    completions: Tensor
    """[S, B, n, G] int64; arbitrary where the anchor is not valid."""
    log_probs: Tensor
    """[S, B, n, G] float32, of the tempered policy that sampled them; with gradients, if the backend can."""
    policy_version: int | None = None
    """Number of updates of the sampling weights; None where the model itself was sampled from."""
    sync_seconds: float = 0.0
    """Time spent since the previous batch on sending new weights to an engine."""


ROLLOUT_STREAM = 1
"""Keeps the noise of training rollouts apart from that of evaluations."""


def answer_anchors(batch: Batch, max_tokens: int) -> Anchors:
    """One anchor per sequence, [S, 1]: where its answer begins, if an answer of `max_tokens` has room there."""
    position = batch.answer_mask.long().argmax(dim=1, keepdim=True)
    valid = batch.answer_mask.any(dim=1, keepdim=True) & (position > 0)
    valid &= position + max_tokens <= batch.tokens.shape[1]
    return Anchors(torch.where(valid, position, 0), valid)


def anchors_of(batch: Batch, rollout: RolloutConfig, *, completion_length: int | None = None) -> Anchors:
    """Find the anchors of a batch; `completion_length` overrides the configured G."""
    return find_anchors(
        batch.document_ids,
        completion_length=completion_length or rollout.completion_length,
        stride=rollout.stride,
        first_context_length=rollout.context_length,
        answer_mask=batch.answer_mask if rollout.anchor_region == "answer" else None,
    )


class RolloutBackend(Protocol):
    """Samples from `model` at `temperature`, no top-k, no top-p, no stop at the end of a document."""

    @property
    def engine(self) -> str:
        """The engine's version and all else that its draws depend on; empty where the model itself is sampled from."""
        ...

    def answers_of(self, model: nn.Module) -> AbstractContextManager[AnswerSampler]:
        """Context with a sampler of whole answers from `model` as it is now.

        What `sample` samples from does not change. All workers enter and leave it; a collective must follow the entry,
        and another one precede the exit.
        """
        ...

    def update_weights(self, model: nn.Module, version: int) -> None:
        """Copy the weights of `model`, after `version` updates, where the backend has a copy and a transfer is due."""
        ...

    def close(self) -> None:
        """Stop everything that the backend has started."""
        ...

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
        """Sample n completions per anchor; `noise` [S, B, n, G] (`algorithm.sampling.uniforms`) fixes every draw.

        `prefix`: the batch's sequences as `model` has just run them, for a backend that can use them. The sampled
        log-probabilities may carry gradients, where these are enabled; if they do, they need not be scored again.

        Raises:
            ServiceError: the engine has ended, or does not answer in time.
        """
        ...
