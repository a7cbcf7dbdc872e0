"""Writing: atomic, never colliding, refusing what the schema does not hold."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow.parquet as pq
import pytest

from ebft_study import config
from ebft_study.errors import ResultsError, StorageError
from ebft_study.results import StudyRecorder, TrialRecorder, compact, load, read_table, reader, writer


@pytest.fixture
def recorder(tmp_path: Path) -> TrialRecorder:
    return TrialRecorder(tmp_path, study="s", trial_id="t1", attempt=0)


def test_rows_come_back_as_written(tmp_path: Path, recorder: TrialRecorder) -> None:
    recorder.metrics(10, {"ce_loss": 2.5, "reward": 1.25})
    recorder.evaluations(
        10,
        [
            {
                "benchmark": "heldout",
                "metric": "cfm_loss",
                "position": 8,
                "value": 2.0,
                "standard_error": 0.1,
                "count": 9,
            },
            {"benchmark": "heldout", "metric": "ce_loss", "position": None, "value": 3.0, "count": 100},
        ],
    )
    lists = {"sequences": [4, 7], "counts": [3, 6], "values": [1.5, 2.25]}
    recorder.scores(10, [{"benchmark": "heldout", "metric": "cfm_loss", "position": 8, **lists}])
    recorder.samples(10, [{"sequence": 4, "anchor": 8, "sample": 0, "context": "def ", "completion": "f():"}])
    recorder.event("started", "attempt 0 started", device="cpu")

    metrics = read_table(tmp_path, "metrics").iloc[0]
    assert (metrics["study"], metrics["trial_id"], metrics["attempt"], metrics["step"]) == ("s", "t1", 0, 10)
    assert (metrics["ce_loss"], metrics["reward"]) == (2.5, 1.25)
    assert pd.isna(metrics["loss"])
    evaluations = read_table(tmp_path, "evaluations").set_index("metric")
    assert evaluations.loc["cfm_loss", "position"] == 8
    assert pd.isna(evaluations.loc["ce_loss", "position"])
    scores = read_table(tmp_path, "scores").iloc[0]
    assert {name: scores[name].tolist() for name in lists} == lists
    assert scores["values"].dtype == "float32"
    assert read_table(tmp_path, "samples").iloc[0]["completion"] == "f():"
    event = read_table(tmp_path, "events").iloc[0]
    assert event["details"] == '{"device": "cpu"}'
    assert event["time"].tzinfo is not None


def test_values_may_be_numbers_of_any_library(tmp_path: Path, recorder: TrialRecorder) -> None:
    import numpy as np

    recorder.metrics(np.int64(3), {"loss": np.float32(0.5), "reward": 2})
    assert read_table(tmp_path, "metrics").loc[0, ["step", "loss", "reward"]].tolist() == [3, 0.5, 2.0]


def test_non_finite_metrics_are_recorded_not_lost(tmp_path: Path, recorder: TrialRecorder) -> None:
    recorder.metrics(1, {"loss": float("nan"), "grad_norm": float("inf")})
    (file,) = (tmp_path / "results" / "metrics").glob("*.parquet")
    row = pq.read_table(file).to_pylist()[0]
    assert row["loss"] != row["loss"]
    assert row["grad_norm"] == float("inf")
    assert row["reward"] is None


def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path, recorder: TrialRecorder) -> None:
    with pytest.raises(ResultsError, match=r"'rewards'.*Did you mean 'reward'"):
        recorder.metrics(0, {"rewards": 1.0})
    with pytest.raises(ResultsError, match="Did you mean 'entropy'"):
        recorder.evaluations(0, [{"benchmark": "heldout", "metric": "entrophy", "value": 1.0, "count": 1}])
    with pytest.raises(ResultsError, match="Did you mean 'completion'"):
        recorder.samples(0, [{"sequence": 0, "anchor": 0, "sample": 0, "completions": "x"}])
    with pytest.raises(ResultsError, match="lacks count"):
        recorder.evaluations(0, [{"benchmark": "heldout", "metric": "entropy", "value": 1.0}])
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_value_of_the_wrong_type_is_refused_in_one_line(recorder: TrialRecorder) -> None:
    with pytest.raises(ResultsError, match=r"samples\.context takes string, but got 5") as caught:
        recorder.samples(0, [{"sequence": 0, "anchor": 0, "sample": 0, "context": 5}])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("trial_id", ["", ".hidden", "_ignored", "a/b", "alpha=1", "../up"])
def test_a_trial_id_that_is_no_plain_file_name_is_refused(tmp_path: Path, trial_id: str) -> None:
    with pytest.raises(ResultsError, match="cannot be a file name"):
        TrialRecorder(tmp_path, study="s", trial_id=trial_id, attempt=0)


def test_two_recorders_of_the_same_attempt_never_overwrite_each_other(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        TrialRecorder(tmp_path, study="s", trial_id="t1", attempt=0).metrics(5, {"loss": value})
    assert len(list((tmp_path / "results" / "metrics").glob("*.parquet"))) == 2
    assert read_table(tmp_path, "metrics")["loss"].tolist() == [2.0], "the later report of one step is kept"


def test_a_trial_is_one_file_replaced_when_its_state_changes(tmp_path: Path) -> None:
    study = StudyRecorder(tmp_path, study="s")
    settings = config.flatten(config.RunConfig())
    study.trial({"trial_id": "t1", "attempt": 0, "status": "pending", "hyperparameters": settings})
    study.trial({"trial_id": "t1", "status": "running"})
    study.trial({"trial_id": "t1", "status": "finished", "steps_done": 100, "started_at": writer.now()})
    names = sorted(p.name for p in (tmp_path / "results" / "trials").iterdir())
    assert names == [".t1.parquet.copy", "t1.parquet"]
    row = pd.read_parquet(tmp_path / "results" / "trials").iloc[0]
    assert (row["status"], row["steps_done"], row["alpha"]) == ("finished", 100, 1.0)
    assert list(row["depths"]) == [0.25, 0.5, 0.75]


def test_a_new_driver_continues_the_rows_of_the_one_before(tmp_path: Path) -> None:
    settings = config.flatten(config.RunConfig(seed=7))
    first = StudyRecorder(tmp_path, study="s")
    first.trial({"trial_id": "t1", "attempt": 0, "status": "running", "hyperparameters": settings})
    StudyRecorder(tmp_path, study="s").trial({"trial_id": "t1", "attempt": 1, "status": "finished"})
    row = read_table(tmp_path, "trials").iloc[0]
    assert (row["seed"], row["attempt"], row["status"]) == (7, 1, "finished")


def test_trials_refuse_unknown_columns_settings_and_states(tmp_path: Path) -> None:
    study = StudyRecorder(tmp_path, study="s")
    row = {"trial_id": "t1", "attempt": 0, "status": "pending"}
    with pytest.raises(ResultsError, match="Did you mean 'stop_reason'"):
        study.trial({**row, "stop_reasons": "x"})
    with pytest.raises(
        ResultsError, match=r"'baseline'.*Did you mean 'named_baseline'.*Settings go under 'hyperparameters'"
    ):
        study.trial({**row, "baseline": "sft"})
    with pytest.raises(ResultsError, match="Did you mean 'alpha'"):
        study.trial({**row, "hyperparameters": {"alpa": 1.0}})
    with pytest.raises(ResultsError, match="unknown trial status 'done'"):
        study.trial({**row, "status": "done"})
    with pytest.raises(ResultsError, match="lacks attempt"):
        study.trial({"trial_id": "t1", "status": "pending"})


def test_plain_pandas_and_duckdb_read_the_folders_without_this_package(tmp_path: Path) -> None:
    study = StudyRecorder(tmp_path, study="s")
    for number in range(3):
        settings = config.flatten(config.RunConfig(seed=number))
        trial = f"t{number}"
        study.trial({"trial_id": trial, "attempt": 0, "status": "running", "hyperparameters": settings})
        recorder = TrialRecorder(tmp_path, study="s", trial_id=trial, attempt=0)
        for step in (0, 10):
            recorder.metrics(step, {"cfm_loss": 2.0 + number + step / 100})
    # What a killed writer leaves behind is invisible.
    (tmp_path / "results" / "metrics" / ".t9-a000-000000-deadbeef.12345678.tmp").write_bytes(b"half a file")

    frame = pd.read_parquet(tmp_path / "results" / "metrics")
    assert len(frame) == 6
    metrics, trials = (tmp_path / "results" / table / "*.parquet" for table in ("metrics", "trials"))
    rows = duckdb.sql(
        f"SELECT seed, max(cfm_loss) FROM read_parquet('{metrics}') JOIN read_parquet('{trials}') USING (trial_id) "
        "GROUP BY seed ORDER BY seed"
    ).fetchall()
    assert rows == [(0, 2.1), (1, 3.1), (2, 4.1)]


_WRITE_UNTIL_KILLED = """
import sys
from pathlib import Path
from ebft_study.results import TrialRecorder
recorder = TrialRecorder(Path(sys.argv[1]), study="s", trial_id="t1", attempt=0)
for step in range(1_000_000):
    recorder.metrics(step, {"loss": float(step)})
    print(step, flush=True)
"""


def test_killing_the_writer_at_any_moment_loses_no_row_that_was_reported(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITE_UNTIL_KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(20):
        process.stdout.readline()
    time.sleep(0.03)
    os.kill(process.pid, signal.SIGKILL)
    reported = 20 + len(process.stdout.readlines())
    process.stdout.close()
    process.wait()
    results = load(tmp_path)
    steps = results.metrics["step"].tolist()
    assert steps == list(range(len(steps)))
    assert reported <= len(steps) <= reported + 1
    assert len(results.problems) == 1, "only study.yaml, which this test does not write"


def test_merging_makes_no_folder_of_a_study_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder may vanish while the table of trials is read."""
    StudyRecorder(tmp_path / "s", study="s").trial({"trial_id": "t0", "status": "finished", "attempt": 1})
    read = reader.read_table

    def then_it_is_gone(*arguments: Any) -> pd.DataFrame:
        rows = read(*arguments)
        shutil.rmtree(tmp_path / "s")
        return rows

    monkeypatch.setattr(reader, "read_table", then_it_is_gone)
    with pytest.raises(StorageError, match="does not exist"):
        compact(tmp_path / "s")
    assert not (tmp_path / "s").exists()
