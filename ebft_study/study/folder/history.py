"""The results of earlier sessions, from a study's tables: all that a resumed study needs."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ebft_study import results
from ebft_study.analysis.statistics import Score
from ebft_study.analysis.usage import REDONE_EVENT
from ebft_study.results.metrics import COST
from ebft_study.results.reader import missing_files
from ebft_study.storage import Location
from ebft_study.study.folder import study_yaml
from ebft_study.study.folder.trial_states import (
    CONFIGURATION_STOPPED,
    EARLY_STOP,
    OPEN,
    Evaluation,
    TrialResult,
    TrialState,
    trial_result,
)
from ebft_study.study.spec.trials import Replicate

if TYPE_CHECKING:
    import pandas as pd

Curve = list[tuple[float, float]]

BUDGET_USED = "budget.max_hours is used up"
SESSION = "session"
"""Event that begins a session; written before everything else that a session records."""
STATE_COLUMNS = (
    *("label", "status", "error", "stop_reason", "started_at", "total_seconds", "steps", "warm_start_steps"),
)
"""Columns of `trials` that `states` reads, besides those that identify a row."""
_NO_METRICS = ("study", "trial_id", "attempt", "step", "written_at")


@dataclass(frozen=True)
class History:
    """Per trial: its state, how it ended (if it did), its (step, objective), its evaluations."""

    states: dict[str, TrialState]
    trial_results: dict[str, TrialResult]
    curves: dict[Replicate, Curve]
    evaluations: dict[str, list[Evaluation]] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)
    """Configuration -> why no seed of it runs: the scheduler stopped it, or it was not promoted."""
    session_seconds: float = 0.0
    """Duration of all sessions of the study so far."""


def read(study_folder: Location, objective: str, further: Sequence[str] = ()) -> History:
    """The history of a study; empty for one that has not started.

    `objective` is the metric of schedulers and stopping rules, `further` are those of a search with several objectives.
    """
    rows = results.read_table(study_folder, "trials")
    metrics = results.read_table(study_folder, "metrics")
    events = results.read_table(study_folder, "events")
    redone, by_trial = _redone(events), _evaluations(metrics)
    states_by_trial = states(rows, metrics)
    best_cfm = metrics.loc[np.isfinite(metrics["cfm_loss"])].groupby("trial_id")["cfm_loss"].min()
    trial_results: dict[str, TrialResult] = {}
    curves: dict[Replicate, Curve] = {}
    evaluations: dict[str, list[Evaluation]] = {}
    stopped: dict[str, str] = {}
    for row in rows.to_dict("records"):
        state = states_by_trial[row["trial_id"]]
        state.redone = redone.get(state.trial_id, {})
        state.best_cfm = float(best_cfm.get(state.trial_id, math.inf))
        if state.trial_id in by_trial and _text(row["named_baseline"]) == "":
            evaluations[state.trial_id] = by_trial[state.trial_id]
            names = (objective, *further)
            state.curve = {e.step: tuple(e.get(name) for name in names) for e in evaluations[state.trial_id]}
            curves[_replicate(row)] = _curve(evaluations[state.trial_id], objective)
        if state.status not in OPEN:
            trial_results[state.trial_id] = trial_result(state, objective, further)
        if state.note.startswith(f"{EARLY_STOP}: {CONFIGURATION_STOPPED}"):
            # Without the steps saved, which are those of one trial.
            stopped[_text(row["configuration"])] = state.note.removeprefix(f"{EARLY_STOP}: ").rpartition("; ")[0]
        elif state.status == results.SKIPPED:
            stopped[_text(row["configuration"])] = state.note
    return History(states_by_trial, trial_results, curves, evaluations, stopped, _session_seconds(events, metrics))


def scores(folder: Location, objective: str) -> Callable[[int], dict[str, Score]]:
    """Step -> trial -> its validation value of the objective with those of single sequences, from the newest record."""

    def at_step(step: int) -> dict[str, Score]:
        rows = results.read_table(folder, "scores")
        rows = rows[(rows["benchmark"] == "validation") & (rows["metric"] == objective) & (rows["step"] == step)]
        lists = zip(rows["trial_id"], rows["sequences"], rows["counts"], rows["values"], strict=True)
        return {
            trial: Score(float(np.average(values, weights=counts)), sequences, counts, values)
            for trial, sequences, counts, values in lists
        }

    return at_step


def problems(folder: Location) -> list[str]:
    """Damaged files of a study, and changes that were made to its record by hand."""
    messages = study_yaml.changes(folder)
    for table in results.TABLES:
        results.check_table(folder, table, messages)
    return [*messages, *missing_files(folder)]


def _session_seconds(events: pd.DataFrame, metrics: pd.DataFrame) -> float:
    """Duration of all sessions: from the first to the last moment on record of each, as a killed one has no end."""
    import pandas as pd

    starts = events.loc[events["kind"] == SESSION, "time"].sort_values().tolist()
    moments = pd.concat([events["time"], metrics["written_at"]]).dropna().sort_values(ignore_index=True)
    last = [*(moments.iloc[moments.searchsorted(start) - 1] for start in starts[1:]), *moments.tail(1)]
    return float(sum(max((end - start).total_seconds(), 0.0) for start, end in zip(starts, last, strict=False)))


def _redone(events: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Trial -> metric -> cost of work that was done again."""
    costs: dict[str, Counter[str]] = defaultdict(Counter)
    for row in events[events["kind"] == REDONE_EVENT].to_dict("records"):
        costs[row["trial_id"]].update(json.loads(row["details"]))
    return {trial_id: dict(cost) for trial_id, cost in costs.items()}


