"""Time, memory and services that a study used, on tables whose numbers are chosen by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ebft_study.analysis import usage
from ebft_study.results import METRICS, StudyRecorder, load, read_table
from tests.synthetic_study import write_study

# --- plan against actual ---------------------------------------------------------------------------------------------

START = pd.Timestamp("2026-01-01T00:00:00Z")
PLAN = {
    "at_once": 2,
    "seconds": 330.0,
    "kinds": [
        {"label": "sft", "trials": ["t0"], "number": 1, "steps": 100, "seconds": 60.0, "startup_seconds": 10.0},
        {"label": "ebft", "trials": ["t1", "t2"], "number": 2, "steps": 100, "seconds": 210.0, "startup_seconds": 10.0},
    ],
}


def events(plan: dict[str, Any] | None = PLAN) -> pd.DataFrame:
    kinds, details = ["session"], [None]
    if plan:
        kinds, details = ["session", "plan"], [None, json.dumps(plan)]
    return pd.DataFrame({"kind": kinds, "details": details})


def trials(*rows: tuple[str, float, float, float, float]) -> pd.DataFrame:
    """(trial, steps done, total seconds, start, end)"""
    frame = pd.DataFrame(rows, columns=["trial_id", "steps_done", "total_seconds", "started_at", "finished_at"])
    for name in ("started_at", "finished_at"):
        frame[name] = START + pd.to_timedelta(frame[name], unit="s")
    return frame


DONE = trials(("t0", 100, 66, 0, 66), ("t1", 100, 231, 0, 231), ("t2", 100, 189, 66, 255))


def test_groups_and_the_whole_are_compared() -> None:
    sft, ebft = usage.planned_times(DONE, PLAN)
    assert (sft.trials, sft.planned, sft.took) == (1, 60.0, 66.0)
    assert sft.error == pytest.approx(0.1)
    assert (ebft.trials, ebft.planned, ebft.took) == (2, 420.0, 420.0)
    rows = dict(usage.plan_against_actual(DONE, events()))
    assert rows["Trial time, planned for the steps that were done"] == "planned 8 min 0 s, took 8 min 6 s (+1 %)"
    assert rows["Wall-clock, planned for 2 trials at a time"] == "planned 4 min 0 s, took 4 min 15 s (+6 %)"
    assert rows["Of which 1 like sft"].endswith("(+10 %)")
    assert rows["Of which 2 like ebft"].endswith("(+0 %)")


def test_a_trial_that_was_stopped_counts_with_the_part_that_it_did() -> None:
    stopped = trials(("t1", 25, 60, 0, 60))
    (ebft,) = usage.planned_times(stopped, PLAN)
    assert ebft.planned == 10 + 0.25 * 200
    assert ebft.error == 0.0


def test_trials_that_have_not_ended_say_nothing_yet() -> None:
    running = DONE.assign(total_seconds=[66.0, float("nan"), float("nan")])
    assert [group.label for group in usage.planned_times(running, PLAN)] == ["sft"]
    nothing = DONE.assign(total_seconds=float("nan"))
    assert usage.plan_against_actual(nothing, events()) == []


def test_trials_that_a_search_chose_are_of_the_group_that_lists_none() -> None:
    plan = {**PLAN, "kinds": [PLAN["kinds"][0], {**PLAN["kinds"][1], "trials": []}]}  # type: ignore[index]
    assert [group.trials for group in usage.planned_times(DONE, plan)] == [1, 2]


def test_a_pause_between_sessions_is_no_error_of_the_plan() -> None:
    resumed = trials(("t0", 100, 66, 0, 66), ("t1", 100, 210, 5000, 5210))
    assert not any(name.startswith("Wall-clock") for name, _ in usage.plan_against_actual(resumed, events()))


def test_studies_without_a_recorded_plan_have_no_rows() -> None:
    assert usage.plan_against_actual(DONE, events(None)) == []


# --- early stopping --------------------------------------------------------------------------------------------------

EFFECTS = {(0.0, 0.0): (0.3, 0.2), (1.0, 0.0): (0.0, -0.1), None: (-0.2, 0.0)}
CPU = {"workers_per_trial": 0, "gpus_per_worker": 0.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six trials of 40 steps, of which nothing was saved."""
    return write_study(tmp_path / "s", effects=EFFECTS, seeds=(0, 1))


