"""A study's folder: attempts and their checkpoints, its record, its lock, and starting it twice."""

from __future__ import annotations

import datetime
import io
import os
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
import yaml
from rich.console import Console

from ebft_study import results
from ebft_study.config import CheckpointConfig, RunConfig, flatten
from ebft_study.errors import ConfigError, EbftError, ResultsError
from ebft_study.storage import storage_path
from ebft_study.study.driver import runner
from ebft_study.study.folder import attempts, history, lock, study_yaml
from ebft_study.study.folder.study_yaml import StudySource
from ebft_study.study.folder.trial_states import TrialResult
from ebft_study.study.search import journal
from ebft_study.study.search.optuna_search import OptunaSearch
from ebft_study.study.spec import normalize
from ebft_study.study.spec.study_spec import ObjectiveSpec, StudySpec
from ebft_study.study.view import status
from ebft_study.training import checkpoint
from tests.studies import SOURCE, resolved


def spec(**changes: Any) -> StudySpec:
    content = {"study": "s", "question": "Why?", "run": {"steps": 4}, "axes": {"alpha": [0.0, 1.0]}, **changes}
    return normalize.from_record(content, source="test")


def save(folder: os.PathLike[str], step: int, **metrics: float) -> Path:
    path = Path(folder)
    path.mkdir(parents=True)
    checkpoint.save(path, {"step": step, "weights": torch.zeros(2)}, step=step, metrics=metrics)
    return path


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
    (damaged / "state-00001-of-00001.safetensors").write_bytes(b"half")
    save(attempts.folder(tmp_path, "t00011", 1) / "checkpoint_00000090", 90)
    assert attempts.newest_checkpoint(tmp_path, "t0001") == second / "checkpoint_00000030"
    (second / "checkpoint_00000030" / "checkpoint.json").delete()
    assert attempts.newest_checkpoint(tmp_path, "t0001") == first / "checkpoint_00000020"


def test_the_best_and_regular_checkpoints_of_all_attempts_stay(tmp_path: Path) -> None:
    config = CheckpointConfig(checkpoint_every_steps=1, keep_checkpoints=1, keep_best=1, keep_every_steps=4)
    curves = {1: {1: 5.0, 2: 1.0, 3: 4.0, 4: 4.0, 5: 4.0}, 2: {5: 3.0, 6: 2.0, 7: 3.0}}
    for curve in curves.values():
        own = attempts.folder(tmp_path, "t0000", attempts.begin(tmp_path, "t0000"))
        for step, value in curve.items():
            written = save(tmp_path / f"written-{own.name}-{step}", step, cfm_loss=value)
            attempts.keep_checkpoint(own, written, step=step)
            best = attempts.prune(tmp_path, "t0000", config, ObjectiveSpec())
    left = sorted(path.parent.name + path.name[-2:] for path in (tmp_path / "train").glob("*/checkpoint_*"))
    assert left == ["t0000-102", "t0000-104", "t0000-207"]
    assert best == attempts.best(tmp_path, "t0000", ObjectiveSpec()) == "train/t0000-1/checkpoint_00000002"


def test_what_came_before_a_lineage_is_no_longer_the_best_but_stays_in_reserve(tmp_path: Path) -> None:
    """Attempt 2 begins a new lineage at an earlier step: attempt 1 was better, and further."""
    config = CheckpointConfig(keep_checkpoints=1, keep_best=1)
    curves = {1: {10: 1.0, 20: 2.0, 30: 3.0}, 2: {10: 5.0, 15: 4.0, 20: 6.0}}
    for curve in curves.values():
        own = attempts.folder(tmp_path, "t0000", attempts.begin(tmp_path, "t0000"))
        for step, value in curve.items():
            attempts.keep_checkpoint(own, save(tmp_path / f"{own.name}-{step}", step, cfm_loss=value), step=step)
    assert attempts.newest_checkpoint(tmp_path, "t0000") == tmp_path / "train/t0000-1/checkpoint_00000030"
    assert attempts.newest_checkpoint(tmp_path, "t0000", since=2) == tmp_path / "train/t0000-2/checkpoint_00000020"
    best = attempts.prune(tmp_path, "t0000", config, ObjectiveSpec(), since=2)
    assert best == attempts.best(tmp_path, "t0000", ObjectiveSpec(), since=2) == "train/t0000-2/checkpoint_00000015"
    assert attempts.best(tmp_path, "t0001", ObjectiveSpec()) is None
    assert stay(tmp_path) == ["130", "215", "220"]


