"""Rollouts that another engine sampled: how old, how equal, and by how much to weight them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ebft_study.algorithm.losses import importance_weights
from ebft_study.config import RunConfig
from ebft_study.errors import ParityError, ServiceError
from ebft_study.methods import MetricAccumulator
from ebft_study.rollouts import Rollouts

THRESHOLDS = {"float32": 1e-4, "bfloat16": 0.3}
"""Largest mean differences of log-probabilities that two implementations of the same weights may have: fifty times what
they have in float32, and five times in bfloat16, whose single tokens differ by 1 now and then."""
DIFFERENCE = "parity_mean_difference"


@dataclass(frozen=True)
class OffPolicy:
    """Limits of a run: the age of samples, and the clipping of importance ratios."""

    max_policy_lag: int
    clip: float

    @staticmethod
    def from_config(config: RunConfig) -> OffPolicy:
        rollout = config.rollout
        return OffPolicy(rollout.max_policy_lag, rollout.importance_ratio_clip)

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
        lag = policy_version - (rollouts.policy_version or 0)
        if not 0 <= lag <= self.max_policy_lag:
            raise ServiceError(
                f"rollouts of policy version {rollouts.policy_version} at version {policy_version}: "
                f"max_policy_lag={self.max_policy_lag}"
            )
        n_valid = float(valid.sum())
        accumulator.add("policy_lag", lag * n_valid, n_valid)
        if rollouts.sync_seconds:
            accumulator.add("sync_seconds", rollouts.sync_seconds, 1.0)
        if lag == 0:
            accumulator.add_valid(DIFFERENCE, (log_probs.detach() - rollouts.log_probs).abs(), valid)
        weights, ratios = importance_weights(log_probs, rollouts.log_probs, clip=self.clip)
        accumulator.add_valid("importance_ratio", ratios, valid)
        accumulator.add_valid("importance_weight", weights, valid)
        accumulator.add_valid("importance_clipped_fraction", (weights < ratios).to(torch.float64), valid)
        return weights


def check_parity(config: RunConfig, total: float, count: float, *, version: int) -> None:
    """Judge the differences of one step, summed over all workers, so that all of them come to the same end.

    Raises:
        ParityError: the engine's log-probabilities are not the trainer's.
    """
    allowed = config.rollout.parity_threshold or THRESHOLDS[config.training.precision]
    # NaN is no agreement, either.
    if count and not total / count <= allowed:
        raise ParityError(
            f"the rollout engine's log-probabilities differ from the trainer's by {total / count:.3g} on average over "
            f"{count:.0f} tokens after the transfer of version {version}; allowed is {allowed:g} "
            "(rollout.parity_threshold). The engine does not compute the trained policy: check its precision, or use "
            "backend=strided"
        )
