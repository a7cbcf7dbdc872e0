"""What the report and `status` say of services."""

from __future__ import annotations

import pandas as pd

from ebft_study.report import services
from ebft_study.results import METRICS


def metrics(*rows: dict[str, float]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=[*METRICS]).astype("float64")


ENGINE = {
    "policy_lag": 1.0, "sync_seconds": 0.5, "importance_ratio_min": 0.5, "importance_ratio_max": 3.0,
    "importance_clipped_fraction": 0.25, "effective_sample_fraction": 0.9,
}  # fmt: skip
SERVICE = {
    "feature_queue_seconds": 0.002, "feature_batch_requests": 1.5, "feature_hit_rate_memory": 0.5,
    "feature_hit_rate_disk": 0.25, "ground_truth_hit_rate": 1.0, "sample_hit_rate": 0.5,
    "feature_tokens_embedded": 1000.0, "feature_tokens_saved": 3000.0, "feature_cache_bytes": 2.0**21,
}  # fmt: skip


def test_a_study_without_services_says_nothing() -> None:
    assert services.used(metrics({"loss": 1.0})) == []


def test_an_engine_is_described_by_its_extremes_and_means() -> None:
    probed = ENGINE | {"parity_mean_difference": 1e-6, "parity_max_difference": 2e-5, "policy_lag": 0.0}
    said = dict(services.used(metrics(ENGINE, probed, {"loss": 1.0})))
    assert said["Rollout engine against trainer, |difference of log-probabilities|"] == "mean 1.0e-06, largest 2.0e-05"
    assert said["Sampling weights behind by"] == "0.5 updates on average"
    assert said["Importance ratios"] == "0.5 to 3, 25 % truncated, at least 90 % of samples effective"
    assert said["Weight transfer per step (median)"] == "500.0 ms"


def test_the_feature_service_is_described_by_what_it_found_and_saved() -> None:
    last = SERVICE | {"feature_tokens_embedded": float("nan"), "feature_cache_bytes": 2.0**22}
    said = dict(services.used(metrics(SERVICE, last)))
    found = said["Features found by the service"]
    assert found == "75 % (50 % in memory, 25 % on disk); ground truth 100 %, samples 50 %"
    assert said["Tokens embedded and saved"] == "1\u202f000 and 6\u202f000"
    assert said["Feature cache, both tiers"] == "4 MiB"
