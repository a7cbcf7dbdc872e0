"""Energy-based fine-tuning (Algorithm 1): sample, embed, reward, update."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ebft_study.algorithm.advantages import feature_matching_advantages
from ebft_study.algorithm.anchors import Anchors
from ebft_study.algorithm.losses import cross_entropy_loss, kl_penalty, policy_gradient_loss
from ebft_study.algorithm.metrics import conditional_feature_matching, duplicate_fraction, whitened_feature_matching
from ebft_study.algorithm.rewards import Rewards, feature_matching_rewards
from ebft_study.block_model import BlockPass, completion_states, score, token_log_probs
from ebft_study.config import RunConfig
from ebft_study.data import Batch
from ebft_study.features import FeatureBackend, Features
from ebft_study.methods import Tally, Totals
from ebft_study.methods.sft import ce_mask, ground_truth_log_probs
from ebft_study.rollouts import RolloutBackend, Rollouts


class Ebft:
    """One on-policy feature-matching update per rollout batch."""

    def __init__(
        self, config: RunConfig, *, rollouts: RolloutBackend, features: FeatureBackend, base: nn.Module | None
    ) -> None:
        """`base`: the frozen base model, needed only for the KL term."""
        self.reward, self.loss_config, self.temperature = config.reward, config.loss, config.rollout.temperature
        self.rollouts, self.features, self.base = rollouts, features, base

    def loss(
        self, model: nn.Module, batch: Batch, anchors: Anchors, *, noise: Tensor, totals: Totals, tally: Tally
    ) -> Tensor:
        """See `Method.loss`: `policy_loss + gamma * CE + kl_coefficient * KL`."""
        device = batch.tokens.device
        with tally.seconds("rollout_seconds", device):
            rollouts = self.rollouts.sample(model, batch, anchors, noise=noise, temperature=self.temperature)
        with tally.seconds("feature_seconds", device):
            features = self.features.embed(batch, anchors, rollouts.completions)[0]
            rewards = feature_matching_rewards(
                features.phi, features.psi, alpha=self.reward.alpha, whitening=self.reward.whitening
            )
            advantages = feature_matching_advantages(
                rewards.alignment, rewards.diversity, alpha=self.reward.alpha, baseline=self.reward.baseline
            )
        with tally.seconds("scoring_seconds", device):
            log_probs, ce_log_probs = self._score(model, batch, anchors, rollouts)
            n_pairs = max(totals.contexts, 1.0) * noise.shape[2]
            policy_loss = policy_gradient_loss(
                log_probs, advantages, anchors.valid, aggregation=self.loss_config.aggregation, denominator=n_pairs
            )
            mask = ce_mask(batch, self.loss_config.ce_region)
            ce_loss = cross_entropy_loss(ce_log_probs, mask, denominator=totals.ce_tokens)
            loss = policy_loss
            if self.loss_config.gamma > 0:
                loss = loss + self.loss_config.gamma * ce_loss
            if self.base is not None:
                penalty = self._kl(batch, anchors, rollouts, log_probs)
                loss = loss + self.loss_config.kl_coefficient * penalty.sum() / (n_pairs * noise.shape[3])
                tally.add("kl", penalty.detach().double().sum(), float(anchors.valid.sum()) * noise[0, 0].numel())
        tally.add("train_ce_loss", -ce_log_probs.detach()[mask].double().sum(), float(mask.sum()))
        # A sum whose count is spread over the workers and micro-batches: the parts add up to the whole loss.
        tally.add("policy_loss", policy_loss.detach(), 0.0)
        _tally_rollouts(tally, rollouts, features, rewards, advantages, anchors.valid)
        return loss

    def _score(self, model: nn.Module, batch: Batch, anchors: Anchors, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the sampled tokens [S, B, n, G] and of the ground truth [S, T-1], from one pass."""
        completions = rollouts.completions
        block_pass = BlockPass(batch.document_ids, anchors, n_samples=completions.shape[2])
        # The last sampled token predicts nothing, so it is not run.
        prefix, blocks = score(model, batch.tokens, completions[..., :-1], block_pass)
        states = completion_states(prefix, blocks, anchors)
        log_probs = token_log_probs(model, states, completions, temperature=self.temperature)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.loss_config.gamma > 0):
            return log_probs, ground_truth_log_probs(model, prefix, batch)

    def _kl(self, batch: Batch, anchors: Anchors, rollouts: Rollouts, log_probs: Tensor) -> Tensor:
        assert self.base is not None
        with torch.no_grad():
            base_log_probs, _ = self._score(self.base, batch, anchors, rollouts)
        return kl_penalty(log_probs, base_log_probs, anchors.valid, estimator=self.loss_config.kl_estimator)


def _tally_rollouts(
    tally: Tally, rollouts: Rollouts, features: Features, rewards: Rewards, advantages: Tensor, valid: Tensor
) -> None:
    tally.add_valid("reward", rewards.reward, valid)
    tally.add_valid("alignment", rewards.alignment, valid)
    tally.add_valid("diversity", rewards.diversity, valid)
    tally.add_valid("advantage", advantages, valid)
    tally.add_valid("advantage_squared", advantages.square(), valid)
    tally.add_valid("duplicate_rate", duplicate_fraction(rollouts.completions), valid)
    # Minus the log-probability of what was drawn is an unbiased estimate of the entropy it was drawn from.
    tally.add_valid("policy_entropy", -rollouts.log_probs, valid)
    tally.add_valid("fm_whitened", whitened_feature_matching(rewards.alignment, rewards.diversity), valid)
    spread = rewards.reward.amax(dim=-1) - rewards.reward.amin(dim=-1)
    tally.add_valid("zero_variance_fraction", (spread < 1e-8).double(), valid)
    if rewards.reward.shape[-1] > 1:
        tally.add_valid("train_cfm_loss", conditional_feature_matching(features.phi, features.psi), valid)
