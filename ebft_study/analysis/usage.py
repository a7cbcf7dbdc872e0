"""Time, memory and services that a study used, as rows of name and text: for the report and for `status`.

Plan against actual comes from the forecast that is recorded in the event `plan` when a study starts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ebft_study import text
from ebft_study.results import SKIPPED

if TYPE_CHECKING:
    import pandas as pd

    from ebft_study.results import Results

Facts = list[tuple[str, str]]

PLAN_EVENT = "plan"
"""Kind of the event that holds the forecast of a study."""
REDONE_EVENT = "redone"
"""Kind of the event that holds the cost of what a new attempt of a trial does again."""
MAX_GROUPS = 8
SAVINGS_COLUMNS = ("status", "steps", "warm_start_steps", "steps_saved", "seconds_saved")
"""Columns of `trials` that `savings` reads."""
SERVICES_COLUMNS = (
    *("policy_lag", "sync_seconds", "parity_mean_difference", "parity_max_difference", "parity_off_fraction"),
    *("rechunk_mean_difference", "rechunk_off_fraction", "importance_ratio_min", "importance_ratio_max"),
    *("importance_clipped_fraction", "effective_sample_fraction"),
    *("feature_queue_seconds", "feature_tokens_embedded", "feature_tokens_saved", "feature_hit_rate_memory"),
    *("feature_hit_rate_disk", "ground_truth_hit_rate", "sample_hit_rate", "feature_batch_requests"),
    *("feature_cache_bytes",),
)
"""Columns of `metrics` that `services` reads."""


def cost(results: Results) -> Facts:
    """Time, memory and services that the study used."""
    trials, recorded = results.trials, results.spec.get("resources")
    resources: Mapping[str, Any] = recorded if isinstance(recorded, Mapping) else {}
    wall = _wall_seconds(trials)
    used = trials["total_seconds"].sum(min_count=1)
    cpus = _workers(resources) * float(resources.get("cpus_per_worker", 1))
    gpus = _workers(resources) * float(resources.get("gpus_per_worker", 0))
    cpu_hours = text.number(used * cpus / 3600, 2) if used > 0 else text.NOTHING
    gpu_hours = text.number(used * gpus / 3600 if used > 0 else 0.0, 2)
    saved, n_skipped = savings(trials, resources), int((trials["status"] == SKIPPED).sum())
    return [
        ("Wall-clock, first start to last end", text.duration(wall)),
        ("Trial time, summed", text.duration(used)),
        (f"CPU hours ({cpus:g} CPU per trial)", cpu_hours),
        *([(f"GPU hours ({gpus:g} GPU per trial)", gpu_hours)] if gpus else []),
        *plan_against_actual(trials, results.events),
        *([("Early stopping saved", saved)] if saved else []),
        *([("Not needed, because others were promoted", f"{n_skipped} of {len(trials)} trials")] if n_skipped else []),
        ("Overhead per trial, start to first step (median)", text.duration(trials["startup_seconds"].median())),
        ("Training per trial (median)", text.duration(trials["train_seconds"].median())),
        ("Peak memory of a training process", text.size(trials["peak_memory_bytes"].max())),
        ("Machines", text.listed(sorted(trials["host"].dropna().unique())) or text.NOTHING),
        *services(results.metrics),
    ]


def _workers(resources: Mapping[str, Any]) -> int:
    """Worker processes of a trial; 0 workers run in the trial's own process."""
    return max(1, int(resources.get("workers_per_trial", 1)))


def _wall_seconds(trials: pd.DataFrame) -> float | None:
    """Seconds from the first start to the last end."""
    ended = trials.dropna(subset=["started_at", "finished_at"])
    return float((ended["finished_at"].max() - ended["started_at"].min()).total_seconds()) if len(ended) else None


# --- early stopping --------------------------------------------------------------------------------------------


def savings(trials: pd.DataFrame, resources: Mapping[str, Any]) -> str:
    """`840 of 2 400 steps (about 1 h 10 min of trials)` that early stopping saved; '' where no trial was stopped."""
    stopped = trials[trials["steps_saved"].notna()]
    if not len(stopped):
        return ""
    needed = trials[trials["status"] != SKIPPED]
    planned = needed["steps"].sum() + needed["warm_start_steps"].sum()
    steps = f"{text.count(stopped['steps_saved'].sum())} of {text.count(planned)} steps"
    # By each stopped trial's own throughput, which a trial that was stopped at its first report does not have.
    seconds = stopped["seconds_saved"].sum(min_count=1)
    if text.is_missing(seconds):
        return steps
    gpus = _workers(resources) * float(resources.get("gpus_per_worker", 0))
    gpu_hours = f", {text.number(seconds * gpus / 3600, 2)} GPU hours" if gpus else ""
    return f"{steps} (about {text.duration(seconds)} of trials{gpu_hours})"


