"""What training steps tally, and the row of metrics that it becomes."""

from __future__ import annotations

import math

from ebft_study.methods import MetricAccumulator, off_policy

PHASES = ("sync_seconds", "rollout_seconds", "feature_seconds", "scoring_seconds", "optimizer_seconds", "step_seconds")
AVERAGED = (
    "train_ce_loss",
    "kl",
    "reward",
    "alignment",
    "diversity",
    "zero_variance_fraction",
    "duplicate_rate",
    "policy_entropy",
    "train_cfm_loss",
    "fm_whitened",
    "grad_norm",
    "policy_lag",
    "parity_mean_difference",
    "importance_ratio",
    "importance_weight",
    "importance_clipped_fraction",
    "feature_hit_rate_memory",
    "feature_hit_rate_disk",
    "sample_hit_rate",
    "ground_truth_hit_rate",
    "feature_queue_seconds",
    "feature_batch_requests",
    "feature_cache_bytes",
)
SUMMED = ("feature_tokens_embedded", "feature_tokens_saved")
LOSSES = ("loss", "policy_loss")
SQUARES = ("advantage", "advantage_squared", "importance_ratio_squared")
TALLIED = (*AVERAGED, *SUMMED, *PHASES, *LOSSES, *SQUARES)


def row_of(total: MetricAccumulator, *, steps: int, workers: int) -> dict[str, float]:
    """Metrics of `steps` updates from the tally of all workers; none of what was not observed."""
    row = {name: total.mean(name) for name in AVERAGED if total.counts.get(name)}
    if total.counts.get("advantage"):
        mean = total.mean("advantage")
        row["advantage_std"] = math.sqrt(max(total.mean("advantage_squared") - mean * mean, 0.0))
        row["policy_loss"] = total.sums["policy_loss"] / steps
    row |= off_policy.metrics(total)
    row |= {name: total.sums[name] for name in SUMMED if total.sums[name] > 0}
    row["loss"] = total.sums["loss"] / steps
    return row | {name: total.sums[name] / steps / workers for name in PHASES if total.sums[name] > 0}
