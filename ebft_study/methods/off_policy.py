"""Rollouts that another engine sampled: how old, how equal, and by how much to weight them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ebft_study.algorithm.anchors import Anchors, contexts_of
from ebft_study.algorithm.losses import importance_weights
from ebft_study.data import Batch
from ebft_study.errors import ParityError, ServiceError
from ebft_study.methods import MetricAccumulator
from ebft_study.networks.blocks import run_prefix, token_log_probs
from ebft_study.networks.sharding import is_sharded
from ebft_study.rollouts import Rollouts

if TYPE_CHECKING:
    from ebft_study.config import RunConfig

FLOAT32_THRESHOLD = 1e-4
"""Largest mean difference of log-probabilities that two implementations of the same weights may have in float32: fifty
times what they have."""
NOISE_MULTIPLE = 10.0
"""In bfloat16: how many times the trainer's difference from itself (`RechunkProbe`) the engine's may be."""
DIFFERENCE = "parity_mean_difference"
NOISE = "rechunk_mean_difference"
_OFF = 0.1
"""A ratio of probabilities outside 1 +- this counts as off."""
_PROBED = 8
"""Completions that a probe scores again: 64 tokens at G = 8."""


@dataclass(frozen=True)
class OffPolicy:
    """Limits of a run: the age of samples, and the clipping of importance ratios."""

    max_policy_lag: int
    clip: float

    @staticmethod
    def from_config(config: RunConfig) -> OffPolicy:
        rollout = config.rollout
        return OffPolicy(rollout.max_policy_lag, rollout.importance_ratio_clip)

    def record(
        self, version: int, policy_version: int, contexts: int, sync_seconds: float, accumulator: MetricAccumulator
    ) -> None:
        """Record the age of samples to a number of contexts, and the time of the transfer before them.

        Args:
            version: updates that the sampling weights have seen; `policy_version`: those of the trainer's.

        Raises:
            ServiceError: the sampling weights are older than allowed.
        """
        lag = policy_version - version
        if not 0 <= lag <= self.max_policy_lag:
            raise ServiceError(
                f"rollouts of policy version {version} at version {policy_version}: "
                f"max_policy_lag={self.max_policy_lag}"
            )
        accumulator.add("policy_lag", lag * contexts, float(contexts))
        if sync_seconds:
            accumulator.add("sync_seconds", sync_seconds, 1.0)

    def weights(
        self, log_probs: Tensor, rollouts: Rollouts, valid: Tensor, policy_version: int, accumulator: MetricAccumulator
    ) -> Tensor:
        """Truncated importance ratios [S, B, n] (see `importance_weights`), with everything about them recorded.

        A batch by the weights of this very version is the probe of the engine: `check_parity` judges the difference.

        Args:
            log_probs: [S, B, n, G], the trainer's, of the sampled tokens.
            policy_version: updates that the trainer's weights have seen.

        Raises:
            ServiceError: the sampling weights are older than allowed.
        """
        version = rollouts.policy_version or 0
        self.record(version, policy_version, int(valid.sum()), rollouts.sync_seconds, accumulator)
        if version == policy_version:
            _record_parity(log_probs.detach() - rollouts.log_probs, valid, accumulator)
        weights, ratios = importance_weights(log_probs, rollouts.log_probs, clip=self.clip)
        accumulator.add_valid("importance_ratio", ratios, valid)
        accumulator.add_valid("importance_weight", weights, valid)
        accumulator.add_valid("importance_clipped_fraction", (weights < ratios).to(torch.float64), valid)
        return weights


def record_ratios(
    log_probs: Tensor, sampled: Tensor, mask: Tensor, *, same_weights: bool, accumulator: MetricAccumulator
) -> None:
    """Record how the trainer's log-probabilities [S, n, L] of ragged answers differ from the engine's.

    Args:
        mask: the tokens of the answers.
        same_weights: whether the engine had the trainer's weights, so that any difference is its own.
    """
    difference = torch.where(mask, log_probs.detach() - sampled, 0.0)
    if same_weights:
        _record_parity(difference, mask, accumulator)
    accumulator.add_valid("importance_ratio", difference.sum(dim=-1).exp(), mask.any(dim=-1))


def _record_parity(difference: Tensor, valid: Tensor, accumulator: MetricAccumulator) -> None:
    accumulator.add_valid(DIFFERENCE, difference.abs(), valid)
    accumulator.add_valid("parity_off_fraction", _is_off(difference), valid)


def _is_off(difference: Tensor) -> Tensor:
    return (difference.expm1().abs() > _OFF).double()


class RechunkProbe:
    """Measures the rounding of bfloat16 in the trainer itself: by how much two of its own passes over a token differ.

    A step scores blocks against a shared prefix. The probe runs some contexts with their completions again, each as a
    sequence of its own, as an engine does: other shapes and other sums, the same weights. It does so at the first step
    of a process and at logged ones, and costs as many tokens as eight sequences, without gradients.
    """

    def __init__(self, config: RunConfig) -> None:
        self.enabled = config.uses_engine and config.training.precision == "bfloat16"
        self.every, self.temperature = config.training.log_every_steps, config.rollout.temperature
        self._probed: int | None = None

    @torch.no_grad()
    def record(
        self,
        model: nn.Module,
        batch: Batch,
        anchors: Anchors,
        completions: Tensor,
        log_probs: Tensor,
        *,
        policy_version: int,
        accumulator: MetricAccumulator,
        mask: Tensor | None = None,
    ) -> None:
        """Compare `log_probs` [S, B, n, G] of a step's first part with those of the same tokens in passes of their own.

        Args:
            mask: tokens [S, B, n, G] that are compared; default: all.
        """
        due = self._probed is None or (policy_version + 1) % self.every == 0
        chosen = anchors.valid.nonzero()
        together = is_sharded(model)
        if not self.enabled or not due or policy_version == self._probed or not (len(chosen) or together):
            return
        self._probed = policy_version
        bounds = contexts_of(batch.document_ids, anchors)
        differences = []
        for s, b in chosen[:: max(-(-len(chosen) // _PROBED), 1)].tolist():
            context = batch.tokens[s, bounds.start[s, b] : bounds.end[s, b]]
            counted = slice(None) if mask is None else mask[s, b, 0]
            alone = self._alone(model, context, completions[s, b, 0])
            differences.append((alone - log_probs[s, b, 0])[counted])
        for _ in range(_PROBED - len(differences) if together else 0):  # all workers must make the same passes
            run_prefix(model, batch.tokens[:1, :1], batch.document_ids[:1, :1])
        if not differences:
            return
        difference = torch.cat(differences)
        accumulator.add(NOISE, difference.abs().double().sum(), float(len(difference)))
        accumulator.add("rechunk_off_fraction", _is_off(difference).sum(), float(len(difference)))

    def _alone(self, model: nn.Module, context: Tensor, completion: Tensor) -> Tensor:
        """Log-probabilities [G] of a completion, as the end of an ordinary sequence."""
        tokens = torch.cat([context, completion])[None]
        states = run_prefix(model, tokens[:, :-1], torch.zeros_like(tokens[:, :-1])).states[0, len(context) - 1 :]
        return token_log_probs(model, states, completion, temperature=self.temperature)


def check_parity(config: RunConfig, total: float, count: float, *, version: int, noise: float = 0.0) -> None:
    """Judge the differences of one step, summed over all workers, so that all of them come to the same end.

    Args:
        noise: mean difference of the trainer from itself, in bfloat16.

    Raises:
        ParityError: the engine's log-probabilities are not the trainer's.
    """
    allowed, why = config.rollout.parity_threshold, "rollout.parity_threshold"
    if allowed is None:
        allowed = FLOAT32_THRESHOLD
        if config.training.precision == "bfloat16":
            allowed = max(FLOAT32_THRESHOLD, NOISE_MULTIPLE * noise)
            why = f"{NOISE_MULTIPLE:g} times what two passes of the trainer itself differ by; {why}"
    # NaN is no agreement, either.
    if count and not total / count <= allowed:
        raise ParityError(
            f"the rollout engine's log-probabilities differ from the trainer's by {total / count:.3g} on average over "
            f"{count:.0f} tokens after the transfer of version {version}; allowed is {allowed:.3g} ({why}). "
            "The engine does not compute the trained policy: check its precision, or use backend=strided"
        )