def stay(folder: Path) -> list[str]:
    """Attempt and step of every checkpoint that is left."""
    return sorted(path.parent.name[-1] + path.name[-2:] for path in (folder / "train").glob("*/checkpoint_*"))


def test_the_best_is_the_largest_where_more_is_better(tmp_path: Path) -> None:
    own = attempts.folder(tmp_path, "t0000", attempts.begin(tmp_path, "t0000"))
    for step, value in {10: 1.0, 20: 3.0, 30: 2.0}.items():
        attempts.keep_checkpoint(own, save(tmp_path / f"{step}", step, reward=value), step=step)
    config = CheckpointConfig(keep_checkpoints=1, keep_best=1)
    best = attempts.prune(tmp_path, "t0000", config, ObjectiveSpec(metric="reward", mode="max"))
    assert best == "train/t0000-1/checkpoint_00000020"
    assert stay(tmp_path) == ["120", "130"]


def test_attempts_and_checkpoints_in_a_store(tmp_path: Path, s3_query: str) -> None:
    study = storage_path(f"s3://studies/attempts?{s3_query}")
    assert [attempts.begin(study, "t0001") for _ in range(2)] == [1, 2]
    assert attempts.newest_checkpoint(study, "t0001") is None
    own = attempts.folder(study, "t0001", 2)
    for step in (1, 2, 3):
        attempts.keep_checkpoint(own, save(tmp_path / f"{step}", step, cfm_loss=float(step)), step=step)
    damaged = own / "checkpoint_00000003" / "state-00001-of-00001.safetensors"
    damaged.write_bytes(b"half")
    newest = attempts.newest_checkpoint(study, "t0001")
    assert newest == own / "checkpoint_00000002"
    with newest.on_disk() as folder:
        assert checkpoint.load(folder)["step"] == 2
    best = attempts.prune(study, "t0001", CheckpointConfig(keep_checkpoints=1, keep_best=1), ObjectiveSpec())
    assert best == "train/t0001-2/checkpoint_00000001"
    assert [name for name in own.names() if name[0] != "."] == ["checkpoint_00000001", "checkpoint_00000003"]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    own = attempts.folder(tmp_path, "t0000", attempts.begin(tmp_path, "t0000"))
    for step in (5, 10, 100):
        attempts.keep_checkpoint(own, save(tmp_path / f"written-{step}", step), step=step)
        attempts.prune(tmp_path, "t0000", CheckpointConfig(keep_checkpoints=2, keep_best=0), ObjectiveSpec())
    assert sorted(own.names()) == ["checkpoint_00000010", "checkpoint_00000100"]
    assert checkpoint.step_of(own / "checkpoint_00000100") == 100


# --- study.yaml ------------------------------------------------------------------------------------------------


def test_the_record_holds_what_is_needed_to_repeat_a_study(tmp_path: Path) -> None:
    provenance = {"data": {"qa": {"fingerprint": "ab"}}, "path": Path("x"), "counts": (1, 2)}
    study_yaml.write(tmp_path, spec(), StudySource.from_content("file.yaml", b"", "cpu"), provenance=provenance)
    content = yaml.safe_load((tmp_path / "study.yaml").read_text())
    assert content["profile"] == "cpu"
    assert content["question"] == "Why?"
    assert len(content["file"]["sha256"]) == 64
    assert set(content["versions"]) >= {"python", "torch", "ray", "transformers", "optuna", "ebft-study"}
    assert content["provenance"] == {"data": {"qa": {"fingerprint": "ab"}}, "path": "x", "counts": [1, 2]}
    assert study_yaml.read(tmp_path) == spec()
    assert study_yaml.changed_versions(tmp_path) == []


def test_the_record_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    study_yaml.write(tmp_path, spec(), SOURCE, provenance={})
    assert str(tmp_path) not in (tmp_path / "study.yaml").read_text()


def test_other_versions_are_noticed(tmp_path: Path) -> None:
    study_yaml.write(tmp_path, spec(), SOURCE, provenance={})
    content = yaml.safe_load((tmp_path / "study.yaml").read_text())
    content["versions"]["torch"] = "1.0"
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    (changed,) = study_yaml.changed_versions(tmp_path)
    assert changed.startswith("torch 1.0 -> ")


