"""A few completions with their rewards, as text, so that a person can see what the model does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ebft_study.algorithm.advantages import feature_matching_advantages
from ebft_study.algorithm.anchors import completions_at
from ebft_study.algorithm.rewards import feature_matching_rewards
from ebft_study.algorithm.sampling import uniforms
from ebft_study.config import RunConfig
from ebft_study.evaluation import spread_rows
from ebft_study.rollouts import anchors_of
from ebft_study.training.setup import Parts

SEQUENCES, CONTEXTS_PER_SEQUENCE = 2, 2


@torch.no_grad()
def sample_rows(config: RunConfig, parts: Parts, model: nn.Module) -> list[dict[str, Any]]:
    """Rows of the `samples` table: fixed contexts of the validation split, fixed noise, the current model."""
    rollout, reward = config.rollout, config.reward
    data = parts.data["validation"]
    batch = data.rows(spread_rows(len(data), SEQUENCES)).to(parts.device)
    anchors = anchors_of(batch, rollout)
    if anchors.positions.shape[1] == 0:
        return []
    noise = uniforms(
        (config.evaluation.evaluation_seed,),
        batch.indices.tolist(),
        n_anchors=anchors.positions.shape[1],
        n_samples=rollout.n_samples,
        length=rollout.completion_length,
    )
    sampled = parts.evaluator.rollouts.sample(model, batch, anchors, noise=noise, temperature=rollout.temperature)
    features = parts.features.embed(batch, anchors, sampled.completions)[0]
    rewards = feature_matching_rewards(features.phi, features.psi, alpha=reward.alpha, whitening=reward.whitening)
    advantages = feature_matching_advantages(
        rewards.alignment, rewards.diversity, alpha=reward.alpha, baseline=reward.baseline
    )
    truth = completions_at(batch.tokens, anchors, rollout.completion_length)
    decode = parts.base.tokenizer.decode
    rows = []
    for s in range(len(batch.tokens)):
        valid = anchors.valid[s].nonzero()[:, 0]
        for b in valid[:: max(1, len(valid) // CONTEXTS_PER_SEQUENCE)][:CONTEXTS_PER_SEQUENCE].tolist():
            position = int(anchors.positions[s, b])
            for j in range(rollout.n_samples):
                rows.append(
                    {
                        "sequence": s,
                        "anchor": position,
                        "sample": j,
                        "context": decode(batch.tokens[s, :position]),
                        "completion": decode(sampled.completions[s, b, j]),
                        "ground_truth": decode(truth[s, b]),
                        "reward": float(rewards.reward[s, b, j]),
                        "alignment": float(rewards.alignment[s, b, j]),
                        "diversity": float(rewards.diversity[s, b, j]),
                        "advantage": float(advantages[s, b, j]),
                    }
                )
    return rows
