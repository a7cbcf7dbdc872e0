"""Duplicated files: damage to either of the two loses nothing."""

from __future__ import annotations

import datetime
import random
from pathlib import Path

import pandas as pd
import pytest

from ebft_study import config
from ebft_study.errors import StorageError
from ebft_study.results import StudyRecorder, TrialRecorder, compact, copies, load, read_table, reader, writer
from ebft_study.storage import storage_path


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study with a finished trial and one that runs."""
    (tmp_path / "study.yaml").write_text("question: q\n")
    recorder = StudyRecorder(tmp_path, study="s")
    for number, status in enumerate(("finished", "running")):
        settings = config.flatten(config.RunConfig(seed=number))
        row = {"trial_id": f"t{number}", "attempt": 1, "status": status, "label": "x", "hyperparameters": settings}
        recorder.trial({**row, "final_cfm_loss": 1.5})
    return tmp_path


def file_of(study: Path) -> Path:
    return study / "results" / "trials" / "t0.parquet"


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all"])
def test_a_damaged_row_is_read_from_its_copy_and_named(study: Path, content: bytes) -> None:
    before = read_table(study, "trials")
    file_of(study).write_bytes(content)
    loaded = load(study)
    pd.testing.assert_frame_equal(loaded.trials, before)
    (problem,) = loaded.problems
    assert problem == f"{file_of(study)}: is damaged, its copy is used"


def test_a_row_whose_file_is_gone_is_read_from_its_copy(study: Path) -> None:
    before = read_table(study, "trials")
    file_of(study).unlink()
    pd.testing.assert_frame_equal(read_table(study, "trials"), before)


def test_no_flipped_or_missing_bytes_change_a_trial_unnoticed(study: Path) -> None:
    """Every result is the row as it was written, whichever byte is hit."""
    whole, generator = file_of(study).read_bytes(), random.Random(0)
    before = read_table(study, "trials").iloc[0]
    watched = ["trial_id", "status", "attempt", "seed", "alpha", "final_cfm_loss", "label"]
    hits = generator.sample(range(len(whole)), 50)
    cuts = generator.sample(range(len(whole)), 10)
    for damaged in [_flipped(whole, at, generator) for at in hits] + [whole[:at] for at in cuts]:
        file_of(study).write_bytes(damaged)
        row = reader.read_trial(storage_path(file_of(study)), [])
        assert row is not None
        assert row.to_pylist()[0].items() >= before[watched].to_dict().items()


def test_a_damaged_column_name_is_damage(study: Path) -> None:
    file_of(study).write_bytes(file_of(study).read_bytes().replace(b"final_cfm_loss", b"\xecinal_cfm_loss"))
    row = reader.read_trial(storage_path(file_of(study)), [])
    assert row is not None
    assert row.to_pylist()[0]["final_cfm_loss"] == 1.5


def _flipped(content: bytes, at: int, generator: random.Random) -> bytes:
    return content[:at] + bytes([content[at] ^ (1 << generator.randrange(8))]) + content[at + 1 :]


def test_the_next_change_of_a_damaged_row_repairs_it(study: Path) -> None:
    file_of(study).write_bytes(b"half")
    StudyRecorder(study, study="s").trial({"trial_id": "t0", "status": "failed"})
    row = read_table(study, "trials").iloc[0]
    assert (row["status"], row["seed"], row["final_cfm_loss"]) == ("failed", 0, 1.5)
    assert load(study).problems == []


def test_a_damaged_copy_is_not_used(study: Path) -> None:
    copies.copy_of(storage_path(file_of(study))).write_bytes(b"x" * 100)
    assert copies.read_copy(storage_path(file_of(study))) is None
    assert len(read_table(study, "trials")) == 2
    file_of(study).write_bytes(b"half")
    loaded = load(study)
    assert loaded.trials["trial_id"].tolist() == ["t1"]
    assert "cannot be read as Parquet" in loaded.problems[0]


def test_damage_to_a_copy_alone_is_named_and_the_next_change_repairs_it(study: Path) -> None:
    copy = copies.copy_of(storage_path(file_of(study)))
    copy.write_bytes(copy.read_bytes()[:-1])
    loaded = load(study)
    assert len(loaded.trials) == 2
    assert loaded.problems == [f"{file_of(study)}: its copy is damaged"]
    StudyRecorder(study, study="s").trial({"trial_id": "t0", "status": "failed"})
    assert load(study).problems == []


def test_copies_are_invisible_to_others(study: Path) -> None:
    assert len(pd.read_parquet(study / "results" / "trials")) == 2


# --- clocks ----------------------------------------------------------------------------------------------------


def test_a_clock_that_is_set_back_loses_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour back between two reports of a step, two states of a trial, and two sessions."""
    (tmp_path / "study.yaml").write_text("question: q\n")
    recorder = TrialRecorder(tmp_path, study="s", trial_id="t0", attempt=1)
    settings = config.flatten(config.RunConfig())
    row = {"trial_id": "t0", "attempt": 1, "status": "running", "hyperparameters": settings}
    StudyRecorder(tmp_path, study="s").trial(row)
    recorder.metrics(5, {"loss": 1.0})
    early = writer.now() - datetime.timedelta(hours=1)
    monkeypatch.setattr(writer, "now", lambda: early)
    recorder.metrics(5, {"loss": 2.0})
    first = read_table(tmp_path, "trials").iloc[0]["updated_at"]
    StudyRecorder(tmp_path, study="s").trial({"trial_id": "t0", "status": "finished"})
    TrialRecorder(tmp_path, study="s", trial_id="t0", attempt=2).metrics(5, {"reward": 3.0})
    assert read_table(tmp_path, "metrics")[["step", "loss", "reward"]].to_numpy().tolist() == [[5, 2.0, 3.0]]
    assert read_table(tmp_path, "trials").iloc[0]["updated_at"] > first
    compact(tmp_path)
    assert read_table(tmp_path, "metrics")["loss"].tolist() == [2.0]