# --- plan against actual ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedTime:
    """Trials of one group that ended: seconds planned for the steps that they did, and seconds that they took."""

    label: str
    trials: int
    planned: float
    took: float

    @property
    def error(self) -> float:
        """Relative error of the plan: 0.1 where trials took 10 % longer than planned."""
        return self.took / self.planned - 1

    def __str__(self) -> str:
        change = text.signed(100 * self.error, 0)
        return f"planned {text.duration(self.planned)}, took {text.duration(self.took)} ({change} %)"


def plan_against_actual(trials: pd.DataFrame, events: pd.DataFrame) -> Facts:
    """Rows for the whole study and, where there are several, for each group of trials; empty without a plan."""
    details = events.loc[(events["kind"] == PLAN_EVENT) & events["details"].notna(), "details"]
    plan = json.loads(details.iloc[0]) if len(details) else None
    groups = planned_times(trials, plan) if plan else []
    if not plan or not groups:
        return []
    count, planned = sum(g.trials for g in groups), sum(g.planned for g in groups)
    whole = PlannedTime("", count, planned, sum(g.took for g in groups))
    rows = [("Trial time, planned for the steps that were done", str(whole))]
    wall, concurrency = _wall_seconds(trials), max(1, int(plan["at_once"]))
    ended = trials.dropna(subset=["started_at", "finished_at"])
    # More than the trials' time in all: a session paused before the next one began.
    if wall is not None and wall <= float(ended["total_seconds"].sum()) * 1.05:
        expected = PlannedTime("", count, planned / min(concurrency, count), wall)
        rows.append((f"Wall-clock, planned for {concurrency} trials at a time", str(expected)))
    if len(groups) > 1:
        rows += [(f"Of which {group.trials} like {group.label}", str(group)) for group in groups[:MAX_GROUPS]]
    return rows


def planned_times(trials: pd.DataFrame, plan: Mapping[str, Any]) -> list[PlannedTime]:
    """Groups of which any trial has ended. A trial that was stopped early counts with the part that it did."""
    ended = trials[trials["total_seconds"].notna() & trials["steps_done"].gt(0)]
    listed = {trial_id for group in plan["kinds"] for trial_id in group["trials"]}
    times = []
    for group in plan["kinds"]:
        # A search chooses trials that no plan could list.
        in_group = ended["trial_id"].isin(group["trials"]) if group["trials"] else ~ended["trial_id"].isin(listed)
        done = (ended.loc[in_group, "steps_done"] / max(1, group["steps"])).clip(upper=1.0)
        planned = group["startup_seconds"] + done * (group["seconds"] - group["startup_seconds"])
        if len(done):
            took = float(ended.loc[in_group, "total_seconds"].sum())
            times.append(PlannedTime(str(group["label"]), len(done), float(planned.sum()), took))
    return times


# --- services --------------------------------------------------------------------------------------------------


def services(metrics: pd.DataFrame) -> Facts:
    """Use of the rollout engine and the feature service; nothing about a service that no trial used."""
    return [*_rollout_engine(metrics), *_feature_service(metrics)]


def _rollout_engine(metrics: pd.DataFrame) -> Facts:
    rows = metrics[metrics["policy_lag"].notna()]
    if not len(rows):
        return []
    mean, largest = rows["parity_mean_difference"].mean(), rows["parity_max_difference"].max()
    low, high = rows["importance_ratio_min"].min(), rows["importance_ratio_max"].max()
    clipped, effective = rows["importance_clipped_fraction"].mean(), rows["effective_sample_fraction"].min()
    parity = (
        "Rollout engine against trainer, |difference of log-probabilities|",
        f"mean {mean:.1e}, largest {largest:.1e}",
    )
    noise, off = rows["rechunk_mean_difference"].mean(), 100 * rows["rechunk_off_fraction"].mean()
    itself = (
        "Trainer against itself, cut another way (bfloat16)",
        f"mean {noise:.1e}, {off:.2g} % of ratios off by more than 10 %; "
        f"the engine's {100 * rows['parity_off_fraction'].mean():.2g} %",
    )
    return [
        *([] if text.is_missing(largest) else [parity]),
        *([] if text.is_missing(noise) else [itself]),
        ("Weight transfer per step (median)", _milliseconds(rows["sync_seconds"].median())),
        ("Sampling weights behind by", f"{rows['policy_lag'].mean():.2g} updates on average"),
        (
            "Importance ratios",
            f"{low:.3g} to {high:.3g}, {100 * clipped:.2g} % truncated, "
            f"at least {100 * effective:.3g} % of samples effective",
        ),
    ]


def _feature_service(metrics: pd.DataFrame) -> Facts:
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
            f"{_milliseconds(rows['feature_queue_seconds'].mean())}, {rows['feature_batch_requests'].mean():.2f}",
        ),
        ("Feature cache, both tiers", text.size(rows["feature_cache_bytes"].max())),
    ]


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else text.duration(seconds)
