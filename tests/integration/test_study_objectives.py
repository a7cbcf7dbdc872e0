"""A study with two objectives that contradict each other, run by Ray with the fake training loop."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from ebft_study import results
from tests import commands

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]

HERE = Path(__file__).parent
CONFIGURATIONS = 5
CONTENT = {
    "study": "both", "question": "Can one have both?",
    "run": {"steps": 2, "checkpoint_every_steps": 2, "features": {"backend": "local"}},
    "axes": {"learning_rate": {"distribution": "uniform", "low": 0.1, "high": 1.0}},
    "search": {"algorithm": "optuna", "sampler": "nsga2", "num_configurations": CONFIGURATIONS, "population_size": 2},
    "objective": [{"metric": "cfm_loss", "mode": "min"}, {"metric": "ce_loss", "mode": "min"}],
    "resources": {"workers_per_trial": 0},
}  # fmt: skip


def test_two_objectives_reach_optuna_and_the_report(tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text(json.dumps(CONTENT))
    said = commands.ended(commands.start("study", "both.yaml", cwd=tmp_path, program=commands.FAKE), seconds=380)
    assert said.endswith("exit code 0"), said
    folder = tmp_path / "studies" / "both"

    table = results.load(folder)
    assert list(table.trials["status"]) == ["finished"] * CONFIGURATIONS
    backend = JournalFileBackend(str(folder / "optuna.journal"))
    told = optuna.load_study(study_name="both", storage=JournalStorage(backend))
    assert [direction.name for direction in told.directions] == ["MINIMIZE", "MINIMIZE"]
    rates = table.trials.set_index("trial_id")["learning_rate"]
    for trial in told.trials:
        rate = rates[f"t{trial.number:04d}"]
        assert trial.values == pytest.approx([2 + rate + 1 / 3, 3 - rate])
    # What one objective gains the other loses, so every configuration is on the front.
    assert len(told.best_trials) == CONFIGURATIONS
    page = (folder / "report.html").read_text()
    assert "The Pareto front" in page
    assert "min cfm_loss and min ce_loss" in page
