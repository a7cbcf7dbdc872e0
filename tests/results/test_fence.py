"""A driver that slept while another finished its study, and a study whose folder is gone."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ebft_study import results
from ebft_study.config import CheckpointConfig
from ebft_study.errors import LockLostError, StorageError
from ebft_study.results import Fence, StudyRecorder, TrialRecorder, fence
from ebft_study.storage import StoragePath, storage_path
from ebft_study.study.folder import attempts
from ebft_study.study.spec.study_spec import ObjectiveSpec
from ebft_study.training import checkpoint

OBJECTIVE = ObjectiveSpec()


class Driver:
    """What one driver of a study and its trials write."""

    def __init__(self, folder: StoragePath, generation: int) -> None:
        (folder / fence.CLAIMS / fence.claim_name(generation, "0" * 16)).write_bytes(b"{}")
        self.folder, self.fence = folder, Fence(folder, generation)
        self.study = StudyRecorder(folder, study="s", fence=self.fence)

    def begin(self, trial_id: str) -> int:
        return attempts.begin(self.folder, trial_id, generation=self.fence.generation)

    def measure(self, trial_id: str, attempt: int, step: int, loss: float) -> None:
        trial = TrialRecorder(self.folder, study="s", trial_id=trial_id, attempt=attempt, fence=self.fence)
        trial.metrics(step, {"cfm_loss": loss})
        self.save(trial_id, attempt, step, loss)

    def save(self, trial_id: str, attempt: int, step: int, loss: float) -> None:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(Path(folder), {"step": step}, step=step, metrics={"cfm_loss": loss})
            path = attempts.folder(self.folder, trial_id, attempt) / attempts.checkpoint_name(step)
            path.upload(Path(folder), last=checkpoint.RECORD)

    def ended(self, trial_id: str, attempt: int, status: str, **columns: Any) -> None:
        self.study.trial({"trial_id": trial_id, "status": status, "attempt": attempt, **columns})


def rows(trial_ids: str, status: str = "pending", **columns: Any) -> list[dict[str, Any]]:
    return [{"trial_id": name, "status": status, "attempt": 0, **columns} for name in trial_ids]


@pytest.fixture
def folder(s3_query: str, request: pytest.FixtureRequest) -> StoragePath:
    return storage_path(f"s3://studies/{request.node.name}?{s3_query}")


def taken_over(folder: StoragePath) -> Driver:
    """A study that its second driver has finished while the first one slept; returns the first."""
    first = Driver(folder, 1)
    first.study.trials(rows("abcd", label="kept"))
    first.ended("a", 0, "running")
    first.measure("a", first.begin("a"), 1, 9.0)
    second = Driver(folder, 2)
    second.study.trials(rows("abc"))
    for trial_id in "ab":
        attempt = second.begin(trial_id)
        second.measure(trial_id, attempt, 1, 2.0)
        second.measure(trial_id, attempt, 2, 1.0)
        second.ended(trial_id, attempt, "finished", final_cfm_loss=1.0)
    second.study.trials(rows("cd", "skipped"))
    results.compact(folder)
    return first


def tables(folder: StoragePath) -> dict[str, pd.DataFrame]:
    return {table: results.read_table(folder, table) for table in ("trials", "metrics")}


def test_what_an_older_driver_still_writes_changes_no_result(folder: StoragePath) -> None:
    """It falls asleep between looking at the lock and writing."""
    first = taken_over(folder)
    before = tables(folder)
    assert before["trials"]["status"].tolist() == ["finished", "finished", "skipped", "skipped"]
    assert before["trials"]["label"].tolist() == ["kept"] * 4
    first.fence._seen = math.inf
    first.measure("a", 1, 1, 8.0)
    first.measure("a", 1, 2, 8.0)
    again = first.begin("a")
    first.measure("a", again, 1, 7.0)
    first.save("a", again, 3, 0.0)
    attempts.prune(folder, "a", CheckpointConfig(keep_checkpoints=1), OBJECTIVE, until=again)
    first.ended("b", 0, "running")
    first.ended("b", first.begin("b"), "failed", error="its node slept")
    first.study.trials([*rows("a", "interrupted"), *rows("cd")])
    first.ended("c", 1, "finished", final_cfm_loss=0.0)
    results.compact(folder)
    after = tables(folder)
    for table in before:
        pd.testing.assert_frame_equal(before[table], after[table])
    kept = attempts.folder(folder, "a", fence.first_attempt(2))
    assert checkpoint.step_of(kept / attempts.checkpoint_name(2)) == 2, "its checkpoints are removed by none but it"


def test_an_older_driver_and_its_trials_notice_before_they_write(
    folder: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = taken_over(folder)
    late = TrialRecorder(folder, study="s", trial_id="a", attempt=1, fence=Fence(folder, 1))
    before = {name: (folder / "results" / name).names() for name in (folder / "results").names()}
    monkeypatch.setattr(fence, "now", lambda: 1e9)  # a night has passed
    for write in (
        lambda: first.study.trials(rows("a", "interrupted")),
        lambda: first.ended("a", 1, "failed"),
        lambda: first.study.event("interrupted", "the driver ended"),
        lambda: late.metrics(3, {"cfm_loss": 0.0}),
    ):
        with pytest.raises(LockLostError, match="another process has taken this study over"):
            write()
    assert {name: (folder / "results" / name).names() for name in (folder / "results").names()} == before


def test_the_store_is_asked_again_only_after_some_seconds(folder: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, moment = Driver(folder, 1), 1e6
    monkeypatch.setattr(fence, "now", lambda: moment)
    driver.fence.check()
    (folder / fence.CLAIMS).delete()
    moment += 10
    driver.fence.check()
    moment += 20
    with pytest.raises(LockLostError, match="the lock of this study is gone"):
        driver.fence.check()


def test_attempts_of_earlier_versions_are_continued(folder: StoragePath) -> None:
    for attempt in (1, 2):
        (attempts.folder(folder, "a", attempt) / ".begun").write_bytes(b"")
    assert attempts.begin(folder, "a", generation=1) == 3
    assert attempts.begin(folder, "a", generation=3) == 2001
    assert attempts.begin(folder, "a", generation=3) == 2002
    assert attempts.begin(folder, "a", generation=2) == 1001
    assert attempts.begin(folder, "a", generation=1) == 4


def test_states_of_earlier_versions_are_continued(folder: StoragePath) -> None:
    old = StudyRecorder(folder, study="s")
    old.trials(rows("ab", label="old"))
    old.trial({"trial_id": "a", "status": "interrupted", "attempt": 3})
    new = Driver(folder, 1)
    new.study.trial({"trial_id": "a", "status": "running"})
    new.study.trial({"trial_id": "b", "status": "running"})
    frame = results.read_table(folder, "trials")
    assert frame[["label", "status", "attempt"]].values.tolist() == [["old", "running", 3], ["old", "running", 0]]
    assert [name for name in (folder / "results" / "trials").names() if name[0] != "."] == [
        "a~g1.parquet",
        "b~g1.parquet",
    ]


def test_a_folder_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    study = tmp_path / "studies" / "s"
    study.mkdir(parents=True)
    driver = StudyRecorder(study, study="s")
    trial, other = (TrialRecorder(study, study="s", trial_id="a", attempt=attempt) for attempt in (1, 2))
    driver.trials(rows("ab"))
    trial.metrics(1, {"loss": 1.0})
    study.rename(tmp_path / "unmounted")
    for write in (
        lambda: driver.trials(rows("a", "interrupted")),
        lambda: driver.trial({"trial_id": "a", "status": "failed"}),
        lambda: driver.event("interrupted", "the driver ended"),
        lambda: trial.metrics(2, {"loss": 1.0}),
        lambda: attempts.begin(study, "a"),
        lambda: (storage_path(study) / "report.html").write_bytes(b""),
    ):
        with pytest.raises(StorageError, match=str(study)) as caught:
            write()
        assert "\n" not in str(caught.value)
    assert list((tmp_path / "studies").iterdir()) == []
    study.mkdir()  # the mount point, or a study of the same name
    with pytest.raises(LockLostError, match="is gone"):
        other.metrics(2, {"loss": 1.0})
    assert list(study.iterdir()) == []
