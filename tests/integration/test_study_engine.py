"""One study that meets everything a study can meet: a crash, a refusal, an early stop, Ctrl-C, SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from ebft_study import results

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

HERE = Path(__file__).parent
STEPS = 6
STUDY = f"""
study: ordeal
question: Does a study survive what happens to it?
run: {{steps: {STEPS}, weight_decay: 0.3, checkpoint_every_steps: 1, log_every_steps: 1, keep_checkpoints: 2}}
baselines:
  behind: {{method: sft, learning_rate: 9.0}}
  refused: {{gamma: 0.25}}
  crashes: {{gamma: 0.5}}
axes: {{learning_rate: [0.0, 1.0]}}
scheduler: {{kind: asha, grace_period_steps: 2, reduction_factor: 2}}
resources: {{max_failures: 1}}
"""
IN_PROCESS = """
study: here
question: Does a trial in its own process survive the same?
run: {steps: 6, weight_decay: 0.2, checkpoint_every_steps: 1, log_every_steps: 1, keep_checkpoints: 2}
baselines:
  refused: {gamma: 0.25}
  crashes: {gamma: 0.5}
axes: {learning_rate: [0.0, 1.0]}
scheduler: {kind: asha, grace_period_steps: 2, reduction_factor: 2}
resources: {workers_per_trial: 0}
"""
BEHIND, REFUSED, CRASHES, GOOD, EARLY = (f"t{number:04d}" for number in range(5))


class Study:
    """A study folder and the processes that drive it."""

    def __init__(self, folder: Path, content: str, name: str) -> None:
        (folder / "study.yaml").write_text(content)
        self.cwd, self.folder = folder, folder / "studies" / name

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "EBFT_STUDY_CACHE": str(self.cwd)}
        command = [sys.executable, str(HERE / "driver.py"), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.cwd, env=environment, text=True, stdout=pipe, stderr=subprocess.STDOUT
        )

    def metrics(self) -> pd.DataFrame:
        return results.read_table(self.folder, "metrics")

    def steps(self, trial_id: str) -> list[int]:
        measured = self.metrics()
        return measured.loc[measured["trial_id"] == trial_id, "step"].tolist()

    def keys(self) -> set[tuple[str, int]]:
        measured = self.metrics()
        return set(zip(measured["trial_id"], measured["step"], strict=True))

    def events(self, kind: str) -> list[str]:
        events = results.read_table(self.folder, "events")
        return events.loc[events["kind"] == kind, "trial_id"].tolist()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)


Ordeal = tuple[Study, dict[str, str], set[tuple[str, int]]]


@pytest.fixture(scope="module")
def ordeal(tmp_path_factory: pytest.TempPathFactory) -> Ordeal:
    """The study after Ctrl-C, SIGKILL and resume: the study, what its sessions printed, rows before the SIGKILL."""
    study = Study(tmp_path_factory.mktemp("ordeal"), STUDY, "ordeal")
    said: dict[str, str] = {}
    driver = study.start("study", "study.yaml")
    wait_until(lambda: bool(study.events("session")), driver)
    said["second"] = study.start("resume", "ordeal").communicate(timeout=60)[0]
    wait_until(lambda: len(study.steps(BEHIND)) > 1, driver)
    driver.send_signal(signal.SIGINT)
    said["ctrl_c"] = f"{driver.communicate(timeout=60)[0]}\nexit code {driver.returncode}"

    driver = study.start("study", "study.yaml", "--resume")
    wait_until(lambda: len(study.steps(GOOD)) > 1, driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait(timeout=10)
    assert driver.stdout is not None
    driver.stdout.close()
    before = study.keys()
    said["status"] = study.start("status", "ordeal").communicate(timeout=60)[0]

    driver = study.start("resume", "ordeal")
    said["resume"] = f"{driver.communicate(timeout=200)[0]}\nexit code {driver.returncode}"
    return study, said, before


def trials(study: Study) -> pd.DataFrame:
    return results.read_table(study.folder, "trials").set_index("trial_id")


def test_every_trial_ends_exactly_once(ordeal: Ordeal) -> None:
    study, said, _ = ordeal
    statuses = trials(study)["status"].to_dict()
    assert statuses == {
        BEHIND: "finished",
        REFUSED: "failed",
        CRASHES: "finished",
        GOOD: "finished",
        EARLY: "stopped",
    }, said


def test_no_reported_row_is_lost_to_sigkill(ordeal: Ordeal) -> None:
    study, _, before = ordeal
    assert before
    assert before <= study.keys()
    for trial_id in (BEHIND, GOOD, CRASHES):
        assert study.steps(trial_id) == list(range(STEPS + 1))


def test_trials_go_on_from_their_checkpoints(ordeal: Ordeal) -> None:
    study, _, _ = ordeal
    assert {GOOD, CRASHES} <= set(study.events("resumed"))
    measured = study.metrics()
    attempts = measured[measured["trial_id"] == GOOD].groupby("attempt")["step"].agg(["min", "max"])
    assert attempts["min"].is_monotonic_increasing
    assert (attempts["min"].iloc[1:] > 0).all()


def test_a_killed_worker_is_started_again(ordeal: Ordeal) -> None:
    study, _, _ = ordeal
    assert CRASHES in study.events("retry")
    assert trials(study).loc[CRASHES, "attempt"] >= 2


def test_what_the_user_must_mend_is_not_tried_again(ordeal: Ordeal) -> None:
    study, _, _ = ordeal
    assert trials(study).loc[REFUSED, "error"] == "training.gamma=0.25: the fake refuses it. Use another"
    assert REFUSED not in study.events("retry")
    assert study.events("failed") == [REFUSED]


def test_early_stops_spare_baselines_and_free_their_place(
    ordeal: Ordeal,
) -> None:
    study, _, _ = ordeal
    table = trials(study)
    assert table.loc[EARLY, "stop_reason"].startswith("early stop")
    assert max(study.steps(EARLY)) < STEPS
    assert table.loc[BEHIND, "final_cfm_loss"] > table.loc[EARLY, "final_cfm_loss"]


def test_ctrl_c_ends_in_order_and_says_how_to_resume(
    ordeal: Ordeal,
) -> None:
    _, said, _ = ordeal
    assert "resume with: ebft-study resume ordeal" in said["ctrl_c"]
    assert said["ctrl_c"].endswith("exit code 130")
    assert "Traceback" not in said["ctrl_c"]


def test_a_second_driver_is_refused(ordeal: Ordeal) -> None:
    _, said, _ = ordeal
    assert said["second"].startswith("error: ")
    assert "another process is running this study" in said["second"]
    assert len(said["second"].strip().splitlines()) == 1


def test_status_tells_a_dead_driver_from_a_living_one(
    ordeal: Ordeal,
) -> None:
    _, said, _ = ordeal
    assert "not running; resume with" in said["status"]
    assert "Traceback" not in said["status"]


def test_a_failed_trial_shows_in_the_exit_code(ordeal: Ordeal) -> None:
    _, said, _ = ordeal
    assert said["resume"].endswith("exit code 1")
    assert "Traceback" not in said["resume"]


def test_cost_is_on_record(ordeal: Ordeal) -> None:
    study, _, _ = ordeal
    finished = trials(study).loc[[BEHIND, GOOD, CRASHES]]
    assert (finished["startup_seconds"] > 0).all()
    assert (finished["total_seconds"] >= finished["train_seconds"]).all()
    assert (finished["steps_done"] == STEPS).all()


def test_trials_in_their_own_process_survive_the_same(tmp_path: Path) -> None:
    study = Study(tmp_path, IN_PROCESS, "here")
    driver = study.start("study", "study.yaml")
    said = driver.communicate(timeout=200)[0]
    refused, crashes, good, early = (f"t{number:04d}" for number in range(4))
    statuses = trials(study)["status"].to_dict()
    assert statuses == {refused: "failed", crashes: "finished", good: "finished", early: "stopped"}, said
    assert driver.returncode == 1
    assert study.events("retry") == [crashes]
    assert study.events("resumed") == [crashes]
    assert study.steps(crashes) == study.steps(good) == list(range(7))
    assert sorted(path.name for path in (study.folder / "train" / f"{good}-1").iterdir()) == [
        "checkpoint_00000005",
        "checkpoint_00000006",
    ]