def test_differences_name_the_keys() -> None:
    other = spec(run={"steps": 8}, axes={"alpha": [0.0, 1.0], "gamma": [0.1]})
    assert study_yaml.differences(spec(), other) == ["run.training.steps: 4 -> 8", "axes.loss.gamma: absent -> [0.1]"]
    assert study_yaml.differences(spec(), spec()) == []


@pytest.mark.parametrize("content", [b"", b"a: [", b"\xff\xfe", None])
def test_a_damaged_record_is_read_from_its_copy(tmp_path: Path, content: bytes | None) -> None:
    study_yaml.write(tmp_path, spec(), SOURCE, provenance={})
    path = tmp_path / "study.yaml"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    assert study_yaml.read(tmp_path) == spec()
    (problem,) = study_yaml.changes(tmp_path)
    assert "its copy is used" in problem
    assert results.load(tmp_path).spec["study"] == "s"
    assert any("its copy is used" in problem for problem in results.load(tmp_path).problems)


def test_what_is_edited_in_a_record_counts_and_is_said(tmp_path: Path) -> None:
    study_yaml.write(tmp_path, spec(), SOURCE, provenance={})
    path = tmp_path / "study.yaml"
    path.write_text("# a remark\n" + path.read_text())
    assert study_yaml.changes(tmp_path) == []
    path.write_text(path.read_text().replace("steps: 4", "steps: 8"))
    (change,) = study_yaml.changes(tmp_path)
    assert change.endswith("was changed since the study began: run.training.steps: 4 -> 8")
    assert study_yaml.read(tmp_path) == spec(run={"steps": 8})


def test_a_record_and_a_copy_that_are_both_damaged_are_an_error_in_one_line(tmp_path: Path) -> None:
    study_yaml.write(tmp_path, spec(), SOURCE, provenance={})
    for name in ("study.yaml", ".study.yaml.copy"):
        (tmp_path / name).write_bytes(b"a: [")
    with pytest.raises(EbftError, match="neither can its copy") as caught:
        study_yaml.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_finished_trial_with_a_damaged_row_is_not_run_again(existing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (existing / "results" / "trials" / "t0000.parquet").write_bytes(b"half")
    seen: list[Any] = []

    def session(folder: Path, study: Any, past: Any, *rest: Any) -> str:
        seen.append(set(past.trial_results))
        return ""

    monkeypatch.setattr(runner, "run_session", session)
    monkeypatch.setattr(runner, "_prepare", lambda study, console: {})
    console = quiet()
    runner.resume(existing, console=console)
    assert seen == [{"t0000"}]
    assert "t0000.parquet: is damaged, its copy is used" in console.file.getvalue()  # type: ignore[attr-defined]
    status.show(existing, console)
    assert console.file.getvalue().count("its copy is used") == 1, "it is repaired"  # type: ignore[attr-defined]


def test_a_study_that_cannot_be_written_is_one_line_at_once(tmp_path: Path) -> None:
    (tmp_path / "studies").write_text("a file where a folder should be")
    with pytest.raises(EbftError) as caught:
        start(tmp_path / "studies" / "s", spec())
    assert "cannot be" in str(caught.value)


def test_a_folder_without_record_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="is not a study"):
        study_yaml.read(tmp_path)


# --- starting and resuming -------------------------------------------------------------------------------------


@pytest.fixture
def existing(tmp_path: Path) -> Path:
    """A study that was started, with one of its two trials finished."""
    folder = tmp_path / "studies" / "s"
    folder.mkdir(parents=True)
    study_yaml.write(folder, spec(), SOURCE, provenance={})
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


def start(folder: Path, study: StudySpec, *, resume_existing: bool = False) -> runner.StudyResult:
    return runner.run(resolved(study), storage=folder.parent, console=quiet(), resume_existing=resume_existing)


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
    ended = start(existing, spec(), resume_existing=True)
    assert ended.exit_code == 0
    assert ended.reason == ""


def test_a_second_driver_is_refused(existing: Path) -> None:
    with (
        filelock.FileLock(existing / ".lock"),
        pytest.raises(ResultsError, match="another process is running this study"),
    ):
        runner.resume(existing, console=quiet())


