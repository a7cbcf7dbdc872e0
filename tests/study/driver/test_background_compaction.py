"""Results are merged while a study runs, and not without need."""

from __future__ import annotations

import time
from pathlib import Path

from ebft_study import config, results
from ebft_study.study.driver.background_compaction import compacting

SETTINGS = config.flatten(config.build_run({}, source="test"))


def finish(folder: Path, trial_id: str) -> None:
    recorder = results.TrialRecorder(folder, study="s", trial_id=trial_id, attempt=1)
    for step in range(3):
        recorder.metrics(step, {"cfm_loss": 2.0 - step})
    row = {"trial_id": trial_id, "status": "finished", "attempt": 1, "hyperparameters": SETTINGS}
    results.StudyRecorder(folder, study="s").trial(row)


def files(folder: Path) -> list[str]:
    return [path.name for path in (folder / "results" / "metrics").glob("*.parquet")]


def test_files_of_trials_that_are_over_are_merged_while_the_study_runs(tmp_path: Path) -> None:
    ended: list[str] = []
    with compacting(tmp_path, lambda: len(ended), every_seconds=0.02, fewest_trials=2):
        for trial_id in ("t0", "t1"):
            finish(tmp_path, trial_id)
            ended.append(trial_id)
        deadline = time.monotonic() + 200
        while len(files(tmp_path)) > 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(files(tmp_path)) == 1
    assert len(results.read_table(tmp_path, "metrics")) == 6


def test_a_few_files_are_left_alone(tmp_path: Path) -> None:
    finish(tmp_path, "t0")
    with compacting(tmp_path, lambda: 0, every_seconds=0.01):
        time.sleep(0.1)
    assert len(files(tmp_path)) == 3
