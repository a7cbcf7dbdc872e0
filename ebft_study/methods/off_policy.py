"""Rollouts that another engine sampled: how old, how equal, and by how much to weight them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ebft_study.algorithm.losses import importance_weights
from ebft_study.errors import ParityError, ServiceError
from ebft_study.methods import MetricAccumulator
from ebft_study.rollouts import Rollouts

if TYPE_CHECKING:
    from ebft_study.config import RunConfig

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
            accumulator.add_valid(DIFFERENCE, (log_probs.detach() - rollouts.log_probs).abs(), valid)
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
        accumulator.add_valid(DIFFERENCE, difference.abs(), mask)
    accumulator.add_valid("importance_ratio", difference.sum(dim=-1).exp(), mask.any(dim=-1))


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