def test_nothing_stays_behind_when_preparation_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(study: Any, console: Any) -> dict[str, Any]:
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

    def session(folder: Path, study: Any, past: Any, *rest: Any) -> str:
        left.append({"t0000", "t0001"} - set(past.trial_results))
        return ""

    monkeypatch.setattr(runner, "run_session", session)
    monkeypatch.setattr(runner, "_prepare", lambda study, console: {})
    runner.resume(existing, console=quiet(), retry_failed=True)
    assert left == [{"t0001"}]


def test_failed_trials_of_optuna_are_run_again_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Every configuration has its result, so that nothing but the table knows of something to do."""
    study = spec(search={"algorithm": "optuna", "num_configurations": 2, "sampler": "random"})
    folder = tmp_path / "studies" / "s"
    folder.mkdir(parents=True)
    study_yaml.write(folder, study, SOURCE, provenance={})
    search = OptunaSearch(study, journal.working_copy(storage_path(folder)), {})
    recorder = results.StudyRecorder(folder, study="s")
    while (trial := search.next()) is not None:
        row = {"trial_id": trial.trial_id, "status": "failed", "attempt": 1, "label": trial.label}
        recorder.trial(row | {"configuration": trial.configuration.label, "hyperparameters": flatten(trial.run)})
        search.ended(trial.trial_id, TrialResult("failed"))
    sessions = request.getfixturevalue("sessions")
    assert runner.resume(folder, console=quiet()).exit_code == 1
    assert sessions == []
    runner.resume(folder, console=quiet(), retry_failed=True)
    ((_, past),) = sessions
    assert past.trial_results == {}


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("", 0),
        ("Ctrl-C", 130),
        ("Ctrl-C (terminated)", 130),
        ("budget.max_hours is used up", 1),
        ("Ray's node process died", 1),
        ("process 1 on far has taken this study over", 1),
    ],
)
def test_exit_codes(tmp_path: Path, reason: str, code: int) -> None:
    assert runner.StudyResult(storage_path(tmp_path), {}, reason).exit_code == code


# --- the budget ------------------------------------------------------------------------------------------------


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The (study, history) of each session that a command would run."""
    seen: list[Any] = []

    def session(folder: Path, study: Any, past: Any, *rest: Any) -> str:
        seen.append((study, past))
        return ""

    monkeypatch.setattr(runner, "run_session", session)
    monkeypatch.setattr(runner, "_prepare", lambda study, console: {})
    return seen


def record_sessions(folder: Path, monkeypatch: pytest.MonkeyPatch, *sessions: tuple[float, ...]) -> None:
    """Write the events of sessions at these hours; the first of each is its start."""
    began, hour = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC), [0.0]
    monkeypatch.setattr("ebft_study.results.writer.now", lambda: began + datetime.timedelta(hours=hour[0]))
    recorder = results.StudyRecorder(folder, study="s")
    for moments in sessions:
        for index, hour[0] in enumerate(moments):
            recorder.event("retry" if index else "session", "something")
    monkeypatch.undo()


