"""Early stopping, without a cluster: decisions do not depend on how often the study was resumed."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from ebft_study.study import space
from ebft_study.study.schedulers import Rungs
from ebft_study.study.spec import StudySpec

STEPS, EVERY = 16, 2


def spec(mode: str = "min") -> StudySpec:
    content = {
        "study": "s",
        "question": "q",
        "scheduler": {"kind": "asha", "grace_period_steps": 4, "reduction_factor": 2},
        "objective": {"metric": "cfm_loss", "mode": mode},
    }
    return space.from_record(content, source="test")


def tune_trial(name: str, *, session: int = 0, is_baseline: bool = False) -> Any:
    """A trial as Tune hands it over: an identifier of Tune's own, which changes from session to session."""
    settings = {"trial_id": name, "is_baseline": is_baseline, "total_steps": STEPS}
    return SimpleNamespace(trial_id=f"tune-{session}-{name}", config=settings)


def run(rungs: Rungs, trial: Any, value: float, first: int = 0, last: int = STEPS) -> list[tuple[float, float]]:
    """Report `value` every other step until the trial is stopped; returns the curve of what was reported."""
    rungs.on_trial_add(None, trial)
    curve = []
    for step in range(first, last + 1, EVERY):
        curve.append((float(step), value))
        if rungs.on_trial_result(None, trial, {"step": step, "cfm_loss": value}) == TrialScheduler.STOP:
            break
    return curve


def test_worse_trials_are_stopped_at_a_rung() -> None:
    rungs = Rungs(spec(), longest=STEPS, history={})
    assert run(rungs, tune_trial("a"), 1.0)[-1][0] == STEPS
    assert run(rungs, tune_trial("b"), 2.0)[-1][0] == 4
    assert run(rungs, tune_trial("c"), 0.5)[-1][0] == STEPS


def test_the_better_side_depends_on_the_mode() -> None:
    rungs = Rungs(spec("max"), longest=STEPS, history={})
    assert run(rungs, tune_trial("a"), 1.0)[-1][0] == STEPS
    assert run(rungs, tune_trial("b"), 2.0)[-1][0] == STEPS
    assert run(rungs, tune_trial("c"), 0.5)[-1][0] == 4


@pytest.mark.parametrize("resumed_before", range(1, 8))
def test_decisions_are_the_same_with_and_without_a_resume(resumed_before: int) -> None:
    values = [3.0, 1.0, 2.0, 2.5, 0.5, 4.0, 0.75, 1.5]
    whole = Rungs(spec(), longest=STEPS, history={})
    expected = [run(whole, tune_trial(f"t{i}"), value)[-1][0] for i, value in enumerate(values)]

    first, curves, ends = Rungs(spec(), longest=STEPS, history={}), {}, []
    for i, value in enumerate(values[:resumed_before]):
        curve = run(first, tune_trial(f"t{i}"), value)
        curves[f"t{i}"] = [point for point in curve if point[0] < STEPS]
        ends.append(curve[-1][0])
    second = Rungs(spec(), longest=STEPS, history=curves)
    for i, value in enumerate(values[resumed_before:], start=resumed_before):
        ends.append(run(second, tune_trial(f"t{i}", session=1), value)[-1][0])
    assert ends == expected


def test_a_resumed_trial_is_not_counted_twice() -> None:
    """One good trial half way, resumed: a second that is a little worse must still find only one above it."""
    history = {"a": [(step, 1.0) for step in range(0, 9, EVERY)]}
    rungs = Rungs(spec(), longest=STEPS, history=history)
    assert run(rungs, tune_trial("a", session=1), 1.0, first=8)[-1][0] == STEPS
    recorded = [dict(values) for _, values in rungs._brackets[0]._rungs]
    assert all(set(values) <= {"a"} for values in recorded)


def test_baselines_are_never_stopped_and_set_no_standard() -> None:
    rungs = Rungs(spec(), longest=STEPS, history={})
    assert run(rungs, tune_trial("base", is_baseline=True), 0.1)[-1][0] == STEPS
    assert run(rungs, tune_trial("a"), 1.0)[-1][0] == STEPS
    assert run(rungs, tune_trial("bad", is_baseline=True), 9.0)[-1][0] == STEPS


def test_a_trial_that_did_its_last_step_may_finish() -> None:
    rungs = Rungs(spec(), longest=STEPS, history={})
    run(rungs, tune_trial("a"), 1.0)
    late = tune_trial("b")
    rungs.on_trial_add(None, late)
    assert rungs.on_trial_result(None, late, {"step": STEPS, "cfm_loss": 5.0}) == TrialScheduler.CONTINUE


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_reports_without_a_finite_objective_are_passed_over(value: float) -> None:
    rungs = Rungs(spec(), longest=STEPS, history={"old": [(4.0, value)]})
    assert run(rungs, tune_trial("a"), value)[-1][0] == STEPS
    assert run(rungs, tune_trial("b"), 1.0)[-1][0] == STEPS
    trial = tune_trial("c")
    rungs.on_trial_add(None, trial)
    assert rungs.on_trial_result(None, trial, {"step": 4}) == TrialScheduler.CONTINUE
    assert rungs.on_trial_result(None, trial, {"outcome/status": "failed"}) == TrialScheduler.CONTINUE


def test_a_trial_that_crashed_may_be_added_again() -> None:
    rungs = Rungs(spec(), longest=STEPS, history={})
    trial = tune_trial("a")
    run(rungs, trial, 1.0, last=6)
    rungs.on_trial_error(None, trial)
    assert run(rungs, trial, 1.0, first=4)[-1][0] == STEPS
    rungs.on_trial_complete(None, trial, {"step": STEPS, "cfm_loss": 1.0})
