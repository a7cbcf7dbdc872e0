"""What a study's services did, from its metrics table: rows of name and text, for the report and for `status`."""

from __future__ import annotations

import pandas as pd

from ebft_study import text

Facts = list[tuple[str, str]]


def used(metrics: pd.DataFrame) -> Facts:
    """Rollout engine and feature service; nothing of one that no trial used."""
    return [*_engine(metrics), *_features(metrics)]


def _engine(metrics: pd.DataFrame) -> Facts:
    rows = metrics[metrics["policy_lag"].notna()]
    if not len(rows):
        return []
    facts = []
    if rows["parity_max_difference"].notna().any():
        facts.append(
            (
                "Rollout engine against trainer, |difference of log-probabilities|",
                f"mean {rows['parity_mean_difference'].mean():.1e}, largest {rows['parity_max_difference'].max():.1e}",
            )
        )
    low, high = rows["importance_ratio_min"].min(), rows["importance_ratio_max"].max()
    clipped, effective = rows["importance_clipped_fraction"].mean(), rows["effective_sample_fraction"].min()
    return [
        *facts,
        ("Weight transfer per step (median)", _short(rows["sync_seconds"].median())),
        ("Sampling weights behind by", f"{rows['policy_lag'].mean():.2g} updates on average"),
        (
            "Importance ratios",
            f"{low:.3g} to {high:.3g}, {100 * clipped:.2g} % truncated, "
            f"at least {100 * effective:.3g} % of samples effective",
        ),
    ]


def _features(metrics: pd.DataFrame) -> Facts:
    rows = metrics[metrics["feature_queue_seconds"].notna()]
    if not len(rows):
        return []
    embedded, saved = rows["feature_tokens_embedded"].sum(), rows["feature_tokens_saved"].sum()
    memory, disk = rows["feature_hit_rate_memory"].mean(), rows["feature_hit_rate_disk"].mean()
    truth, samples = rows["ground_truth_hit_rate"].mean(), rows["sample_hit_rate"].mean()
    return [
        (
            "Features found by the service",
            f"{100 * (memory + disk):.0f} % ({100 * memory:.0f} % in memory, {100 * disk:.0f} % on disk); "
            f"ground truth {100 * truth:.0f} %, samples {100 * samples:.0f} %",
        ),
        ("Tokens embedded and saved", f"{text.count(embedded)} and {text.count(saved)}"),
        (
            "Wait for the service (mean), requests in one pass (mean)",
            f"{_short(rows['feature_queue_seconds'].mean())}, {rows['feature_batch_requests'].mean():.2f}",
        ),
        ("Feature cache, both tiers", text.size(rows["feature_cache_bytes"].max())),
    ]


def _short(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else text.duration(seconds)
