"""What early stops saved, against adding it up by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ebft_study.report import facts
from ebft_study.report.savings import saved
from ebft_study.report.tables import summarize
from ebft_study.results import StudyRecorder, load, read_table
from tests.synthetic_study import write_study

EFFECTS = {(0.0, 0.0): (0.3, 0.2), (1.0, 0.0): (0.0, -0.1), None: (-0.2, 0.0)}
CPU = {"workers_per_trial": 0, "gpus_per_worker": 0.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six trials of 40 steps, of which nothing was saved."""
    return write_study(tmp_path / "s", effects=EFFECTS, seeds=(0, 1))


def stop(folder: Path, **columns: Any) -> None:
    for trial_id, values in columns.items():
        steps, seconds = values
        StudyRecorder(folder, study="s").trial(
            {"trial_id": trial_id, "status": "stopped", "steps_saved": steps, "seconds_saved": seconds}
        )


def test_nothing_is_said_where_nothing_was_stopped(folder: Path) -> None:
    assert saved(read_table(folder, "trials"), CPU) == ""


def test_steps_and_time_are_added_up(folder: Path) -> None:
    stop(folder, t000=(20, 30.0), t001=(35, 42.0))
    assert saved(read_table(folder, "trials"), CPU) == "55 of 240 steps (about 1 min 12 s of trials)"


def test_gpu_hours_count_all_workers(folder: Path) -> None:
    stop(folder, t000=(20, 1800.0))
    resources = {"workers_per_trial": 2, "gpus_per_worker": 1.5}
    assert saved(read_table(folder, "trials"), resources).endswith("(about 30 min 0 s of trials, 1.50 GPU hours)")


def test_a_trial_without_a_pace_saves_steps_only(folder: Path) -> None:
    stop(folder, t000=(40, None))
    assert saved(read_table(folder, "trials"), CPU) == "40 of 240 steps"
    stop(folder, t001=(40, 12.0))
    assert saved(read_table(folder, "trials"), CPU) == "80 of 240 steps (about 12.0 s of trials)"


SAVED = "20 of 240 steps (about 30.0 s of trials)"


def test_the_report_says_it_with_the_cost(folder: Path) -> None:
    assert "Early stopping saved" not in dict(facts.cost(summarize(load(folder))))
    stop(folder, t000=(20, 30.0))
    assert dict(facts.cost(summarize(load(folder))))["Early stopping saved"] == SAVED