def test_hours_of_all_sessions_count_and_those_between_them_do_not(
    existing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert history.read(existing, "cfm_loss").session_seconds == 0
    record_sessions(existing, monkeypatch, (0.0, 0.5, 0.25), (10.0,), (20.0, 21.0))
    assert history.read(existing, "cfm_loss").session_seconds == pytest.approx(1.5 * 3600)


def test_each_session_may_set_concurrency_and_retries(existing: Path, request: pytest.FixtureRequest) -> None:
    sessions = request.getfixturevalue("sessions")
    runner.resume(existing, ["budget.max_concurrent_trials=1", "resources.max_failures=4"], console=quiet())
    start(existing, spec(resources={"max_failures": 2}), resume_existing=True)
    assert [(s.spec.budget.max_concurrent_trials, s.spec.resources.max_failures) for s, _ in sessions] == [
        (1, 4),
        (None, 2),
    ]
    assert study_yaml.read(existing).resources.max_failures == 2
    assert study_yaml.changes(existing) == [], "the study itself has recorded it"
    with pytest.raises(ConfigError, match=r"except for its budget and resources\.max_failures"):
        runner.resume(existing, ["resources.cpus_per_worker=2"], console=quiet())


def test_a_study_that_used_its_hours_is_continued_with_more_of_them_only(
    existing: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    study_yaml.change_session(existing, spec(budget={"max_hours": 1.0}))
    record_sessions(existing, monkeypatch, (0.0, 0.4), (10.0, 10.6))
    sessions = request.getfixturevalue("sessions")
    with pytest.raises(ConfigError, match="took 1 h 0 min so far, and 1 of its 2 trials"):
        runner.resume(existing, console=quiet())
    runner.resume(existing, ["budget.max_hours=3"], console=quiet())
    runner.resume(existing, console=quiet())
    start(existing, spec(budget={"max_hours": 4.0}), resume_existing=True)
    assert [study.spec.budget.max_hours for study, _ in sessions] == [3.0, 3.0, 4.0]
    assert study_yaml.read(existing).budget.max_hours == 4.0
    assert study_yaml.changes(existing) == [], "the study itself has recorded it"
    with pytest.raises(ResultsError, match="other settings"):
        start(existing, spec(run={"steps": 8}), resume_existing=True)


def test_a_resumed_study_takes_no_other_settings(existing: Path) -> None:
    with pytest.raises(ConfigError, match="'steps=8': a study keeps its settings"):
        runner.resume(existing, ["steps=8"], console=quiet())


def test_the_end_of_a_budget_says_what_to_do(tmp_path: Path) -> None:
    ended = runner.StudyResult(storage_path(tmp_path / "s"), {}, history.BUDGET_USED)
    assert ended.how_to_resume.endswith(f"raise it: ebft-study resume {tmp_path / 's'} budget.max_hours=HOURS")


# --- status ----------------------------------------------------------------------------------------------------


def test_status_notices_that_the_driver_is_gone(existing: Path) -> None:
    console = quiet()
    status.show(existing, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1 of 2 trials finished, 1 interrupted" in shown
    assert "not running; resume with" in shown


def test_status_of_a_running_study(existing: Path) -> None:
    console = quiet()
    with lock.hold(storage_path(existing), record=study_yaml.NAME):
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


@pytest.mark.parametrize("provenance", [{"data": {"qa": "ab"}}, {"data": ["qa"]}, ["data"]])
def test_a_damaged_provenance_is_refused_in_one_line(tmp_path: Path, provenance: Any) -> None:
    given = {"data": {"qa": {"fingerprint": "abcdefgh"}}}
    study_yaml.write(tmp_path, spec(), SOURCE, provenance=given)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "provenance": provenance}))
    with pytest.raises(ConfigError, match=r"provenance.*Restore it"):
        study_yaml.changed_inputs(tmp_path, given)


@pytest.mark.parametrize("damage", ["record", "file", "all", "none", "not ended"])
def test_a_damaged_best_checkpoint_of_an_ended_trial_is_named(tmp_path: Path, damage: str) -> None:
    status = "running" if damage == "not ended" else "finished"
    best = save(tmp_path / "train" / "t0-1" / "checkpoint_00000004", 4)
    row = {"trial_id": "t0", "status": status, "attempt": 1, "best_checkpoint": "train/t0-1/checkpoint_00000004"}
    results.StudyRecorder(tmp_path, study="s").trial(row | {"hyperparameters": flatten(RunConfig())})
    if damage == "record":
        record = best / checkpoint.RECORD
        record.write_text(record.read_text().replace('"step": 4', '"step": 5'))
    elif damage == "file":
        next(best.glob("*.safetensors")).unlink()
    elif damage != "none":
        for path in best.iterdir():
            path.unlink()
    named = [] if damage in ("none", "not ended") else [f"{best}: the best checkpoint of t0 is damaged. Restore it"]
    assert attempts.damaged(tmp_path) == named


def test_a_damaged_record_of_any_checkpoint_is_named(tmp_path: Path) -> None:
    """Also of a trial that has not ended: another checkpoint would be its best without a word."""
    folders = [attempts.folder(tmp_path, "t0000", 1) / attempts.checkpoint_name(step) for step in (2, 4)]
    for folder in folders:
        assert folder.local
        save(folder.local, int(folder.name[-1]))
    assert attempts.damaged(tmp_path) == []
    record = folders[0].local / checkpoint.RECORD  # type: ignore[operator]
    record.write_bytes(record.read_bytes().replace(b'"step": 2', b'"step": 3'))
    [problem] = attempts.damaged(tmp_path)
    assert problem.startswith(f"{folders[0]}: checkpoint.json is damaged")
    record.unlink()  # a checkpoint that was being written
    assert attempts.damaged(tmp_path) == []
