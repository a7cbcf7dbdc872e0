"""The catalog of a storage folder: what `load` returns for each study, in one DuckDB connection."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ebft_study
from ebft_study.errors import ResultsError
from ebft_study.results import TABLES, TrialRecorder, catalog, cell_value, compact, load
from ebft_study.storage import storage_path
from ebft_study.text import is_missing
from tests.synthetic_study import rewrite, write_study

EFFECTS = {(1.0, 0.0): (-0.02, -0.03), (0.0, 0.1): (0.1, 0.1), None: (-0.2, -0.01)}


def studies(folder: Path) -> Path:
    write_study(folder / "first", effects=EFFECTS, seeds=(0, 1), with_scores=True)
    write_study(folder / "second", effects=EFFECTS, seeds=(2,), statuses={(None, 2): "failed"})
    compact(folder / "second")
    return folder


def test_every_view_holds_what_load_returns_for_each_study(tmp_path: Path) -> None:
    connection = catalog(studies(tmp_path))
    for table in TABLES:
        rows = connection.sql(f"SELECT * FROM {table}").df()
        for name in ("first", "second"):
            expected = getattr(load(tmp_path / name), table)
            of_study = rows[rows["study"] == name].reset_index(drop=True)
            assert len(of_study) == len(expected)
            assert list(of_study.columns) == list(expected.columns)
            for column in expected:
                values = zip(of_study[column], expected[column], strict=True)
                assert all(_equal(value, other) for value, other in values), (table, column)


def _equal(value: object, other: object) -> bool:
    if is_missing(value) or is_missing(other):
        return is_missing(value) and is_missing(other)
    if isinstance(value, pd.Timestamp):
        return bool(value.tz_localize("UTC") == other)
    return bool(cell_value(value) == cell_value(other))


def test_one_query_finds_every_trial_with_a_setting_and_not_sft_which_does_not_read_it(tmp_path: Path) -> None:
    connection = catalog(studies(tmp_path))
    query = "SELECT study, trial_id FROM trials WHERE alpha = 1 AND method = 'ebft' ORDER BY ALL"
    assert connection.sql(query).fetchall() == [("first", "t000"), ("first", "t001"), ("second", "t000")]
    joined = "SELECT count(*) FROM trials JOIN evaluations USING (study, trial_id) WHERE study = 'first'"
    assert connection.sql(joined).fetchall() == [(len(load(tmp_path / "first").evaluations),)]


def test_the_documented_queries_answer_what_the_text_says(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "comparing.md").read_text()
    first, second = re.findall(r'db\.sql\("+(SELECT.*?)"+\)', page, flags=re.DOTALL)
    connection = catalog(studies(tmp_path))
    assert [row[:4] for row in connection.sql(first).order("ALL").fetchall()] == [
        ("first", "t000", 1.0, 0.0), ("first", "t001", 1.0, 0.0), ("second", "t000", 1.0, 0.0)
    ]  # fmt: skip
    results = load(tmp_path / "first")
    of_trials = results.trials[(results.trials["method"] == "ebft") & (results.trials["alpha"] == 1)]["trial_id"]
    rows = results.evaluations[results.evaluations["trial_id"].isin(of_trials)]
    last = rows[(rows["metric"] == "cfm_loss") & (rows["position"] == 8) & (rows["step"] == 40)]["value"]
    assert connection.sql(second).fetchall()[0] == ("first", 0.0, 2, pytest.approx(last.mean()))


def test_values_come_without_further_packages_and_with_the_types_of_the_schema(tmp_path: Path) -> None:
    connection = catalog(studies(tmp_path))
    (row,) = connection.sql("SELECT started_at, depths, seed, named_baseline FROM trials LIMIT 1").fetchall()
    assert str(row[0]) == "2026-03-01 09:00:00"
    assert row[1:] == ([0.25, 0.5, 0.75], 0, None)
    types = {name: kind for name, kind, *_ in connection.sql("DESCRIBE trials").fetchall()}
    assert (types["seed"], types["error"], types["depths"]) == ("BIGINT", "VARCHAR", "DOUBLE[]")


def test_of_a_step_reported_twice_the_highest_attempt_wins(tmp_path: Path) -> None:
    for attempt, value in ((1, 7.0), (0, 5.0)):
        recorder = TrialRecorder(tmp_path / "s", study="s", trial_id="t1", attempt=attempt)
        recorder.metrics(10, {"loss": value})
    assert catalog(tmp_path).sql("SELECT attempt, loss FROM metrics").fetchall() == [(1, 7.0)]


def test_a_copied_study_is_another_study(tmp_path: Path) -> None:
    shutil.copytree(studies(tmp_path) / "first", tmp_path / "copy")
    connection = catalog(tmp_path)
    counts = dict(connection.sql("SELECT study, count(*) FROM trials GROUP BY study").fetchall())
    assert counts == {"first": 6, "copy": 6, "second": 3}


def test_columns_that_a_study_lacks_are_null_and_its_own_are_kept(tmp_path: Path) -> None:
    (path,) = (studies(tmp_path) / "second" / "results" / "trials").glob("*.parquet")
    old = pq.read_table(path).drop_columns(["gamma"]).append_column("forgotten", pa.array([3.5] * 3))
    rewrite(path, old.replace_schema_metadata({"schema_version": "0", "table": "trials"}))
    found = (
        catalog(tmp_path)
        .sql("SELECT DISTINCT study, gamma IS NULL, forgotten FROM trials WHERE method = 'ebft' ORDER BY ALL")
        .fetchall()
    )
    assert found == [("first", False, None), ("second", True, 3.5)]


def test_damaged_files_are_named_and_the_rest_is_there(tmp_path: Path) -> None:
    damaged = studies(tmp_path) / "first" / "results" / "metrics" / "bad.parquet"
    damaged.write_text("not parquet")
    with pytest.warns(UserWarning, match="1 files could not be read"):
        connection = catalog(tmp_path)
    ((study, problem),) = connection.sql("FROM problems").fetchall()
    assert study == "first"
    assert "bad.parquet" in problem
    assert connection.sql("SELECT count(*) FROM trials").fetchall() == [(9,)]


def test_studies_in_a_store_are_catalogued_as_those_on_a_disk(tmp_path: Path) -> None:
    store = storage_path("memory://catalogued")
    for path in studies(tmp_path).rglob("*"):
        if path.is_file():
            target = store
            for part in path.relative_to(tmp_path).parts:
                target = target / part
            target.write_bytes(path.read_bytes())
    query = "SELECT study, trial_id, seed FROM trials ORDER BY ALL"
    assert catalog(store).sql(query).fetchall() == catalog(tmp_path).sql(query).fetchall()


def test_a_folder_without_studies_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "readme.txt").touch()
    with pytest.raises(ResultsError, match="holds no studies"):
        ebft_study.catalog(tmp_path)


def test_reading_results_imports_no_duckdb() -> None:
    program = "import sys, ebft_study.results.reader, ebft_study.api; assert 'duckdb' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)
