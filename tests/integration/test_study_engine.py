"""Two small studies that meet everything a study can meet: crash, refusal, early stop, SIGKILL, SIGTERM."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from ebft_study import results
from tests import commands

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

HERE = Path(__file__).parent
STEPS = 6
# A study with this name starts learning_rate=0 before learning_rate=1: `trials.shuffled`.
CONTENT = f"""
study: trouble
question: Does a study survive what happens to it?
run: {{steps: {STEPS}, weight_decay: 0.05, checkpoint_every_steps: 1, log_every_steps: 1, keep_checkpoints: 2,
      features: {{backend: local}}}}
baselines:
  behind: {{method: sft, learning_rate: 9.0}}
  refused: {{gamma: 0.25}}
  crashes: {{gamma: 0.5}}
axes: {{learning_rate: [0.0, 1.0]}}
"""
ASHA = "{kind: asha, grace_period_steps: 2, reduction_factor: 2}"
MEDIAN = "{kind: median, grace_period_steps: 2, min_samples_required: 1}"
BEHIND, REFUSED, CRASHES, GOOD, EARLY = (f"t{number:04d}" for number in range(5))
EXPECTED = {BEHIND: "finished", REFUSED: "failed", CRASHES: "finished", GOOD: "finished", EARLY: "stopped"}


class Study:
    """A study folder and the processes that drive it."""

    def __init__(self, folder: Path, *, workers: int, scheduler: str) -> None:
        sections = f"resources: {{workers_per_trial: {workers}}}\nscheduler: {scheduler}\n"
        (folder / "study.yaml").write_text(CONTENT + sections)
        self.cwd, self.folder = folder, folder / "studies" / "trouble"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return commands.start(*arguments, cwd=self.cwd, program=commands.FAKE)

    def run(self, *arguments: str, seconds: float = 250) -> str:
        """Run a command to its end; returns what it printed, and its exit code on the last line."""
        return commands.ended(self.start(*arguments), seconds)

    def until(self, condition: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
        commands.wait_until(condition, driver, seconds=200)

    def wait_for_the_middle(self, driver: subprocess.Popen[str]) -> None:
        """Until a trial has crashed and been noticed, and another one waits half way for its next attempt."""
        self.until(lambda: bool(self.events("retry")) and len(self.steps(GOOD)) > 1, driver)

    def metrics(self) -> pd.DataFrame:
        return results.read_table(self.folder, "metrics")

    def steps(self, trial_id: str) -> list[int]:
        measured = self.metrics()
        return measured.loc[measured["trial_id"] == trial_id, "step"].tolist()

    def keys(self) -> set[tuple[str, int]]:
        measured = self.metrics()
        return set(zip(measured["trial_id"], measured["step"], strict=True))

    def trials(self) -> pd.DataFrame:
        return results.read_table(self.folder, "trials").set_index("trial_id")

    def events(self, kind: str) -> list[str]:
        events = results.read_table(self.folder, "events")
        return events.loc[events["kind"] == kind, "trial_id"].tolist()


@dataclass
class Ordeal:
    """What is left of a study, what its commands printed, and the rows that were on record before the SIGKILL."""

    study: Study
    said: dict[str, str]
    before: set[tuple[str, int]]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Ordeal:
    """Trials in worker groups, compared by ASHA; the driver is killed in the middle, and the study resumed."""
    study, said = Study(tmp_path_factory.mktemp("killed"), workers=1, scheduler=ASHA), {}
    driver = study.start("study", "study.yaml")
    study.until(lambda: bool(study.events("session")), driver)
    said["second"] = study.run("resume", "trouble")
    study.wait_for_the_middle(driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait(timeout=100)
    assert driver.stdout is not None
    driver.stdout.close()
    before = study.keys()
    said["status"] = study.run("status", "trouble")
    said["resume"] = study.run("resume", "trouble")
    return Ordeal(study, said, before)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Ordeal:
    """Trials in their own processes, stopped by the median rule; SIGTERM in the middle, then `study --resume`."""
    study, said = Study(tmp_path_factory.mktemp("interrupted"), workers=0, scheduler=MEDIAN), {}
    driver = study.start("study", "study.yaml")
    study.wait_for_the_middle(driver)
    driver.send_signal(signal.SIGTERM)
    said["stopped"] = commands.ended(driver, 120)
    before = study.keys()
    said["resume"] = study.run("study", "study.yaml", "--resume")
    said["again"] = study.run("study", "study.yaml", "--resume")
    return Ordeal(study, said, before)


@pytest.fixture(params=["killed", "interrupted"])
def ordeal(request: pytest.FixtureRequest) -> Ordeal:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Ordeal)
    return found


def test_every_trial_ends_exactly_once(ordeal: Ordeal) -> None:
    assert ordeal.study.trials()["status"].to_dict() == EXPECTED, ordeal.said


def test_no_reported_row_is_lost(ordeal: Ordeal) -> None:
    assert ordeal.before
    assert ordeal.before <= ordeal.study.keys()
    for trial_id in (BEHIND, GOOD, CRASHES):
        assert ordeal.study.steps(trial_id) == list(range(STEPS + 1))


def test_trials_go_on_from_their_checkpoints(ordeal: Ordeal) -> None:
    assert {GOOD, CRASHES} <= set(ordeal.study.events("resumed"))
    measured = ordeal.study.metrics()
    first = measured[measured["trial_id"] == GOOD].groupby("attempt")["step"].min()
    assert len(first) == 2
    assert first.iloc[0] == 0
    assert first.iloc[1] > 0


def test_a_killed_worker_is_started_again(ordeal: Ordeal) -> None:
    assert ordeal.study.events("retry") == [CRASHES]
    assert CRASHES in ordeal.study.events("resumed")
    assert ordeal.study.trials().loc[CRASHES, "attempt"] >= 2


def test_what_the_user_must_mend_is_not_tried_again(ordeal: Ordeal) -> None:
    assert ordeal.study.trials().loc[REFUSED, "error"] == "training.gamma=0.25: the fake refuses it. Use another"
    assert ordeal.study.events("failed") == [REFUSED]


def test_early_stops_spare_baselines_and_free_their_place(ordeal: Ordeal) -> None:
    table = ordeal.study.trials()
    assert table.loc[EARLY, "stop_reason"].startswith("early stop: ")
    assert "cfm_loss" in table.loc[EARLY, "stop_reason"]
    assert max(ordeal.study.steps(EARLY)) < STEPS
    assert table.loc[EARLY, "steps_saved"] == STEPS - table.loc[EARLY, "steps_done"]
    assert table.loc[EARLY, "seconds_saved"] > 0
    assert table.loc[BEHIND, "final_cfm_loss"] > table.loc[EARLY, "final_cfm_loss"]


def test_only_the_newest_checkpoints_are_kept(ordeal: Ordeal) -> None:
    last = sorted((ordeal.study.folder / "train").glob(f"{GOOD}-*"))[-1]
    kept = sorted(path.name for path in last.glob("checkpoint_*") if path.is_dir())
    assert kept[-1] == "checkpoint_00000006"
    assert len(kept) <= 2


def test_cost_is_on_record(ordeal: Ordeal) -> None:
    finished = ordeal.study.trials().loc[[BEHIND, GOOD, CRASHES]]
    assert (finished["startup_seconds"] > 0).all()
    assert (finished["total_seconds"] >= finished["train_seconds"]).all()
    assert (finished["steps_done"] == STEPS).all()


def test_a_polite_kill_ends_in_order_and_says_how_to_resume(interrupted: Ordeal) -> None:
    said = interrupted.said["stopped"]
    assert "resume with: ebft-study resume trouble" in said
    assert said.endswith("exit code 130")


def test_a_finished_study_is_not_run_again(interrupted: Ordeal) -> None:
    assert "starts" not in interrupted.said["again"]
    assert "report.html" in interrupted.said["again"]


def test_a_second_driver_is_refused(killed: Ordeal) -> None:
    said = killed.said["second"]
    assert said.startswith("error: ")
    assert "another process is running this study" in said
    assert said.endswith("exit code 2")


def test_status_tells_a_dead_driver_from_a_living_one(killed: Ordeal) -> None:
    assert "not running; resume with" in killed.said["status"]


def test_failures_show_in_the_exit_code_and_nothing_else_is_said_of_them(ordeal: Ordeal) -> None:
    assert ordeal.said["resume"].endswith("exit code 1")
    for said in ordeal.said.values():
        assert "Traceback" not in said
        assert "raylet" not in said


def test_a_finished_study_is_given_more_steps_and_trials(interrupted: Ordeal, tmp_path: Path) -> None:
    before = interrupted.study.trials()
    study = Study(tmp_path, workers=0, scheduler=MEDIAN)
    shutil.copytree(interrupted.study.folder, study.folder)
    file = tmp_path / "study.yaml"
    longer = file.read_text().replace(f"steps: {STEPS}", f"steps: {STEPS + 2}")
    file.write_text(longer.replace("baselines:", "baselines:\n  late: {}"))
    said = study.run("study", "study.yaml", "--extend")
    after = study.trials()
    late = "t0005"
    assert after["status"].to_dict() == {**EXPECTED, late: "finished"}, said
    # What was stopped or failed stays as it was; what was finished goes on from its last checkpoint.
    unchanged = after["attempt"] == before["attempt"].reindex(after.index)
    assert set(after.index[unchanged]) == {REFUSED, EARLY}
    for trial_id in (BEHIND, GOOD, CRASHES, late):
        assert study.steps(trial_id) == list(range(STEPS + 3))
    again = study.metrics().query("trial_id == @GOOD").groupby("attempt")["step"].min()
    assert again.iloc[-1] == STEPS + 1
    assert "this study is finished" in study.run("study", "study.yaml")
