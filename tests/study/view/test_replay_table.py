"""`study FILE --what-if` on a study whose answer is known by hand."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ebft_study import config, results
from ebft_study.cli import app
from ebft_study.errors import EbftError
from ebft_study.study.folder import study_yaml
from ebft_study.study.resolving import study_file
from ebft_study.study.spec import trials
from ebft_study.study.stopping.replay import recorded_concurrency, recorded_trials
from ebft_study.study.view.replay_table import alternatives, study_with

STARTED = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
LEVELS = {"alpha=0": 2.0, "alpha=0.5": 1.0, "alpha=1": 3.0, "sft": 0.5}
CONTENT: dict[str, Any] = {
    "study": "grid",
    "question": "What would have been saved?",
    "run": {"steps": 40},
    "axes": {"alpha": [0.0, 0.5, 1.0]},
    "seeds": [0, 1],
    "baselines": {"sft": {"method": "sft"}},
    "profiles": {"cpu": {}, "gpu": {"scheduler": {"kind": "asha", "grace_period_steps": 10, "reduction_factor": 2}}},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight trials of 40 steps, one after the other: 5 s to start, 1 s a step, 5 s to end."""
    place, clock = tmp_path_factory.mktemp("finished"), [STARTED]
    file, folder = place / "grid.yaml", place / "studies" / "grid"
    file.write_text(yaml.safe_dump(CONTENT, sort_keys=False))
    study = study_file.load_study(file, "cpu")
    spec = study.spec
    folder.mkdir(parents=True)
    study_yaml.write(folder, spec, study.source, provenance={})
    recorder = results.StudyRecorder(folder, study="grid")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        patch.setattr("ebft_study.results.writer.now", lambda: clock[0])
        for number, trial in enumerate(trials.trials_of(spec, trials.enumerated(spec))):
            start = STARTED + datetime.timedelta(seconds=50 * number)
            rows = results.TrialRecorder(folder, study="grid", trial_id=trial.trial_id, attempt=1)
            for step in range(0, 41, 10):
                clock[0] = start + datetime.timedelta(seconds=5 + step)
                level = LEVELS[trial.configuration.label]
                rows.metrics(step, {"cfm_loss": level, "ce_loss": level})
            recorder.trial(row_of(trial, start))
        results.compact(folder)
    return place


def row_of(trial: trials.Trial, start: datetime.datetime) -> dict[str, Any]:
    return {
        "trial_id": trial.trial_id, "status": "finished", "attempt": 1, "label": trial.label,
        "configuration": trial.configuration.label, "named_baseline": trial.configuration.baseline,
        "hyperparameters": config.flatten(trial.run), "started_at": start, "startup_seconds": 5.0,
        "finished_at": start + datetime.timedelta(seconds=50), "total_seconds": 50.0, "steps_done": 40,
    }  # fmt: skip


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the study, to change."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "studies" / "grid"


def asked(folder: Path, *arguments: str, file: str = "grid.yaml") -> str:
    """What the command says, in a wide terminal; raises what it refuses."""
    command = ["study", str(folder.parents[1] / file), "--what-if", "--storage", str(folder.parent), *arguments]
    ran = CliRunner().invoke(app, command, env={"COLUMNS": "300"})
    if ran.exception and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    assert ran.exit_code == 0
    return " ".join(ran.output.split())


def test_the_file_s_scheduler_over_the_record(folder: Path) -> None:
    """Serial ASHA at 10, 20: alpha=1 is behind at step 10 with its first seed, alpha=0 with its second at step 20."""
    said = asked(folder, "--profile", "gpu")
    assert "grid: 6 trials on its axes, 2 of baselines, 1 at a time, 320 steps, 6 min 40 s" in said
    assert "Best by cfm_loss: alpha=0.5 (1, mean of 2 finished seeds)" in said
    assert "3 of 6 90 of 320 (28 %) 1 min 50 s 4 min 50 s the same 0" in said
    assert "t0003 alpha=1 seed=0 10/40 2 min 45 s configuration stopped: cfm_loss 3 at step 10" in said
    assert "t0005 alpha=0 seed=1 20/40 4 min 0 s configuration stopped: cfm_loss 2 (mean of 2 seeds) at step 20" in said
    assert "t0007 alpha=1 seed=1 0/40" in said


def test_on_gpus_their_hours_are_told(folder: Path) -> None:
    content = yaml.safe_load((folder / "study.yaml").read_text())
    content["resources"] |= {"workers_per_trial": 2, "gpus_per_worker": 4}
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    assert "1 min 50 s (0.244 GPU hours)" in asked(folder, "--profile", "gpu")


