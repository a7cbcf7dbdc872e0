"""Planned against taken, on tables whose numbers are chosen by hand."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pytest

from ebft_study.report import planned

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


def test_kinds_and_the_whole_are_compared() -> None:
    sft, ebft = planned.compare(DONE, PLAN)
    assert (sft.trials, sft.planned, sft.took) == (1, 60.0, 66.0)
    assert sft.error == pytest.approx(0.1)
    assert (ebft.trials, ebft.planned, ebft.took) == (2, 420.0, 420.0)
    rows = dict(planned.rows(DONE, events()))
    assert rows["Trial time, planned for the steps that were done"] == "planned 8 min 0 s, took 8 min 6 s (+1 %)"
    assert rows["Wall-clock, planned for 2 trials at a time"] == "planned 4 min 0 s, took 4 min 15 s (+6 %)"
    assert rows["Of which 1 like sft"].endswith("(+10 %)")
    assert rows["Of which 2 like ebft"].endswith("(+0 %)")


def test_a_trial_that_was_stopped_counts_with_the_part_that_it_did() -> None:
    stopped = trials(("t1", 25, 60, 0, 60))
    (ebft,) = planned.compare(stopped, PLAN)
    assert ebft.planned == 10 + 0.25 * 200
    assert ebft.error == 0.0


def test_trials_that_have_not_ended_say_nothing_yet() -> None:
    running = DONE.assign(total_seconds=[66.0, float("nan"), float("nan")])
    assert [kind.label for kind in planned.compare(running, PLAN)] == ["sft"]
    nothing = DONE.assign(total_seconds=float("nan"))
    assert planned.rows(nothing, events()) == []


def test_trials_that_a_search_chose_are_of_the_kind_that_lists_none() -> None:
    plan = {**PLAN, "kinds": [PLAN["kinds"][0], {**PLAN["kinds"][1], "trials": []}]}  # type: ignore[index]
    assert [kind.trials for kind in planned.compare(DONE, plan)] == [1, 2]


def test_a_pause_between_sessions_is_no_error_of_the_plan() -> None:
    resumed = trials(("t0", 100, 66, 0, 66), ("t1", 100, 210, 5000, 5210))
    assert not any(name.startswith("Wall-clock") for name, _ in planned.rows(resumed, events()))


def test_studies_without_a_plan_on_record_have_no_rows() -> None:
    assert planned.rows(DONE, events(None)) == []
