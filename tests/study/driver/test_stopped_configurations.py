"""A configuration that a scheduler stops: with all its seeds, on record, and known to the next session. No Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from ebft_study import results
from ebft_study.analysis import usage
from ebft_study.study.driver.monitor import Monitor
from ebft_study.study.driver.tune_hooks import Observer, StudySearcher
from ebft_study.study.folder import history
from ebft_study.study.search.listed import ListedSearch
from ebft_study.study.spec import normalize, trials
from ebft_study.study.stopping.schedulers import StudyScheduler
from tests.studies import task_of

SPEC = normalize.from_record(
    {
        "study": "s",
        "question": "q",
        "run": {"steps": 40},
        "axes": {"alpha": [0.0, 1.0]},
        "seeds": [0, 1, 2],
        "baselines": {"sft": {"method": "sft"}},
        "scheduler": {"kind": "asha", "grace_period_steps": 10, "reduction_factor": 2},
    },
    source="test",
)
LEVELS = {"sft": 9.0, "alpha=0": 1.0, "alpha=1": 2.0}


def session(folder: Path, *, slots: int, reports: int = 10**6) -> None:
    """What Tune does with our hooks, `slots` trials at a time, until the driver is killed after some reports."""
    past = history.read(folder, "cfm_loss")
    monitor = Monitor(results.StudyRecorder(folder, study="s"), past.states, "cfm_loss")
    left = [trial for trial in trials.listed(SPEC) if trial.trial_id not in past.trial_results]
    scheduler = StudyScheduler(SPEC, longest=40, history=past.curves, stopped=past.stopped)
    search, done = ListedSearch(left), dict[str, int]()
    searcher = StudySearcher(search, monitor, task_of, reason_not_to_start=scheduler.reason_not_to_start)
    observer = Observer(search, monitor, lambda trial_id, attempt: None, scheduler.reasons)
    running: list[Any] = []
    while True:
        while len(running) < slots and isinstance(config := searcher.suggest(""), dict):
            running.append(SimpleNamespace(config=config, last_result=None, error_file=None, trial_id="x"))
        if not running or reports == 0:
            return
        trial, reports = running.pop(0), reports - 1
        name, configuration = trial.config["trial_id"], trial.config["label"].partition(" seed")[0]
        done[name] = done.get(name, -10) + 10
        row = {"cfm_loss": LEVELS[configuration], "ce_loss": 3.0}
        results.TrialRecorder(folder, study="s", trial_id=name, attempt=1).metrics(done[name], row)
        trial.last_result = {**row, "step": done[name], "attempt": 1, "config": trial.config}
        stops = scheduler.on_trial_result(None, trial, trial.last_result) == TrialScheduler.STOP
        observer.on_trial_result(0, [], trial, trial.last_result)
        if stops or done[name] == 40:
            if not stops:
                trial.last_result["outcome"] = {"status": "finished", "reason": ""}
            observer.on_trial_complete(0, [], trial)
        else:
            running.append(trial)


def table(folder: Path) -> Any:
    return results.read_table(folder, "trials").set_index("label")


@pytest.mark.parametrize("slots", [1, 2, 9])
def test_all_seeds_of_a_stopped_configuration_are_stopped_with_its_reason(tmp_path: Path, slots: int) -> None:
    session(tmp_path, slots=slots)
    found = table(tmp_path)
    behind = found[found["configuration"] == "alpha=1"]
    assert found["status"].to_dict() == {
        label: "stopped" if label.startswith("alpha=1") else "finished" for label in found.index
    }
    reason = "early stop: configuration stopped: cfm_loss 2 at step 10 is not among the best 1/2 of 2 configurations; "
    assert all(each.startswith(reason) for each in behind["stop_reason"])
    assert (behind["steps_saved"] == 40 - behind["steps_done"]).all()
    assert behind["steps_done"].tolist() == ([10, 0, 0] if slots < 9 else [10, 10, 10])
    assert usage.savings(found.reset_index(), {}).startswith(f"{120 - behind['steps_done'].sum():.0f} of 360 steps")


def test_the_next_session_starts_no_further_seed_of_it(tmp_path: Path) -> None:
    """The driver is killed after the stop of the first seed, while the others run."""
    for reports in (13, 10**6):
        session(tmp_path, slots=9, reports=reports)
        status = table(tmp_path)["status"]
        assert status["alpha=1 seed=0"] == "stopped"
        if reports == 13:
            assert status["alpha=1 seed=1"] == "running"
    found = table(tmp_path)
    assert found.loc[["alpha=1 seed=1", "alpha=1 seed=2"], "status"].tolist() == ["stopped"] * 2
    assert found.loc["alpha=1 seed=2", "stop_reason"].endswith("; no further steps")
    past = history.read(tmp_path, "cfm_loss")
    assert set(past.stopped) == {"alpha=1"}
    assert {
        past.trial_results[trial_id].kind for trial_id in found.loc[found["configuration"] == "alpha=1", "trial_id"]
    } == {"early"}