def test_overrides_say_the_same(folder: Path) -> None:
    options = ["scheduler.kind=asha", "scheduler.grace_period_steps=10", "scheduler.reduction_factor=2"]
    assert asked(folder, *options) == asked(folder, "--profile", "gpu")
    assert asked(folder, *options, "steps=40", "learning_rate=1e-4") == asked(folder, "--profile", "gpu")


def test_two_places_take_less_time(folder: Path) -> None:
    said = asked(folder, "budget.max_concurrent_trials=2")
    assert "2 at a time, 320 steps, 3 min 20 s" in said


def test_overrides_of_the_kind_keep_what_the_new_kind_uses(folder: Path) -> None:
    said = asked(folder, "--profile", "gpu", "scheduler.kind=median", "scheduler.min_samples_required=1")
    assert "median (grace_period_steps 10, min_samples_required 1)" in said


def test_without_a_scheduler_all_are_compared(folder: Path) -> None:
    said = asked(folder)
    for kind in (
        "asha (grace_period_steps 10",
        "hyperband (",
        "median (",
        "extrapolation (",
        "divergence (",
        "reward hacking (",
    ):
        assert kind in said
    assert "stopped at" not in said
    spec = study_with(folder, folder.parents[1] / "grid.yaml", None, ["stopping.stagnation={}"])
    assert list(alternatives(spec, recorded_trials(folder, spec))) == ["stagnation (improvement 0, evaluations 5)"]


def test_the_winner_may_be_lost_and_its_regret_is_by_all_that_is_on_record(folder: Path) -> None:
    """By a rule that stops whatever makes no progress everything goes; baselines are no choice."""
    said = asked(folder, "stopping.stagnation.evaluations=1", "stopping.stagnation.improvement=0.1")
    assert "6 of 6 120 of 320 (38 %) 2 min 30 s 4 min 10 s nothing was left" in said
    for trial_id in ("t0002", "t0006"):  # now alpha=0.5 rises and alpha=0 does not
        rows = results.TrialRecorder(folder, study="grid", trial_id=trial_id, attempt=2)
        rows.metrics(0, {"cfm_loss": 4.0, "ce_loss": 1.0})
        rows.metrics(10, {"cfm_loss": 4.0, "ce_loss": 1.0})
    options = ("scheduler.kind=asha", "scheduler.grace_period_steps=10", "scheduler.reduction_factor=2")
    assert "alpha=0 (2) 1" in asked(folder, *options)


def test_a_choice_by_fewer_seeds_is_called_one(folder: Path) -> None:
    """The winner's second seed becomes worse, and everything else diverges: its first seed is all that is left."""
    rows = results.TrialRecorder(folder, study="grid", trial_id="t0006", attempt=2)
    rows.metrics(20, {"cfm_loss": 4.0, "ce_loss": 1.0})
    rules = ("stopping.divergence.evaluations=1", "stopping.stagnation.evaluations=1")
    for trial_id in ("t0001", "t0003", "t0005", "t0007"):
        rows = results.TrialRecorder(folder, study="grid", trial_id=trial_id, attempt=2)
        rows.metrics(10, {"cfm_loss": 4.0, "ce_loss": 9.0})
    said = asked(folder, *rules)
    assert "5 of 6" in said
    assert "the same, by 1 of 2 seeds 0" in said


def test_times_and_places_are_those_on_record(folder: Path) -> None:
    spec = study_yaml.read(folder)
    ran = recorded_trials(folder, spec)
    assert [one.elapsed for one in ran if not one.is_baseline] == [(5.0, 15.0, 25.0, 35.0, 45.0)] * 6
    assert {one.seconds for one in ran} == {50.0}
    assert recorded_concurrency(folder) == 1
    recorder = results.StudyRecorder(folder, study="grid")
    for trial_id in ("t0001", "t0002"):
        recorder.trial({"trial_id": trial_id, "started_at": STARTED})
    assert recorded_concurrency(folder) == 3


def test_time_between_attempts_is_nobodys(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = STARTED + datetime.timedelta(days=3)
    rows = results.TrialRecorder(folder, study="grid", trial_id="t0001", attempt=2)
    for step in (30, 40):
        moment = late + datetime.timedelta(seconds=step)
        monkeypatch.setattr("ebft_study.results.writer.now", lambda moment=moment: moment)
        rows.metrics(step, {"cfm_loss": 2.0, "ce_loss": 2.0})
    ran = {one.trial_id: one for one in recorded_trials(folder, study_yaml.read(folder))}
    assert ran["t0001"].elapsed == (5.0, 15.0, 25.0, 25.0, 35.0)


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"status": "running"}, ["t0003 is running", "no end yet"]),
        ({"status": "stopped", "stop_reason": "early stop: behind", "steps_done": 10}, ["stopped early at step 10"]),
    ],
)
def test_half_a_curve_is_refused(folder: Path, row: dict[str, Any], parts: list[str]) -> None:
    results.StudyRecorder(folder, study="grid").trial({"trial_id": "t0003", **row})
    with pytest.raises(EbftError) as caught:
        asked(folder)
    for part in parts:
        assert part in str(caught.value)