def states(trials: pd.DataFrame, metrics: pd.DataFrame) -> dict[str, TrialState]:
    """The state of every trial, from its row and its metrics, as far as their columns were read.

    Args:
        metrics: in order of steps.
    """
    steps = metrics.groupby("trial_id")["step"].max()
    latest = _records(metrics.groupby("trial_id")[_measured(metrics)].last())
    # A later attempt may have begun at an earlier step, and has not reached the last one again.
    attempts = metrics["trial_id"].map(trials.set_index("trial_id")["attempt"])
    current = metrics[metrics["attempt"] == attempts].groupby("trial_id").tail(1).set_index("trial_id")
    costs = _records(current[[name for name in COST if name in current]])
    found = {}
    for row in trials.to_dict("records"):
        state = found[row["trial_id"]] = _state(row)
        if state.trial_id in latest:
            state.step = int(steps[state.trial_id])
            state.metrics = {name: value for name, value in latest[state.trial_id].items() if name not in COST}
            state.metrics |= costs.get(state.trial_id, {})
    return found


def _measured(metrics: pd.DataFrame) -> list[str]:
    """Names of the metrics of a table that any trial has measured."""
    return [name for name in metrics.columns if name not in _NO_METRICS and metrics[name].notna().any()]


def _records(table: pd.DataFrame) -> dict[Hashable, dict[str, float]]:
    """Index -> finite values by column."""
    return dict(zip(table.index, _finite(table), strict=True))


def _finite(table: pd.DataFrame) -> list[dict[str, float]]:
    """The finite values of each row, by column."""
    names, rows = [str(name) for name in table.columns], table.to_numpy(dtype=float).tolist()
    return [{name: value for name, value in zip(names, row, strict=True) if math.isfinite(value)} for row in rows]


def _state(row: dict[Any, Any]) -> TrialState:
    state = TrialState(
        trial_id=row["trial_id"],
        label=_text(row["label"]),
        status=row["status"],
        attempt=int(row["attempt"]),
        total_steps=int(row["warm_start_steps"] + row["steps"]),
        earlier_seconds=0.0 if math.isnan(row["total_seconds"]) else float(row["total_seconds"]),
        note=_text(row["error"]) or _text(row["stop_reason"]),
    )
    if state.status == "running" and row["started_at"] == row["started_at"]:  # NaT differs from itself
        state.started_at = row["started_at"].timestamp()
    return state


def _replicate(row: dict[Any, Any]) -> Replicate:
    warm, steps = int(row["warm_start_steps"]), int(row["steps"])
    return Replicate(row["trial_id"], _text(row["configuration"]), int(row["seed"]), warm + steps, warm)


def _curve(evaluations: list[Evaluation], objective: str) -> Curve:
    seen = [(float(e.step), e.get(objective)) for e in evaluations]
    return [(step, value) for step, value in seen if math.isfinite(value)]


def _evaluations(metrics: pd.DataFrame) -> dict[str, list[Evaluation]]:
    """Trial -> rows with an evaluation, each with the latest training metrics before it, as reports have them."""
    evaluated = metrics["ce_loss"].notna()
    latest = _finite(metrics.groupby("trial_id")[_measured(metrics)].ffill()[evaluated])
    by_trial: dict[str, list[Evaluation]] = {str(trial): [] for trial in metrics["trial_id"].unique()}
    for trial, step, row in zip(metrics["trial_id"][evaluated], metrics["step"][evaluated], latest, strict=True):
        by_trial[trial].append(Evaluation(int(step), row))
    return by_trial


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
