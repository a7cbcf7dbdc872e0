"""Energy-based fine-tuning (Algorithm 1): sample, embed, reward, update.

    prefix, with gradients
      └── leaves, cut off from it; for some anchors at a time:
            sample      decode G - 1 tokens of every block; the log-probabilities keep their graph, if G is short
            embed       frozen network -> phi, psi -> rewards -> advantages
            score       only without that graph (and with sharded weights): run the blocks again, in one pass
            backward    into the weights and the leaves
    prefix, backward, once, with what the leaves collected

Every context's rewards depend on its own samples only, so the parts add up to the gradient of the whole: exactly, but
for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ebft_study.algorithm.advantages import feature_matching_advantages
from ebft_study.algorithm.anchors import Anchors
from ebft_study.algorithm.losses import kl_loss, kl_penalty, policy_gradient_loss
from ebft_study.algorithm.metrics import conditional_feature_matching, duplicate_fraction, whitened_feature_matching
from ebft_study.algorithm.rewards import Rewards, feature_matching_rewards
from ebft_study.cost import keeps_graph
from ebft_study.data import Batch
from ebft_study.features import FeatureBackend, Features
from ebft_study.methods import LossDenominators, MetricAccumulator, cross_entropy_term, differentiate
from ebft_study.methods.off_policy import OffPolicy, RechunkProbe
from ebft_study.networks.blocks import Prefix, completion_log_probs, run_prefix
from ebft_study.networks.sharding import is_sharded, unsharded
from ebft_study.rollouts import RolloutBackend, Rollouts

if TYPE_CHECKING:
    from ebft_study.config import RunConfig


class Ebft:
    """One on-policy feature-matching update per rollout batch."""

    def __init__(
        self,
        config: RunConfig,
        *,
        rollouts: RolloutBackend,
        features: FeatureBackend,
        base: nn.Module | None,
        anchors_at_once: int | None = None,
    ) -> None:
        """
        Args:
            base: the frozen base model, needed only for the KL term.
            anchors_at_once: anchors per pass, to bound memory. It changes neither the gradient of given completions nor
                their distribution; rounding may change a draw (`algorithm.sampling`).
        """
        self.reward, self.loss, self.temperature = config.reward, config.loss, config.rollout.temperature
        self.rollouts, self.features, self.base = rollouts, features, base
        self.anchors_at_once, self.backend = anchors_at_once, config.training.attention
        self.correction, self.probe = OffPolicy.from_config(config), RechunkProbe(config)

    def backward(
        self,
        model: nn.Module,
        batch: Batch,
        anchors: Anchors,
        *,
        noise: Tensor,
        denominators: LossDenominators,
        accumulator: MetricAccumulator,
    ) -> float:
        """See `Method.backward`: `policy_loss + gamma * CE + kl_coefficient * KL`."""
        device = batch.tokens.device
        with accumulator.seconds("scoring_seconds", device):
            prefix = run_prefix(model, batch.tokens, batch.document_ids)
            leaves, base = prefix.leaves(), self._base_prefix(batch)
            loss = cross_entropy_term(model, leaves, batch, self.loss, denominators, accumulator)
        keep = keeps_graph(noise.shape[3]) and not is_sharded(model)
        for part in self._parts(anchors):
            chosen = Anchors(*(tensor[:, part] for tensor in anchors))
            with (
                accumulator.seconds("rollout_seconds", device),
                torch.set_grad_enabled(keep and torch.is_grad_enabled()),
            ):
                rollouts = self.rollouts.sample(
                    model, batch, chosen, noise=noise[:, part], temperature=self.temperature, prefix=leaves
                )
            with accumulator.seconds("feature_seconds", device):
                advantages = self._advantages(batch, chosen, rollouts, accumulator)
            with accumulator.seconds("scoring_seconds", device):
                loss += self._policy(
                    model, batch, leaves, base, chosen, rollouts, advantages, denominators, accumulator
                )
        with accumulator.seconds("scoring_seconds", device):
            prefix.backward(leaves)
        return loss

    def _parts(self, anchors: Anchors) -> Iterator[slice]:
        B = anchors.positions.shape[1]
        size = self.anchors_at_once or max(B, 1)
        return (slice(first, first + size) for first in range(0, B, size))

    @torch.no_grad()
    def _advantages(self, batch: Batch, anchors: Anchors, rollouts: Rollouts, accumulator: MetricAccumulator) -> Tensor:
        features = self.features.embed(batch, anchors, rollouts.completions)[0]
        rewards = feature_matching_rewards(
            features.phi, features.psi, alpha=self.reward.alpha, whitening=self.reward.whitening
        )
        advantages = feature_matching_advantages(
            rewards.alignment, rewards.diversity, alpha=self.reward.alpha, baseline=self.reward.baseline
        )
        _tally_rollouts(accumulator, rollouts, features, rewards, advantages, anchors.valid)
        return advantages

    def _policy(
        self,
        model: nn.Module,
        batch: Batch,
        leaves: Prefix,
        base: Prefix | None,
        anchors: Anchors,
        rollouts: Rollouts,
        advantages: Tensor,
        denominators: LossDenominators,
        accumulator: MetricAccumulator,
    ) -> float:
        """Policy gradient (and KL) of some anchors."""
        n_pairs = max(denominators.contexts, 1.0) * advantages.shape[2]
        if base is not None and self.base is not None:
            # First: if its weights are gathered for it, there are no activations yet.
            with torch.no_grad(), unsharded(self.base):
                base_log_probs = self._score(self.base, base, anchors, rollouts.completions)
        log_probs = rollouts.log_probs
        if not log_probs.requires_grad:
            log_probs = self._score(model, leaves, anchors, rollouts.completions)
        weights = torch.ones_like(advantages)
        if rollouts.policy_version is not None:
            self.probe.record(
                model,
                batch,
                anchors,
                rollouts.completions,
                log_probs,
                policy_version=denominators.policy_version,
                accumulator=accumulator,
            )
            weights = self.correction.weights(
                log_probs, rollouts, anchors.valid, denominators.policy_version, accumulator
            )
            advantages = advantages * weights
        loss = policy_gradient_loss(
            log_probs, advantages, anchors.valid, aggregation=self.loss.aggregation, denominator=n_pairs
        )
        # The parts of all workers and micro-batches add up to the whole loss.
        accumulator.add("policy_loss", loss.detach(), float(anchors.valid.sum()))
        if base is not None:
            penalty = kl_penalty(log_probs, base_log_probs, anchors.valid, estimator=self.loss.kl_estimator)
            kl = kl_loss(penalty, weights, aggregation=self.loss.aggregation, denominator=n_pairs)
            loss = loss + self.loss.kl_coefficient * kl
            accumulator.add_valid("kl", weights[..., None] * penalty.detach(), anchors.valid)
        return differentiate(loss)

    def _score(self, model: nn.Module, prefix: Prefix, anchors: Anchors, completions: Tensor) -> Tensor:
        return completion_log_probs(
            model, prefix, anchors, completions, temperature=self.temperature, backend=self.backend
        )

    @torch.no_grad()
    def _base_prefix(self, batch: Batch) -> Prefix | None:
        if self.base is None:
            return None
        with unsharded(self.base):
            return run_prefix(self.base, batch.tokens, batch.document_ids)


def _tally_rollouts(
    accumulator: MetricAccumulator,
    rollouts: Rollouts,
    features: Features,
    rewards: Rewards,
    advantages: Tensor,
    valid: Tensor,
) -> None:
    accumulator.add_valid("reward", rewards.reward, valid)
    accumulator.add_valid("alignment", rewards.alignment, valid)
    accumulator.add_valid("diversity", rewards.diversity, valid)
    accumulator.add_valid("advantage", advantages, valid)
    accumulator.add_valid("duplicate_rate", duplicate_fraction(rollouts.completions), valid)
    # Minus the log-probability of a drawn token is an unbiased estimate of the entropy of its distribution.
    accumulator.add_valid("policy_entropy", -rollouts.log_probs.detach(), valid)
    accumulator.add_valid("fm_whitened", whitened_feature_matching(rewards.alignment, rewards.diversity), valid)
    spread = rewards.reward.amax(dim=-1) - rewards.reward.amin(dim=-1)
    accumulator.add_valid("zero_variance_fraction", (spread < 1e-8).double(), valid)
    if rewards.reward.shape[-1] > 1:
        accumulator.add_valid("train_cfm_loss", conditional_feature_matching(features.phi, features.psi), valid)
