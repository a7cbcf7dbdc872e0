"""The driver's record of its trials, and what the next session reads from it."""

from __future__ import annotations

import dataclasses
import io
import math
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from ebft_study import results
from ebft_study.results.lineage import lineage
from ebft_study.study.driver.monitor import Monitor
from ebft_study.study.folder import history
from ebft_study.study.folder.trial_states import EARLY_STOP, TrialState
from ebft_study.study.spec import normalize, trials
from ebft_study.study.spec.study_spec import ResourcesSpec
from ebft_study.study.spec.trials import Replicate
from ebft_study.study.view import display


class Heard:
    """A display that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def changed(self, state: TrialState, what: str) -> None:
        self.lines.append(f"{state.trial_id} {what}")

    def say(self, line: str) -> None:
        self.lines.append(line)

    def close(self) -> None:
        self.lines.append("closed")


class Session:
    """A driver's monitor over the trials of a small study."""

    def __init__(self, folder: Path, states: dict[str, TrialState] | None = None) -> None:
        content = {"study": "s", "question": "q", "run": {"steps": 10}, "axes": {"alpha": [0.0, 0.5, 1.0]}}
        content["baselines"] = {"sft": {"method": "sft"}}
        self.folder = folder
        spec = normalize.from_record(content, source="test")
        self.trials = trials.trials_of(spec, trials.enumerated(spec))
        self.states = {} if states is None else states
        self.monitor = Monitor(results.StudyRecorder(folder, study="s"), self.states, "cfm_loss")
        self.heard = Heard()
        self.monitor.display = self.heard

    def train(self, trial_id: str, *, attempt: int = 1, cfm: tuple[float, ...] = (2.0, 1.5, 1.8)) -> None:
        """What worker and Tune do: rows into the tables, reports to the monitor."""
        recorder = results.TrialRecorder(self.folder, study="s", trial_id=trial_id, attempt=attempt)
        for index, value in enumerate(cfm):
            row = {"cfm_loss": value, "ce_loss": 3.0, "sequences_seen": float(40 * index)}
            recorder.metrics(5 * index, row)
            self.monitor.reported(trial_id, {**row, "step": 5.0 * index, "attempt": attempt, "time_total_s": 1})

    def row(self, trial_id: str) -> dict[str, Any]:
        table = results.read_table(self.folder, "trials").set_index("trial_id")
        return {str(key): value for key, value in table.loc[trial_id].items()}


FINISHED = {"status": "finished", "reason": "", "startup_seconds": 1.5, "train_seconds": 4.0}