def test_trials_that_were_not_needed_are_no_part_of_a_replay(folder: Path) -> None:
    row = {"trial_id": "t0007", "status": "skipped", "stop_reason": "not promoted: cfm_loss 3"}
    results.StudyRecorder(folder, study="grid").trial(row)
    said = asked(folder, "--profile", "gpu")
    assert "grid: 5 trials on its axes, 2 of baselines, 1 at a time, 280 steps" in said
    assert "2 of 5 50 of 280" in said
    assert "t0007" not in said


def test_trials_that_failed_or_ended_by_themselves_are_replayed_as_they_were(folder: Path) -> None:
    for trial_id, status in (("t0002", "failed"), ("t0006", "stopped")):
        results.StudyRecorder(folder, study="grid").trial({"trial_id": trial_id, "status": status})
    assert "Best by cfm_loss: alpha=0 (2, mean of 2 finished seeds)" in asked(folder)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["steps=50"], ["steps=50", "trials that ran with 40", "scheduler.*"]),
        (["alpha=0.5"], ["reward.alpha", "an axis of the study"]),
        (["scheduler.knd=asha"], ["command line", "unknown key 'scheduler.knd'", "'kind'"]),
        (["scheduler.kind=median", "scheduler.brackets=2"], ["brackets=2", "kind is median"]),
        (["scheduler.kind=asha"], ["grace_period_steps=50", "only 40 steps"]),
        (["scheduler.kind=extrapolation", "scheduler.grace_period_steps=5"], ["evaluations", "needed to extrapolate"]),
        (["seeds=[0]"], ["seeds=[0]", "trials that ran with [0, 1]", "scheduler.*"]),
        (["resources.gpus_per_worker=1"], ["resources=", "trials that ran with"]),
        (["scheduler=asha"], ["'scheduler=asha'", "is a section"]),
        (["scheduler.kind=pbt"], ["scheduler.kind='pbt'", "cannot be replayed"]),
        (["objective.metric=cfm"], ["objective.metric='cfm'", "cfm_loss"]),
        (["--name", "other"], ["other", "is no study", "--name"]),
        (["--resume"], ["--resume", "runs nothing"]),
    ],
)
def test_what_cannot_be_asked_is_refused(folder: Path, arguments: list[str], parts: list[str]) -> None:
    with pytest.raises(EbftError) as caught:
        asked(folder, *arguments)
    for part in parts:
        assert part in str(caught.value)


def test_one_of_several_objectives_cannot_be_overridden(folder: Path) -> None:
    file = folder.parent.parent / "several.yaml"
    objectives = [{"metric": "ce_loss", "mode": "min"}, {"metric": "cfm_loss", "mode": "min"}]
    file.write_text(yaml.safe_dump({**CONTENT, "objective": objectives}))
    with pytest.raises(EbftError, match="several objectives"):
        asked(folder, "objective.metric=ce_loss", file="several.yaml")


def test_a_search_that_learns_from_results_is_refused(folder: Path) -> None:
    content = {**yaml.safe_load((folder / "study.yaml").read_text())}
    content["search"] = {"algorithm": "optuna", "num_configurations": 3}
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(EbftError, match="Optuna chose its trials by their results"):
        asked(folder)


def test_a_replay_compares_no_cfm_that_each_configuration_measures_in_its_own_way(tmp_path: Path) -> None:
    content = {**CONTENT, "axes": {"depths": [[0.5], [0.25, 0.75]]}, "profiles": {}}
    file, folder = tmp_path / "grid.yaml", tmp_path / "studies" / "grid"
    file.write_text(yaml.safe_dump(content))
    study = study_file.load_study(file)
    folder.mkdir(parents=True)
    study_yaml.write(folder, study.spec, study.source, provenance={})
    with pytest.raises(EbftError, match="kind=asha compares trials by it"):
        study_with(folder, file, None, [])
    assert study_with(folder, file, None, ["objective.metric=ce_loss"]).objective.metric == "ce_loss"
    assert study_with(folder, file, None, ["stopping.divergence={}"]).stopping.divergence is not None
