"""A study's folder: attempts and their checkpoints, its record, its lock, and starting it twice."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
import yaml
from rich.console import Console

from ebft_study import results
from ebft_study.errors import EbftError, ResultsError
from ebft_study.study import attempts, record, runner, space, status
from ebft_study.study.spec import StudySpec
from ebft_study.training import checkpoint


def spec(**changes: Any) -> StudySpec:
    content = {"study": "s", "question": "Why?", "run": {"steps": 4}, "axes": {"alpha": [0.0, 1.0]}, **changes}
    return space.from_record(content, source="test")


def study_file(folder: Path) -> Path:
    path = folder / "file.yaml"
    path.write_text("study: s\n")
    return path


def save(folder: Path, step: int) -> Path:
    folder.mkdir(parents=True)
    checkpoint.save(folder, {"step": step, "weights": torch.zeros(2)}, step=step)
    return folder


# --- attempts --------------------------------------------------------------------------------------------------


def test_every_attempt_has_a_folder_of_its_own(tmp_path: Path) -> None:
    assert [attempts.begin(tmp_path, "t0001") for _ in range(3)] == [1, 2, 3]
    assert attempts.begin(tmp_path, "t0002") == 1
    assert attempts.numbers(tmp_path, "t0001") == [1, 2, 3]
    assert attempts.numbers(tmp_path, "t000") == []


def test_attempts_are_ordered_as_numbers(tmp_path: Path) -> None:
    for _ in range(11):
        attempts.begin(tmp_path, "t0001")
    assert attempts.numbers(tmp_path, "t0001")[-2:] == [10, 11]


def test_the_newest_checkpoint_is_the_highest_complete_step_of_all_attempts(tmp_path: Path) -> None:
    assert attempts.newest_checkpoint(tmp_path, "t0001") is None
    first, second = (attempts.folder(tmp_path, "t0001", attempts.begin(tmp_path, "t0001")) for _ in range(2))
    save(first / "checkpoint_00000020", 20)
    save(second / "checkpoint_00000030", 30)
    damaged = save(second / "checkpoint_00000040", 40)
    (damaged / "state.pt").write_bytes(b"half")
    save(attempts.folder(tmp_path, "t00011", 1) / "checkpoint_00000090", 90)
    assert attempts.newest_checkpoint(tmp_path, "t0001") == second / "checkpoint_00000030"
    (second / "checkpoint_00000030" / "checkpoint.json").unlink()
    assert attempts.newest_checkpoint(tmp_path, "t0001") == first / "checkpoint_00000020"


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    own = attempts.folder(tmp_path, "t0000", attempts.begin(tmp_path, "t0000"))
    for step in (5, 10, 100):
        attempts.keep_checkpoint(own, save(tmp_path / f"written-{step}", step), step=step, keep=2)
    assert sorted(path.name for path in own.iterdir()) == ["checkpoint_00000010", "checkpoint_00000100"]
    assert checkpoint.step_of(own / "checkpoint_00000100") == 100


# --- study.yaml ------------------------------------------------------------------------------------------------


def test_the_record_holds_what_is_needed_to_repeat_a_study(tmp_path: Path) -> None:
    provenance = {"data": {"qa": {"fingerprint": "ab"}}, "path": Path("x"), "counts": (1, 2)}
    record.write(tmp_path, spec(), profile="cpu", file=study_file(tmp_path), provenance=provenance)
    content = yaml.safe_load((tmp_path / "study.yaml").read_text())
    assert content["profile"] == "cpu"
    assert content["question"] == "Why?"
    assert len(content["file"]["sha256"]) == 64
    assert set(content["versions"]) >= {"python", "torch", "ray", "transformers", "optuna", "ebft-study"}
    assert content["provenance"] == {"data": {"qa": {"fingerprint": "ab"}}, "path": "x", "counts": [1, 2]}
    assert record.read(tmp_path) == spec()
    assert record.changed_versions(tmp_path) == []


def test_the_record_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    record.write(tmp_path, spec(), profile=None, file=study_file(tmp_path), provenance={})
    assert str(tmp_path) not in (tmp_path / "study.yaml").read_text()


def test_other_versions_are_noticed(tmp_path: Path) -> None:
    record.write(tmp_path, spec(), profile=None, file=study_file(tmp_path), provenance={})
    content = yaml.safe_load((tmp_path / "study.yaml").read_text())
    content["versions"]["torch"] = "1.0"
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    (changed,) = record.changed_versions(tmp_path)
    assert changed.startswith("torch 1.0 -> ")


def test_differences_name_the_keys() -> None:
    other = spec(run={"steps": 8}, axes={"alpha": [0.0, 1.0], "gamma": [0.1]})
    assert record.differences(spec(), other) == ["run.training.steps: 4 -> 8", "axes.loss.gamma: absent -> [0.1]"]
    assert record.differences(spec(), spec()) == []


def test_a_folder_without_record_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="is not a study"):
        record.read(tmp_path)


# --- starting and resuming -------------------------------------------------------------------------------------


@pytest.fixture
def existing(tmp_path: Path) -> Path:
    """A study that was started, with one of its two trials finished."""
    folder = tmp_path / "studies" / "s"
    folder.mkdir(parents=True)
    record.write(folder, spec(), profile=None, file=study_file(tmp_path), provenance={})
    recorder = results.StudyRecorder(folder, study="s")
    for trial_id, state in (("t0000", "finished"), ("t0001", "running")):
        hyperparameters = {"steps": 4, "warm_start_steps": 0}
        row = {
            "trial_id": trial_id,
            "status": state,
            "attempt": 1,
            "label": trial_id,
            "hyperparameters": hyperparameters,
        }
        recorder.trial(row)
    return folder


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def start(folder: Path, study: StudySpec, *, go_on: bool = False) -> runner.Ended:
    file = study_file(folder.parent.parent)
    return runner.run(study, file=file, profile=None, storage=folder.parent, console=quiet(), go_on=go_on)


def test_a_name_taken_by_other_settings_is_refused(existing: Path) -> None:
    with pytest.raises(ResultsError) as caught:
        start(existing, spec(run={"steps": 8}))
    assert "run.training.steps: 4 -> 8" in str(caught.value)
    assert "--name" in str(caught.value)


def test_a_started_study_is_not_started_again(existing: Path) -> None:
    with pytest.raises(ResultsError, match="Continue it with 'ebft-study resume"):
        start(existing, spec())


def test_a_finished_study_says_so(existing: Path) -> None:
    results.StudyRecorder(existing, study="s").trial({"trial_id": "t0001", "status": "finished", "attempt": 1})
    with pytest.raises(ResultsError, match="this study is finished"):
        start(existing, spec())
    ended = start(existing, spec(), go_on=True)
    assert ended.exit_code == 0
    assert ended.reason == ""


def test_a_second_driver_is_refused(existing: Path) -> None:
    with (
        filelock.FileLock(existing / ".lock"),
        pytest.raises(ResultsError, match="another process is running this study"),
    ):
        runner.resume(existing, console=quiet())


def test_nothing_stays_behind_when_preparation_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(configurations: Any) -> dict[str, Any]:
        raise EbftError("data.dataset='nowhere': no such data set. Use another")

    monkeypatch.setattr(runner, "_prepare", fail)
    with pytest.raises(EbftError, match="nowhere"):
        start(tmp_path / "studies" / "s", spec())
    assert not (tmp_path / "studies").exists()


def test_nothing_is_written_when_no_trial_fits(tmp_path: Path) -> None:
    with pytest.raises(EbftError, match="cpus_per_worker"):
        start(tmp_path / "studies" / "s", spec(resources={"cpus_per_worker": 4096}))
    assert not (tmp_path / "studies").exists()


def test_failed_trials_count_as_over_unless_asked_for(existing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results.StudyRecorder(existing, study="s").trial({"trial_id": "t0001", "status": "failed", "attempt": 1})
    assert runner.resume(existing, console=quiet()).exit_code == 1
    left: list[set[str]] = []

    def session(folder: Path, study: StudySpec, runs: Any, past: Any, *rest: Any) -> runner.Ended:
        left.append({"t0000", "t0001"} - set(past.endings))
        return runner.Ended(folder, past.states)

    monkeypatch.setattr(runner, "_session", session)
    monkeypatch.setattr(runner, "_prepare", lambda configurations: {})
    runner.resume(existing, console=quiet(), retry_failed=True)
    assert left == [{"t0001"}]


@pytest.mark.parametrize(("reason", "code"), [("", 0), ("Ctrl-C", 130), ("budget.max_hours is used up", 0)])
def test_exit_codes(tmp_path: Path, reason: str, code: int) -> None:
    assert runner.Ended(tmp_path, {}, reason).exit_code == code


# --- status ----------------------------------------------------------------------------------------------------


def test_status_notices_that_the_driver_is_gone(existing: Path) -> None:
    console = quiet()
    status.show(existing, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1 of 2 trials finished, 1 interrupted" in shown
    assert "not running; resume with" in shown


def test_status_of_a_running_study(existing: Path) -> None:
    console = quiet()
    with filelock.FileLock(existing / ".lock"):
        status.show(existing, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1 of 2 trials finished, 1 running" in shown
    assert "not running" not in shown


def test_status_says_what_early_stops_saved(existing: Path) -> None:
    early = {"trial_id": "t0001", "status": "stopped", "steps_saved": 3, "seconds_saved": 90.0}
    results.StudyRecorder(existing, study="s").trial(early)
    console = quiet()
    status.show(existing, console)
    assert "early stopping saved 3 of 8 steps (about 1 min 30 s of trials)" in console.file.getvalue()  # type: ignore[attr-defined]