def stop(folder: Path, **columns: Any) -> None:
    for trial_id, values in columns.items():
        steps, seconds = values
        StudyRecorder(folder, study="s").trial(
            {"trial_id": trial_id, "status": "stopped", "steps_saved": steps, "seconds_saved": seconds}
        )


def test_nothing_is_reported_where_nothing_was_stopped(folder: Path) -> None:
    assert usage.savings(read_table(folder, "trials"), CPU) == ""


def test_steps_and_time_are_added_up(folder: Path) -> None:
    stop(folder, t000=(20, 30.0), t001=(35, 42.0))
    assert usage.savings(read_table(folder, "trials"), CPU) == "55 of 240 steps (about 1 min 12 s of trials)"


def test_gpu_hours_count_all_workers(folder: Path) -> None:
    stop(folder, t000=(20, 1800.0))
    resources = {"workers_per_trial": 2, "gpus_per_worker": 1.5}
    saved = usage.savings(read_table(folder, "trials"), resources)
    assert saved.endswith("(about 30 min 0 s of trials, 1.50 GPU hours)")


def test_a_trial_without_a_throughput_saves_steps_only(folder: Path) -> None:
    stop(folder, t000=(40, None))
    assert usage.savings(read_table(folder, "trials"), CPU) == "40 of 240 steps"
    stop(folder, t001=(40, 12.0))
    assert usage.savings(read_table(folder, "trials"), CPU) == "80 of 240 steps (about 12.0 s of trials)"


SAVED = "20 of 240 steps (about 30.0 s of trials)"


def test_savings_are_part_of_the_cost(folder: Path) -> None:
    assert "Early stopping saved" not in dict(usage.cost(load(folder)))
    stop(folder, t000=(20, 30.0))
    assert dict(usage.cost(load(folder)))["Early stopping saved"] == SAVED


# --- services --------------------------------------------------------------------------------------------------------


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
    assert usage.services(metrics({"loss": 1.0})) == []


def test_an_engine_is_described_by_its_extremes_and_means() -> None:
    probed = ENGINE | {"parity_mean_difference": 1e-6, "parity_max_difference": 2e-5, "policy_lag": 0.0}
    rows = dict(usage.services(metrics(ENGINE, probed, {"loss": 1.0})))
    assert rows["Rollout engine against trainer, |difference of log-probabilities|"] == "mean 1.0e-06, largest 2.0e-05"
    assert rows["Sampling weights behind by"] == "0.5 updates on average"
    assert rows["Importance ratios"] == "0.5 to 3, 25 % truncated, at least 90 % of samples effective"
    assert rows["Weight transfer per step (median)"] == "500.0 ms"
    rounded = probed | {"rechunk_mean_difference": 0.01, "rechunk_off_fraction": 0.08, "parity_off_fraction": 0.075}
    itself = "mean 1.0e-02, 8 % of ratios off by more than 10 %; the engine's 7.5 %"
    assert dict(usage.services(metrics(rounded)))["Trainer against itself, cut another way (bfloat16)"] == itself
    assert not any("itself" in label for label in rows)


def test_the_feature_service_is_described_by_what_it_found_and_saved() -> None:
    last = SERVICE | {"feature_tokens_embedded": float("nan"), "feature_cache_bytes": 2.0**22}
    rows = dict(usage.services(metrics(SERVICE, last)))
    hits = rows["Features found by the service"]
    assert hits == "75 % (50 % in memory, 25 % on disk); ground truth 100 %, samples 50 %"
    assert rows["Tokens embedded and saved"] == "1\u202f000 and 6\u202f000"
    assert rows["Feature cache, both tiers"] == "4 MiB"
