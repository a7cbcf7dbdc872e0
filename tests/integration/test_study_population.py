"""A population of two real EBFT trials: the worse one goes on from the better one, and its driver is killed after."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ebft_study import results
from ebft_study.results.lineage import lineage, settings_in_force
from ebft_study.training import checkpoint
from tests import commands
from tests.tiny_run import write_data, write_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

STEPS = 60
BAD, GOOD = 0.001, 0.05
# What is perturbed changes nothing here, because no gradient is as long: a trial that went on from another one ends
# with the very weights of the other.
CONTENT = {
    "study": "population", "question": "Do weights really change hands?",
    "axes": {"learning_rate": [BAD, GOOD], "max_grad_norm": [1e6, 2e6, 3e6]},
    "search": {"algorithm": "random", "num_configurations": 2, "search_seed": 0},
    "scheduler": {"kind": "pbt", "perturbation_interval_steps": 2, "resample_probability": 0.0,
                  "perturbed_axes": ["max_grad_norm"]},
    "objective": {"metric": "ce_loss", "mode": "min"},
    "resources": {"workers_per_trial": 0},
}  # fmt: skip
RUN = {
    "sequence_length": 24, "completion_length": 3, "stride": 4, "n_samples": 3, "batch_size": 4, "text_column": "text",
    "gamma": 1.0, "steps": STEPS, "log_every_steps": 1, "eval_every_steps": 2, "checkpoint_every_steps": 2,
    "keep_checkpoints": 30, "validation_sequences": 4, "heldout_sequences": 4, "profile_lengths": [1, 3],
    "warmup_fraction": 0.0, "features": {"backend": "local"},
}  # fmt: skip


@dataclass
class Study:
    cwd: Path
    said: str = ""

    @property
    def folder(self) -> Path:
        return self.cwd / "studies" / "population"

    def load(self) -> results.Results:
        return results.load(self.folder)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return commands.start(*arguments, cwd=self.cwd)


def went_on(folder: Path) -> bool:
    """Whether a trial has done an update after it took over another one's state."""
    taken = lineage(folder).to_dict("records") if (folder / "study.yaml").exists() else []
    metrics = results.read_table(folder, "metrics") if taken else None
    return metrics is not None and any(
        ((metrics["trial_id"] == row["trial_id"]) & (metrics["attempt"] > row["attempt"])).any() for row in taken
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Killed with SIGKILL after an exploit, and resumed to its end."""
    study = Study(tmp_path_factory.mktemp("population"))
    model, data = write_model(study.cwd / "model"), write_data(study.cwd / "data.jsonl")
    run = {**RUN, "model": str(model), "dataset": str(data)}
    (study.cwd / "population.yaml").write_text(json.dumps({**CONTENT, "run": run}))
    driver = study.start("study", "population.yaml")
    commands.wait_until(lambda: went_on(study.folder), driver, seconds=350)
    driver.kill()
    driver.communicate()
    assert (study.load().trials["status"] == "running").any()
    resumed = study.start("resume", "population")
    study.said = resumed.communicate(timeout=3000)[0]
    assert resumed.returncode == 0, study.said
    return study


def final_state(study: Study, trial_id: str) -> dict[str, torch.Tensor]:
    """Weights and optimizer states of a trial's last checkpoint."""
    (last,) = study.folder.glob(f"train/{trial_id}-*/checkpoint_{STEPS:08d}")
    tensors = checkpoint.load(last)["tensors"]
    return {f"{kind}.{name}": tensor for kind, named in tensors.items() for name, tensor in named.items()}


def test_what_is_taken_over_is_the_donors_checkpoint_bit_for_bit(study: Study) -> None:
    row = lineage(study.load()).to_dict("records")[0]
    taken = study.folder / row["checkpoint"]
    given = study.folder / "train" / f"{row['donor']}-1" / taken.name
    for file in ("checkpoint.json", "state-00001-of-00001.safetensors"):
        assert (taken / file).read_bytes() == (given / file).read_bytes()
    assert checkpoint.step_of(taken) == row["donor_step"]


def test_trials_that_changed_hands_end_with_the_same_weights_and_optimizer_states(study: Study) -> None:
    """From different learning rates: the exploit, and the kill after it, lost and mixed nothing."""
    first, second = (final_state(study, trial_id) for trial_id in ("t0000", "t0001"))
    assert first.keys() == second.keys()
    assert any(name.startswith("exp_avg.") for name in first)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    metrics = study.load().metrics
    at_first = metrics[(metrics["step"] == 1)].set_index("trial_id")["learning_rate"]
    assert sorted(at_first) == [BAD, GOOD]


def test_the_settings_in_force_are_those_on_record(study: Study) -> None:
    loaded = study.load()
    taken = lineage(loaded)
    assert len(taken) >= 1
    first = taken.iloc[0]
    assert (first["before"]["learning_rate"], first["after"]["learning_rate"]) == (BAD, GOOD)
    assert first["after"]["max_grad_norm"] != 2e6  # the donor's
    force = settings_in_force(loaded).sort_values("from_attempt")
    for trial_id, rows in loaded.metrics.dropna(subset=["learning_rate"]).groupby("trial_id"):
        own = force[force["trial_id"] == trial_id]
        for attempt, rate in zip(rows["attempt"], rows["learning_rate"], strict=True):
            assert rate == own[own["from_attempt"] <= attempt].iloc[-1]["learning_rate"]
    # Columns of `trials` keep the settings that a trial began with.
    assert sorted(loaded.trials["learning_rate"]) == [BAD, GOOD]


def test_every_trial_finishes_and_the_report_shows_the_lineage(study: Study) -> None:
    loaded = study.load()
    assert set(loaded.trials["status"]) == {"finished"}
    assert set(loaded.trials["steps_done"]) == {STEPS}
    assert "Lineage: which trial resumed from which" in (study.folder / "report.html").read_text()