def test_a_trial_is_on_record_from_plan_to_end(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.monitor.planned(session.trials[1])
    row = session.row("t0001")
    assert (row["status"], row["attempt"], row["label"]) == ("pending", 0, "alpha=0 seed=0")
    assert (row["configuration"], row["alpha"], row["steps"]) == ("alpha=0", 0.0, 10)
    session.monitor.started("t0001")
    assert session.row("t0001")["status"] == "running"
    session.train("t0001")
    ended = session.monitor.ended("t0001", {**FINISHED, "started_at": time.time()})
    assert (ended.kind, ended.value, ended.step) == ("finished", 1.8, 10)
    row = session.row("t0001")
    assert (row["status"], row["attempt"], row["steps_done"], row["sequences_seen"]) == ("finished", 1, 10, 80)
    assert (row["final_cfm_loss"], row["best_cfm_loss"], row["final_ce_loss"]) == (1.8, 1.5, 3.0)
    assert 1.5 <= row["startup_seconds"] < 3.0
    assert row["train_seconds"] == 4.0
    assert row["total_seconds"] >= 0.0


def test_the_best_value_of_a_trial_is_that_of_all_its_sessions(tmp_path: Path) -> None:
    first = Session(tmp_path)
    first.monitor.planned(first.trials[1])
    first.monitor.started("t0001")
    first.train("t0001", cfm=(2.0, 1.5, math.inf))
    second = Session(tmp_path, history.read(tmp_path, "cfm_loss").states)
    second.monitor.planned(second.trials[1])
    second.monitor.started("t0001")
    second.monitor.reported("t0001", {"cfm_loss": 1.8, "step": 10.0, "attempt": 2})
    second.monitor.ended("t0001", {**FINISHED, "started_at": time.time()})
    assert second.row("t0001")["best_cfm_loss"] == 1.5


def test_named_baselines_are_marked(tmp_path: Path) -> None:
    session = Session(tmp_path)
    for trial in session.trials:
        session.monitor.planned(trial)
    assert session.row("t0000")["named_baseline"] == "sft"
    assert pd.isna(session.row("t0001")["named_baseline"])


def test_failures_and_stops_keep_their_reasons(tmp_path: Path) -> None:
    session = Session(tmp_path)
    for trial in session.trials:
        session.monitor.planned(trial)
        session.monitor.started(trial.trial_id)
    session.monitor.ended("t0001", {"status": "failed", "reason": "no such file"})
    session.monitor.ended("t0002", {"status": "stopped", "reason": "loss became nan at step 3"})
    session.monitor.retried("t0003", "the worker died")
    session.monitor.ended("t0000", {"status": "stopped", "reason": f"{EARLY_STOP}: behind"})
    assert session.row("t0001")["error"] == "no such file"
    assert session.row("t0002")["stop_reason"] == "loss became nan at step 3"
    assert session.row("t0003")["status"] == "running"
    events = results.read_table(tmp_path, "events").set_index("kind")["message"]
    assert events["failed"] == "no such file"
    assert events["stopped"] == f"{EARLY_STOP}: behind"
    assert events["retry"] == "the worker died"


def test_an_interrupted_study_knows_what_was_open(tmp_path: Path) -> None:
    session = Session(tmp_path)
    for trial in session.trials:
        session.monitor.planned(trial)
    for trial_id in ("t0000", "t0001"):
        session.monitor.started(trial_id)
    session.train("t0000")
    session.monitor.ended("t0000", {**FINISHED, "started_at": time.time()})
    session.monitor.interrupted("Ctrl-C")
    statuses = results.read_table(tmp_path, "trials").set_index("trial_id")["status"].to_dict()
    assert statuses == {"t0000": "finished", "t0001": "interrupted", "t0002": "interrupted", "t0003": "interrupted"}


def test_the_next_session_reads_how_the_last_one_ended(tmp_path: Path) -> None:
    session = Session(tmp_path)
    for trial in session.trials:
        session.monitor.planned(trial)
        session.monitor.started(trial.trial_id)
    session.train("t0000")
    session.monitor.ended("t0000", {**FINISHED, "started_at": time.time()})
    session.train("t0001", cfm=(2.0, 1.9))
    ended = session.monitor.ended("t0001", {"status": "stopped", "reason": f"{EARLY_STOP}: behind"})
    session.train("t0002", cfm=(2.0, 1.7))  # was running when the driver was killed
    session.monitor.ended("t0003", {"status": "failed", "reason": "no such file"})

    past = history.read(tmp_path, "cfm_loss")
    assert {name: ended.kind for name, ended in past.trial_results.items()} == {
        "t0000": "finished",
        "t0001": "early",
        "t0003": "failed",
    }
    assert past.trial_results["t0000"].value == 1.8
    assert past.trial_results["t0001"].step == 5
    assert past.trial_results["t0001"].curve == ended.curve == {0: (2.0,), 5: (1.9,)}
    assert math.isnan(past.trial_results["t0003"].value)
    assert {trial.trial_id: curve for trial, curve in past.curves.items()} == {
        "t0001": [(0.0, 2.0), (5.0, 1.9)],
        "t0002": [(0.0, 2.0), (5.0, 1.7)],
    }
    assert next(iter(past.curves)) == Replicate("t0001", session.trials[1].configuration.label, 0, 10)
    assert past.stopped == {}, "this version stops configurations; an earlier one stopped this trial alone"
    running = past.states["t0002"]
    assert (running.status, running.step, running.total_steps, running.metrics["cfm_loss"]) == ("running", 5, 10, 1.7)


def test_all_objectives_reach_the_search_now_and_in_the_next_session(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.monitor = Monitor(
        results.StudyRecorder(tmp_path, study="s"), session.states, "cfm_loss", ["ce_loss", "reward"]
    )
    session.monitor.planned(session.trials[0])
    session.monitor.started("t0000")
    session.train("t0000")
    ended = session.monitor.ended("t0000", {**FINISHED, "started_at": time.time()})
    read = history.read(tmp_path, "cfm_loss", ["ce_loss", "reward"]).trial_results["t0000"]
    for one in (ended, read):
        assert (one.kind, one.value, one.further[0]) == ("finished", 1.8, 3.0)
        assert math.isnan(one.further[1])  # it reported none


def test_a_trial_that_waits_for_its_turn_is_pending_and_its_time_stands_still(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.monitor.planned(session.trials[1])
    session.monitor.resumed("t0001")
    state = session.states["t0001"]
    assert state.status == "running"
    state.started_at, state.stopwatch = time.time() - 20, time.monotonic() - 20
    session.monitor.resumed("t0001")  # runs already
    assert state.seconds == pytest.approx(20, abs=5)
    session.monitor.display = heard = Heard()  # type: ignore[assignment]
    session.monitor.paused("t0001", 1)
    assert heard.lines == ["t0001 pauses"]
    assert session.row("t0001")["status"] == "pending"
    assert session.row("t0001")["total_seconds"] == pytest.approx(20, abs=5)
    waited = state.seconds
    assert (state.seconds, state.started_at) == (waited, None)
    session.monitor.resumed("t0001")
    assert session.row("t0001")["status"] == "running"
    assert state.seconds == pytest.approx(20, abs=5)


def test_an_exploit_is_an_event_that_the_lineage_reads(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.monitor.planned(session.trials[1])
    details = {
        "step": 5, "donor": "t0002", "donor_step": 10, "donor_attempt": 0, "score": 2.0, "donor_score": 1.0,
        "checkpoint": "train/t0001-2/checkpoint_00000010", "before": {"alpha": 0.0}, "after": {"alpha": 0.5},
    }  # fmt: skip
    session.monitor.exploited("t0001", 2, details)
    (row,) = lineage(tmp_path).drop(columns="time").to_dict("records")
    assert row == {"trial_id": "t0001", "attempt": 2, **details}
    assert session.heard.lines[-1] == "t0001 at step 5 continues from t0002's step 10 with alpha=0.5"


def test_the_last_evaluation_of_a_trial_is_evidence(tmp_path: Path) -> None:
    """A study that is extended compares others with it at that step."""
    session = Session(tmp_path)
    session.monitor.planned(session.trials[1])
    session.monitor.started("t0001")
    session.train("t0001")
    results.TrialRecorder(tmp_path, study="s", trial_id="t0001", attempt=1).metrics(12, {"loss": 0.5})
    past = history.read(tmp_path, "cfm_loss")
    assert list(past.curves.values()) == [[(0.0, 2.0), (5.0, 1.5), (10.0, 1.8)]]
    assert [evaluation.step for evaluation in past.evaluations["t0001"]] == [0, 5, 10], "a training step is none"


def test_the_next_session_knows_which_configurations_were_stopped(tmp_path: Path) -> None:
    session = Session(tmp_path)
    for trial in session.trials[1:3]:
        session.monitor.planned(trial)
    session.train("t0001", cfm=(2.0, 1.9))
    reason = "configuration stopped: cfm_loss 1.9 at step 5 is not among the best 1/2 of 3 configurations"
    session.monitor.ended("t0001", {"status": "stopped", "reason": f"{EARLY_STOP}: {reason}; 5 of 10 steps saved"})
    session.monitor.ended("t0002", {"status": "stopped", "reason": f"{EARLY_STOP}: diverged; 10 of 10 steps saved"})
    assert history.read(tmp_path, "cfm_loss").stopped == {session.trials[1].configuration.label: reason}


def test_time_of_earlier_sessions_counts(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.monitor.planned(session.trials[1])
    session.monitor.started("t0001")
    session.train("t0001", cfm=(2.0,))
    session.states["t0001"].stopwatch = time.monotonic() - 100
    session.monitor.interrupted("Ctrl-C")
    first_start = session.row("t0001")["started_at"]

    later = Session(tmp_path, history.read(tmp_path, "cfm_loss").states)
    later.monitor.planned(later.trials[1])
    later.monitor.started("t0001")
    later.train("t0001", attempt=2)
    later.monitor.ended("t0001", {**FINISHED, "started_at": time.time()})
    row = later.row("t0001")
    assert 100 <= row["total_seconds"] < 110
    assert row["attempt"] == 2
    assert row["started_at"] == first_start
    assert pd.isna(row["stop_reason"])


def spend(session: Session, steps: dict[int, float], *, attempt: int, kept: int = 0) -> None:
    """Reports and rows of an attempt: FLOPs by step; without a row where it begins with the checkpoint of `kept`."""
    recorder = results.TrialRecorder(session.folder, study="s", trial_id="t0001", attempt=attempt)
    for step, flops in steps.items():
        if step > kept or not kept:
            recorder.metrics(step, {"flops": flops})
        session.monitor.reported("t0001", {"flops": flops, "step": float(step), "attempt": attempt, "host": "h"})


def test_what_a_trial_does_again_counts_as_cost(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.monitor.planned(session.trials[1])
    session.monitor.started("t0001")
    spend(session, {0: 0.0, 5: 50.0, 8: 80.0}, attempt=1)
    session.monitor.retried("t0001", "the worker died")
    spend(session, {5: 50.0, 10: 100.0}, attempt=2, kept=5)
    session.monitor.ended("t0001", {**FINISHED, "started_at": time.time(), "metrics": {"flops": 104.0}})
    assert session.row("t0001")["flops"] == 104.0 + 30.0
    assert session.row("t0001")["gpu_seconds"] == 0.0
    (event,) = results.read_table(tmp_path, "events").query("kind == 'redone'").to_dict("records")
    assert (event["attempt"], event["details"]) == (2, '{"flops": 30.0}')


def test_a_trial_that_starts_from_scratch_again_pays_twice(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.monitor.planned(session.trials[1])
    session.monitor.started("t0001")
    spend(session, {0: 7.0, 5: 57.0}, attempt=1)
    spend(session, {0: 7.0, 5: 57.0}, attempt=2)
    session.monitor.ended("t0001", {**FINISHED, "started_at": time.time()})
    assert session.row("t0001")["flops"] == 2 * 57.0


def test_what_killed_sessions_did_counts_as_cost(tmp_path: Path) -> None:
    """Each driver is killed without a word; the tables have all that is known."""
    session = Session(tmp_path)
    session.monitor.planned(session.trials[1])
    session.monitor.started("t0001")
    spend(session, {0: 0.0, 4: 40.0, 9: 90.0}, attempt=1)
    for attempt in (2, 3):  # from the checkpoint of step 4, up to step 6 each
        session = Session(tmp_path, history.read(tmp_path, "cfm_loss").states)
        session.monitor.planned(session.trials[1])
        session.monitor.started("t0001")
        spend(session, {4: 40.0, 6: 60.0}, attempt=attempt, kept=4)
    session = Session(tmp_path, history.read(tmp_path, "cfm_loss").states)
    session.monitor.planned(session.trials[1])
    session.monitor.started("t0001")
    spend(session, {4: 40.0, 10: 100.0}, attempt=4, kept=4)
    session.monitor.ended("t0001", {**FINISHED, "started_at": time.time()})
    assert session.row("t0001")["flops"] == 90 + 20 + 20 + 60


def test_after_an_exploit_a_trial_has_its_own_cost(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.monitor.planned(session.trials[1])
    session.monitor.started("t0001")
    spend(session, {0: 0.0, 5: 50.0}, attempt=1)
    spend(session, {5: 80.0, 10: 130.0}, attempt=2, kept=5)  # its donor's updates cost more
    session.monitor.ended("t0001", {**FINISHED, "started_at": time.time()})
    assert session.row("t0001")["flops"] == 100.0


def test_trials_without_recorded_cost_resume(tmp_path: Path) -> None:
    """As those of version 0.1."""
    session = Session(tmp_path)
    session.monitor.planned(session.trials[1])
    session.monitor.started("t0001")
    session.train("t0001", cfm=(2.0, 1.9))
    later = Session(tmp_path, history.read(tmp_path, "cfm_loss").states)
    later.monitor.planned(later.trials[1])
    later.monitor.started("t0001")
    later.train("t0001", attempt=2)
    later.monitor.ended("t0001", {**FINISHED, "started_at": time.time()})
    assert pd.isna(later.row("t0001")["flops"])


def test_gpu_seconds_are_those_of_all_reserved_gpus(tmp_path: Path) -> None:
    session = Session(tmp_path)
    resources = ResourcesSpec(workers_per_trial=3, gpus_per_worker=0.5)
    session.monitor.planned(dataclasses.replace(session.trials[1], resources=resources))
    session.monitor.started("t0001")
    session.states["t0001"].stopwatch = time.monotonic() - 100
    session.monitor.ended("t0001", {**FINISHED, "started_at": time.time()})
    row = session.row("t0001")
    assert row["gpu_seconds"] == pytest.approx(1.5 * row["total_seconds"])


def test_a_study_that_has_not_started_has_no_history(tmp_path: Path) -> None:
    past = history.read(tmp_path, "cfm_loss")
    assert (past.states, past.trial_results, past.curves) == ({}, {}, {})


# --- what people see -------------------------------------------------------------------------------------------


def state(number: int, status: str, **more: Any) -> TrialState:
    return TrialState(f"t{number:04d}", f"alpha={number} seed=0", status, total_steps=10, **more)


def text(states: list[TrialState], width: int = 100, **options: Any) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(display.render(states, ("cfm_loss",), title="demo", plan=display.Plan(len(states)), **options))
    console.file.close()
    return console.export_text()


def test_the_table_shows_every_trial_with_its_numbers() -> None:
    shown = text([state(0, "finished", step=10, metrics={"cfm_loss": 2.34567}), state(1, "pending")])
    assert "t0000" in shown
    assert "alpha=0 seed=0" in shown
    assert "10/10" in shown
    assert "2.346" in shown
    assert "1 of 2 trials finished, 1 pending" in shown


def test_the_table_tells_why_trials_failed() -> None:
    assert "t0000 failed: no such file" in text([state(0, "failed", note="no such file")])


def test_a_table_of_many_trials_fits_a_screen_and_shows_what_runs() -> None:
    many = [state(number, "pending") for number in range(500)]
    many[321].status = "running"
    shown = text(many, most=20)
    assert len(shown.splitlines()) < 30
    assert "t0321" in shown
    assert "0 of 500 trials finished" in shown


def test_where_there_is_no_terminal_every_change_is_one_line() -> None:
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=40)
    shown = display.display(console, ("cfm_loss",), {}, title="demo", plan=display.Plan(1))
    shown.changed(state(0, "running", metrics={"cfm_loss": 2.34567, "reward": 1.0}), "step 5/10")
    shown.say("[brackets] stay")
    shown.close()
    first, second = console.file.getvalue().splitlines()
    assert first.endswith(" t0000 alpha=0 seed=0: step 5/10 cfm_loss=2.346")
    assert second.endswith(" [brackets] stay")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_numbers_survive_a_narrow_terminal(width: int) -> None:
    shown = text([state(0, "running", step=5, metrics={"cfm_loss": 2.34567})], width=width)
    for part in ("t0000", "running", "5/10", "2.346"):
        assert part in shown


def test_time_left_is_the_mean_of_what_ended_over_places() -> None:
    now, plan = time.time(), display.Plan(6, concurrency=2)
    ended = [state(i, "finished", started_at=now - 100, ended_at=now - 40) for i in range(2)]
    waiting = [state(i, "pending") for i in range(2, 6)]
    assert display.seconds_left(ended + waiting, plan) == pytest.approx(4 * 60 / 2)
    assert display.seconds_left(waiting, plan) is None
    running = [state(9, "running", started_at=now - 45)]
    assert display.seconds_left(ended + running, display.Plan(3, concurrency=2)) == pytest.approx(15, abs=1)


def test_before_the_first_end_the_pace_of_running_trials_tells_or_else_the_plan() -> None:
    waiting = [state(i, "pending") for i in range(3)]
    assert display.seconds_left(waiting, display.Plan(3, 1, trial_seconds=50.0)) == 150
    half = [state(9, "running", started_at=time.time() - 30, step=5)]
    assert display.seconds_left(half + waiting, display.Plan(4)) == pytest.approx(30 + 3 * 60, rel=0.05)


def test_a_live_table_is_not_higher_than_its_screen() -> None:
    screen = Console(file=io.StringIO(), width=100, height=30, force_terminal=True, color_system=None)
    states = {f"t{i:04d}": state(i, "running" if i > 1990 else "finished") for i in range(2000)}
    table = display.LiveTable(screen, (), states, "many", display.Plan(2000))
    table.close()
    paper = Console(file=io.StringIO(), width=100)
    with paper.capture() as captured:
        paper.print(table._page("many", display.Plan(2000)))
    lines = captured.get().rstrip().splitlines()
    assert len(lines) <= 30
    assert lines[-1].startswith("1991 of 2000 trials finished, 9 running")
    assert sum(" running " in line for line in lines[:-1]) == 9
    assert "more trials" in lines[-2]


def test_trials_that_a_search_has_yet_to_choose_count() -> None:
    now = time.time()
    ended = [state(0, "finished", started_at=now - 100, ended_at=now - 40)]
    assert display.seconds_left(ended, display.Plan(4, concurrency=1)) == pytest.approx(180)
    assert display.summary(ended, display.Plan(4)) == "1 of 4 trials finished; about 3 min left"
    assert display.seconds_left(ended, display.Plan(1)) is None
    skipped = [TrialState(f"t{n}", "", status="skipped", note="not promoted: ...") for n in range(5)]
    said = "1 of 4 trials finished, 5 not needed; about 3 min left"
    assert display.summary([*ended, *skipped], display.Plan(4)) == said


@pytest.mark.parametrize(("seconds", "spelt"), [(None, ""), (7.2, "7 s"), (240, "4 min"), (9000, "2.5 h")])
def test_durations_are_readable(seconds: float | None, spelt: str) -> None:
    assert display.rounded_duration(seconds) == spelt


def test_an_early_stop_says_what_it_saved_at_the_trials_own_pace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(tmp_path)
    clock = [1000.0]
    monkeypatch.setattr("ebft_study.study.driver.monitor.time.time", lambda: clock[0])
    monkeypatch.setattr("ebft_study.study.driver.monitor.time.monotonic", lambda: clock[0])
    for trial in session.trials:
        session.monitor.planned(trial)
        session.monitor.started(trial.trial_id)

    def report(trial_id: str, step: int, at: float) -> None:
        clock[0] = at
        session.monitor.reported(trial_id, {"step": step, "cfm_loss": 2.0, "attempt": 1})

    report("t0001", 0, 1030.0)  # a start of 30 s, which no stop saves
    report("t0001", 4, 1038.0)
    session.monitor.ended("t0001", {"status": "stopped", "reason": f"{EARLY_STOP}: behind"})
    report("t0002", 6, 1060.0)  # resumed, and stopped at its first report: 60 s for 6 steps is all that is known
    session.monitor.ended("t0002", {"status": "stopped", "reason": f"{EARLY_STOP}: behind"})
    report("t0003", 0, 1060.0)
    report("t0003", 8, 1068.0)
    session.monitor.retried("t0003", "the worker died")
    report("t0003", 4, 1100.0)  # the pace is that of the attempt that was stopped
    report("t0003", 8, 1112.0)
    session.monitor.ended("t0003", {"status": "stopped", "reason": f"{EARLY_STOP}: behind"})
    session.monitor.ended("t0000", {"status": "stopped", "reason": "loss became nan at step 3"})
    table = results.read_table(tmp_path, "trials").set_index("trial_id")
    assert table.loc[["t0001", "t0002", "t0003"], "steps_done"].tolist() == [4, 6, 8]
    assert table.loc[["t0001", "t0002", "t0003"], "steps_saved"].tolist() == [6, 4, 2]
    assert table.loc[["t0001", "t0002", "t0003"], "seconds_saved"].tolist() == [12.0, 40.0, 6.0]
    assert pd.isna(table.loc["t0000", "steps_saved"])
