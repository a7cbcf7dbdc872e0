"""What a study was expected to take, beside what it took: from the plan that is on record since its start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ebft_study import text

EVENT = "plan"
"""Kind of the event that holds the forecast of a study."""
_MOST_KINDS = 8


@dataclass(frozen=True)
class Comparison:
    """Trials of one kind that ran: seconds that were planned for the steps they did, and seconds that they took."""

    label: str
    trials: int
    planned: float
    took: float

    @property
    def error(self) -> float:
        """Of the plan, as a part of it: 0.1 where trials took 10 % longer than planned."""
        return self.took / self.planned - 1

    def __str__(self) -> str:
        change = text.signed(100 * self.error, 0)
        return f"planned {text.duration(self.planned)}, took {text.duration(self.took)} ({change} %)"


def rows(trials: pd.DataFrame, events: pd.DataFrame) -> list[tuple[str, str]]:
    """Of the whole study and, where there are several, of each kind of trial; nothing where no plan is on record."""
    plan = _plan(events)
    kinds = compare(trials, plan) if plan else []
    if not plan or not kinds:
        return []
    whole = Comparison("", sum(k.trials for k in kinds), sum(k.planned for k in kinds), sum(k.took for k in kinds))
    found = [("Trial time, planned for the steps that were done", str(whole))]
    wall, concurrency = _wall(trials), max(1, int(plan["at_once"]))
    if wall is not None:
        expected = Comparison("", whole.trials, whole.planned / min(concurrency, whole.trials), wall)
        found.append((f"Wall-clock, planned for {concurrency} trials at a time", str(expected)))
    if len(kinds) > 1:
        found += [(f"Of which {kind.trials} like {kind.label}", str(kind)) for kind in kinds[:_MOST_KINDS]]
    return found


def compare(trials: pd.DataFrame, plan: Mapping[str, Any]) -> list[Comparison]:
    """Kinds of which any trial has ended. A trial that was stopped early counts with the part that it did."""
    ended = trials[trials["total_seconds"].notna() & trials["steps_done"].gt(0)]
    listed = {trial_id for kind in plan["kinds"] for trial_id in kind["trials"]}
    found = []
    for kind in plan["kinds"]:
        # A search chooses trials that no plan could list.
        own = ended["trial_id"].isin(kind["trials"]) if kind["trials"] else ~ended["trial_id"].isin(listed)
        done = (ended.loc[own, "steps_done"] / max(1, kind["steps"])).clip(upper=1.0)
        planned = kind["startup_seconds"] + done * (kind["seconds"] - kind["startup_seconds"])
        if len(done):
            took = float(ended.loc[own, "total_seconds"].sum())
            found.append(Comparison(str(kind["label"]), len(done), float(planned.sum()), took))
    return found


def _plan(events: pd.DataFrame) -> dict[str, Any] | None:
    told = events.loc[(events["kind"] == EVENT) & events["details"].notna(), "details"]
    found: dict[str, Any] | None = json.loads(told.iloc[0]) if len(told) else None
    return found


def _wall(trials: pd.DataFrame) -> float | None:
    """Seconds from the first start to the last end; None where sessions had pauses between them."""
    known = trials.dropna(subset=["started_at", "finished_at"])
    if not len(known):
        return None
    wall = float((known["finished_at"].max() - known["started_at"].min()).total_seconds())
    return wall if wall <= float(known["total_seconds"].sum()) * 1.05 else None