# --- the tables in a store -------------------------------------------------------------------------------------


def test_tables_in_a_store_are_written_compacted_and_read_like_those_on_a_disk(tmp_path: Path, s3_query: str) -> None:
    folders = [storage_path(tmp_path).subfolder("disk"), storage_path(f"s3://studies/tables?{s3_query}")]
    for folder in folders:
        (folder / "study.yaml").write_bytes(b"question: q\n")
        study = StudyRecorder(folder, study="s")
        for trial_id in ("t0", "t1"):
            settings = config.flatten(config.RunConfig())
            row = {"trial_id": trial_id, "attempt": 1, "hyperparameters": settings}
            study.trial({**row, "status": "running"})
            recorder = TrialRecorder(folder, study="s", trial_id=trial_id, attempt=1)
            for step in range(3):
                recorder.metrics(step, {"loss": step + 0.5})
            recorder.event("started", "it started")
        study.trial({"trial_id": "t0", "status": "finished"})
    moments = ["written_at", "updated_at", "time", "event_id"]
    for after in (False, True):
        if after:
            for folder in folders:
                compact(folder)
        disk, store = (load(folder) for folder in folders)
        assert disk.problems == store.problems == []
        for table in ("trials", "metrics", "events"):
            ours, theirs = (getattr(loaded, table).drop(columns=moments, errors="ignore") for loaded in (disk, store))
            pd.testing.assert_frame_equal(ours, theirs)
    names = [name for name in (folders[1] / "results" / "metrics").names() if not name.startswith(".")]
    assert [name.split("-")[0] for name in names] == ["compacted", "t1", "t1", "t1"]
    assert len(_with_pandas(folders[1], s3_query)) == 6
    assert load(str(folders[1])).spec == {"question": "q"}


def _with_pandas(folder: object, query: str) -> pd.DataFrame:
    from pyarrow.fs import S3FileSystem

    options = dict(pair.split("=") for pair in query.split("&"))
    path = str(folder).removeprefix("s3://").partition("?")[0]
    return pd.read_parquet(f"{path}/results/metrics", filesystem=S3FileSystem(**options))


@pytest.mark.parametrize("kept", [0, 5, 12, 20])
def test_a_mapping_that_is_cut_short_is_damaged_even_where_it_is_one(tmp_path: Path, kept: int) -> None:
    """Half a file may be a whole mapping; nobody edits so, and what is gone would silently be a default."""
    path, content = storage_path(tmp_path / "study.yaml"), b"question: q\nseeds: [1, 2]\n"
    copies.write(path, content)
    path.write_bytes(content[:kept])
    record, problem = copies.read_mapping(path)
    assert record == {"question": "q", "seeds": [1, 2]}
    assert problem == f"{path}: is cut short; its copy is used"
    copies.repair(path)
    assert path.read_bytes() == content
    path.write_bytes(content + b"steps: 4\n")
    assert copies.read_mapping(path) == ({"question": "q", "seeds": [1, 2], "steps": 4}, ""), "an edit"


def test_a_file_that_vanishes_with_its_copy_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot be repaired"):
        copies.repair(storage_path(tmp_path / "study.yaml"))
