"""A real study whose trials have an engine each and share a feature service, while their processes are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import psutil
import pytest

from ebft_study import results
from tests import commands
from tests.tiny_run import write_data, write_model

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),  # its import takes seconds
]

STEPS = 24
SETTINGS = {
    "sequence_length": 24, "completion_length": 3, "stride": 4, "n_samples": 3, "batch_size": 4, "text_column": "text",
    "steps": STEPS, "log_every_steps": 1, "eval_every_steps": 4, "checkpoint_every_steps": 4,
    "validation_sequences": 4, "heldout_sequences": 4, "profile_lengths": [1, 3], "warmup_fraction": 0.0,
    "rollout": {"backend": "vllm"}, "features": {"backend": "service"}, "kv_cache_gib": 0.1,
}  # fmt: skip


@dataclass
class Study:
    """A study's folder and its driver."""

    cwd: Path
    driver: subprocess.Popen[str]

    @property
    def folder(self) -> Path:
        return self.cwd / "studies" / "served"

    def steps(self, trial_id: str) -> list[int]:
        metrics = results.read_table(self.folder, "metrics")
        return sorted(metrics.loc[metrics["trial_id"] == trial_id, "step"])

    def trials(self) -> pd.DataFrame:
        return results.read_table(self.folder, "trials").set_index("trial_id")

    def events(self, kind: str) -> list[str]:
        events = results.read_table(self.folder, "events")
        return list(events.loc[events["kind"] == kind, "message"])

    def processes(self, title: str) -> list[psutil.Process]:
        """Ray gives every process the name of what it runs."""
        return [process for process in commands.family(self.driver) if title in commands.title(process)]

    def until(self, condition: Callable[[], object], seconds: float = 240) -> None:
        commands.wait_until(condition, self.driver, seconds)


def kill(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)


def started(folder: Path, *options: str) -> Study:
    if not (folder / "model").exists():
        write_model(folder / "model", head_dim=32)
    settings = {**SETTINGS, "model": str(folder / "model"), "dataset": str(write_data(folder / "data.jsonl"))}
    content = {
        "study": "served", "question": "Do services survive?", "run": settings, "axes": {"alpha": [0.0, 1.0]},
        "resources": {"workers_per_trial": 0, "max_failures": 3},
    }  # fmt: skip
    (folder / "served.yaml").write_text(json.dumps(content))
    return Study(folder, commands.start("study", "served.yaml", *options, cwd=folder))


@dataclass
class Survived:
    """A study that ended, what it printed, and all processes that it ever had."""

    study: Study
    said: str
    processes: list[psutil.Process]
    killed: list[str]


@pytest.fixture(scope="module")
def survived(tmp_path_factory: pytest.TempPathFactory) -> Survived:
    study = started(tmp_path_factory.mktemp("served"))
    killed = []
    # A trial that has a checkpoint; then the service; then the engine of whatever trial runs.
    study.until(lambda: len(study.steps("t0000")) > 5)
    family = commands.family(study.driver)
    for title in ("ray::ImplicitFunc", "ray::FeatureService", "ray::Engine"):
        # The engine of the trial that was killed ends with it: the one to kill is the engine of its next attempt.
        known = family if title == "ray::Engine" else []
        study.until(lambda title=title, known=known: set(study.processes(title)) - set(known))
        kill(next(process for process in study.processes(title) if process not in known))
        killed.append(title)
        time.sleep(1.0)
    said = study.driver.communicate(timeout=2400)[0]
    return Survived(study, said, family, killed)


def test_every_trial_ends_and_has_all_its_rows(survived: Survived) -> None:
    assert survived.study.driver.returncode == 0, survived.said
    assert survived.study.trials()["status"].to_dict() == {"t0000": "finished", "t0001": "finished"}
    for trial_id in ("t0000", "t0001"):
        assert survived.study.steps(trial_id) == list(range(STEPS + 1))


def test_only_what_lost_its_own_process_is_tried_again(survived: Survived) -> None:
    retries = survived.study.events("retry")
    # The trial, and the trial whose engine was killed; the service's death cost nobody an attempt.
    assert 1 <= len(retries) <= 2, retries
    assert any("rollout engine" in message for message in retries), retries
    assert survived.study.trials()["attempt"].sum() == 2 + len(retries)
    # An attempt whose engine dies before its first step goes on from nothing.
    assert 1 <= len(survived.study.events("resumed")) <= len(retries)


def test_engine_and_trainer_agree_from_first_to_last(survived: Survived) -> None:
    metrics = results.read_table(survived.study.folder, "metrics")
    assert metrics["parity_max_difference"].max() < 1e-4
    assert metrics["parity_max_difference"].notna().sum() == 2 * STEPS
    assert (metrics["policy_lag"].dropna() == 0).all()


def test_nothing_is_left_when_a_study_has_ended(survived: Survived) -> None:
    assert not commands.outlived(survived.processes, 20)


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_and_a_dead_node_does_not_keep_one_waiting(tmp_path: Path) -> None:
    study = started(tmp_path)
    study.until(lambda: len(study.steps("t0000")) > 5)
    family = commands.family(study.driver)
    assert any("ray::Engine" in commands.title(process) for process in family)
    study.driver.kill()
    study.driver.communicate()
    # Ray's own agents notice after half a minute; they hold no model and no device.
    ours = [process for process in family if not commands.title(process).startswith(commands.RAY_AGENTS)]
    left = commands.outlived(ours, 25)
    assert not left, [commands.title(process) for process in left]

    resumed = started(tmp_path, "--resume")
    resumed.until(lambda: bool(resumed.events("resumed")))
    kill(resumed.processes("raylet/raylet")[0])
    said = resumed.driver.communicate(timeout=600)[0]
    assert "Ray's node process died; resume with: ebft-study resume" in said
    assert resumed.driver.returncode == 1
    assert set(resumed.trials()["status"]) == {"interrupted"}
