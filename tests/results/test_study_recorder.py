"""Pending trials share files: no row is lost, none is duplicated, whenever a driver is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ebft_study import config, results
from ebft_study.config import RunConfig
from ebft_study.results import StudyRecorder, study_recorder


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_recorder, "_ROWS_PER_FILE", 4)


def row(number: int, **columns: Any) -> dict[str, Any]:
    settings = config.flatten(RunConfig(seed=number))
    return {"trial_id": f"t{number}", "status": "pending", "attempt": 0, "hyperparameters": settings, **columns}


def files(folder: Path) -> list[str]:
    return sorted(path.name.split("~")[0] for path in (folder / "results" / "trials").glob("*.parquet"))


def plain(folder: Path) -> pd.DataFrame:
    """As anyone reads it without this package."""
    return pd.read_parquet(folder / "results" / "trials")


def test_pending_trials_share_files_and_leave_them_one_by_one(tmp_path: Path) -> None:
    recorder = StudyRecorder(tmp_path, study="s")
    recorder.trials(row(number) for number in range(10))
    assert files(tmp_path) == ["waiting"] * 3
    for number in range(10):
        recorder.trial({"trial_id": f"t{number}", "status": "running", "attempt": 1})
        table = plain(tmp_path)
        assert sorted(table["trial_id"]) == [f"t{n}" for n in range(10)]  # each once, for every reader
        assert list(table.set_index("trial_id").loc[[f"t{n}" for n in range(10)], "seed"]) == list(range(10))
        assert (table["status"] == "running").sum() == number + 1
    assert files(tmp_path) == sorted(f"t{number}.parquet" for number in range(10))


def test_the_next_driver_continues_the_shared_files_of_the_last_one(tmp_path: Path) -> None:
    StudyRecorder(tmp_path, study="s").trials(row(number, label=f"label {number}") for number in range(6))
    recorder = StudyRecorder(tmp_path, study="s")
    recorder.trial({"trial_id": "t0", "status": "running", "attempt": 1})
    recorder.trials([{"trial_id": f"t{number}", "status": "interrupted", "attempt": 0} for number in range(5)])
    table = results.read_table(tmp_path, "trials").set_index("trial_id")
    assert list(table["status"]) == ["interrupted"] * 5 + ["pending"]
    assert list(table["label"]) == [f"label {number}" for number in range(6)]
    assert len(plain(tmp_path)) == 6
    assert files(tmp_path).count("waiting") == 2


def test_a_crash_between_its_own_file_and_the_shared_one_leaves_the_newer_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = StudyRecorder(tmp_path, study="s")
    recorder.trials(row(number) for number in range(3))
    with monkeypatch.context() as crash:
        crash.setattr(study_recorder.PendingRows, "remove", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            recorder.trial({"trial_id": "t1", "status": "running", "attempt": 1})
    table = results.read_table(tmp_path, "trials").set_index("trial_id")
    assert list(table["status"]) == ["pending", "running", "pending"]
    StudyRecorder(tmp_path, study="s").trials([row(0)])
    table = results.read_table(tmp_path, "trials").set_index("trial_id")
    assert list(table["status"]) == ["pending", "running", "pending"]
    assert sorted(plain(tmp_path)["trial_id"]) == ["t0", "t1", "t2"]


def test_a_damaged_shared_file_stays_and_is_named(tmp_path: Path) -> None:
    StudyRecorder(tmp_path, study="s").trials([row(0)])
    (shared,) = (tmp_path / "results" / "trials").glob("*.parquet")
    shared.write_bytes(shared.read_bytes()[:-20])
    (shared.parent / f".{shared.name}.copy").unlink()
    StudyRecorder(tmp_path, study="s").trials([row(0), row(1)])
    problems: list[str] = []
    table = results.read_table(tmp_path, "trials", problems)
    assert sorted(table["trial_id"]) == ["t0", "t1"]
    assert len(problems) == 1
    assert shared.name in problems[0]


def test_of_a_damaged_shared_file_the_copy_is_read(tmp_path: Path) -> None:
    StudyRecorder(tmp_path, study="s").trials([row(0), row(1)])
    (shared,) = (tmp_path / "results" / "trials").glob("*.parquet")
    shared.write_bytes(shared.read_bytes()[:-20])
    problems: list[str] = []
    assert sorted(results.read_table(tmp_path, "trials", problems)["trial_id"]) == ["t0", "t1"]
    assert len(problems) == 1
    recorder = StudyRecorder(tmp_path, study="s")
    recorder.trial({"trial_id": "t0", "status": "running", "attempt": 0})
    assert list(results.read_table(tmp_path, "trials")["status"]) == ["running", "pending"]


def test_a_setting_that_a_method_does_not_read_has_no_value(tmp_path: Path) -> None:
    """In the files themselves, for those who read them with pandas alone."""
    recorder = StudyRecorder(tmp_path, study="s")
    runs = {"ebft": RunConfig(), "sft": RunConfig(method="sft"), "rlvr": RunConfig(method="rlvr")}
    for method, run in runs.items():
        recorder.trial({"trial_id": method, "status": "pending", "attempt": 0, "hyperparameters": config.flatten(run)})
    rows = pd.read_parquet(tmp_path / "results" / "trials").set_index("trial_id")
    assert rows["alpha"].notna().to_dict() == {"ebft": True, "sft": False, "rlvr": False}
    assert rows["n_samples"].notna().to_dict() == {"ebft": True, "sft": False, "rlvr": True}
    assert rows["learning_rate"].notna().all()


def test_what_earlier_versions_recorded_of_them_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(config, "unread_settings", lambda method: frozenset())
        recorder = StudyRecorder(tmp_path, study="s")
        for method in ("ebft", "sft"):
            run = RunConfig(method=method)
            recorder.trial(
                {"trial_id": method, "status": "pending", "attempt": 0, "hyperparameters": config.flatten(run)}
            )
    assert pd.read_parquet(tmp_path / "results" / "trials")["alpha"].notna().all()
    rows = results.read_table(tmp_path, "trials").set_index("trial_id")
    assert rows["alpha"].notna().to_dict() == {"ebft": True, "sft": False}
    assert rows.loc["ebft", "alpha"] == 1.0
    assert rows["learning_rate"].notna().all()


def test_files_that_differ_from_their_copies_are_written_again(tmp_path: Path) -> None:
    recorder = StudyRecorder(tmp_path, study="s")
    recorder.trials([row(1), row(2), row(3)])
    recorder.trial({"trial_id": "t1", "status": "finished"})
    recorder.trial({"trial_id": "t2", "status": "running"})
    folder = tmp_path / "results" / "trials"
    older, (shared,) = (folder / "t1.parquet").read_bytes(), folder.glob("waiting~*.parquet")
    recorder.trial({"trial_id": "t1", "steps_done": 4})
    before = results.read_table(tmp_path, "trials")
    study_recorder.repair(tmp_path)
    (folder / "t1.parquet").write_bytes(older)  # killed between the copy and the file
    (folder / ".t2.parquet.copy").write_bytes(b"damaged")
    shared.write_bytes(b"damaged")
    study_recorder.repair(tmp_path)
    problems: list[str] = []
    pd.testing.assert_frame_equal(results.read_table(tmp_path, "trials", problems), before)
    assert not problems
    assert plain(tmp_path).set_index("trial_id").loc["t1", "steps_done"] == 4
    (folder / "t2.parquet").write_bytes(b"damaged")
    (folder / ".t2.parquet.copy").write_bytes(b"damaged, too")
    study_recorder.repair(tmp_path)
    assert (folder / "t2.parquet").read_bytes() == b"damaged", "what cannot be repaired stays for someone to look at"
