"""Bundles: what is in them, that they repeat, and that a changed one is found out."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

import ebft_study as ebft
from ebft_study.cli import app
from ebft_study.errors import ResultsError
from ebft_study.report import bundle as module
from ebft_study.report.bundle import first_difference
from ebft_study.results import TABLES, archive, compact, read_table
from ebft_study.results.writer import TrialRecorder, as_parquet
from tests.synthetic_study import EFFECTS, LEVELS, of_method, write_benchmark, write_spec, write_study

SECRET = "s3cr3tValue"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    effects = {name: EFFECTS[name] for name in ("SFT", "EBFT")}
    folder = write_study(tmp_path_factory.mktemp("bundle") / "mini", effects=effects, settings=of_method, seeds=(0, 1))
    write_benchmark(folder, LEVELS)
    recorder = TrialRecorder(folder, study=folder.name, trial_id="t000", attempt=0)
    recorder.event("failed", f"cannot open https://anna:{SECRET}@host/x", HF_TOKEN=SECRET)
    (folder / "train" / "t000").mkdir(parents=True)
    (folder / "train" / "t000" / "weights.safetensors").write_bytes(b"weights")
    notebook = {"cells": [{"cell_type": "code", "source": ["1"], "execution_count": 1, "outputs": []}], "nbformat": 4}
    (folder / "results.ipynb").write_text(json.dumps(notebook))
    return folder


@pytest.fixture(scope="module")
def whole(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ebft.bundle(study, tmp_path_factory.mktemp("whole") / "mini.zip")


@pytest.fixture
def made_once(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made of the results again, where they are not changed: it takes seconds."""
    _, files = archive.unpack(whole)
    made = {n: c for n, c in files.items() if n == "report.html" or n.startswith(("tables/", "figures/"))}
    monkeypatch.setattr(module, "_rendered", lambda folder: made)


def changed(whole: Path, target: Path, files: Mapping[str, bytes | None], **about: Any) -> Path:
    """A bundle with other files and a manifest that fits them."""
    before, content = archive.unpack(whole)
    kept = {name: data for name, data in {**content, **files}.items() if data is not None}
    target.write_bytes(archive.pack(kept, {**before, **about}))
    return target


def test_what_is_in_it(study: Path, whole: Path) -> None:
    about, files = archive.unpack(whole)
    assert {f"results/{table}/{table}.parquet" for table in TABLES} <= files.keys()
    assert {"study.yaml", "report.html", "notebooks/results.ipynb", "figures/learning_curves.svg"} <= files.keys()
    assert {f"tables/paper_orders.{ending}" for ending in ("csv", "md", "tex")} <= files.keys()
    assert not [name for name in files if "weights" in name or name.startswith("train")]
    assert about["study"] == "mini"
    assert about["versions"]["torch"] == "2.13.0"
    assert about["provenance"]["data"]["qa"]["fingerprint"] == "9f" * 32
    assert yaml.safe_load(files["study.yaml"]) == yaml.safe_load((study / "study.yaml").read_text())


def test_equal_content_gives_equal_bytes(study: Path, whole: Path, tmp_path: Path) -> None:
    """Whenever it is made, and however the rows are spread over files."""
    other = shutil.copytree(study, tmp_path / "mini")
    compact(other)
    assert ebft.bundle(other, tmp_path / "again.zip").read_bytes() == whole.read_bytes()


def test_the_unpacked_bundle_is_a_study(study: Path, whole: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(whole) as opened:
        opened.extractall(tmp_path / "mini")
    for table in TABLES:
        before, after = read_table(study, table), read_table(tmp_path / "mini", table)
        if table == "events":
            before, after = (each.drop(columns=["message", "details"]) for each in (before, after))
        pd.testing.assert_frame_equal(before, after)


def test_it_holds_no_credentials(study: Path, whole: Path) -> None:
    assert any(SECRET.encode() in path.read_bytes() for path in study.glob("results/events/*"))
    _, files = archive.unpack(whole)
    assert not [name for name, content in files.items() if SECRET.encode() in content]
    events = pq.read_table(pa.BufferReader(files["results/events/events.parquet"])).to_pylist()
    assert "cannot open https://[removed]@host/x" in {event["message"] for event in events}
    assert SECRET not in str(events)


def test_a_whole_one_is_in_order_and_nothing_is_unpickled(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    found = ebft.check_bundle(whole)
    _, files = archive.unpack(whole)
    assert (found.study, found.n_files, found.n_trials, found.is_rendered) == ("mini", len(files) + 1, 4, True)
    assert "the same numbers" in found.in_words()


def test_results_that_the_report_does_not_show_are_found(whole: Path, tmp_path: Path) -> None:
    _, files = archive.unpack(whole)
    name = "results/evaluations/evaluations.parquet"
    table = pq.read_table(pa.BufferReader(files[name]))
    rows = table.to_pylist()
    row = next(row for row in rows if row["metric"] == "ce_loss" and row["step"] > 0)
    row["value"] += 0.5
    other = as_parquet(pa.Table.from_pylist(rows, schema=table.schema))
    bad = changed(whole, tmp_path / "bad.zip", {name: other})
    with pytest.raises(ResultsError, match=r"tables/.* does not follow from its results: ") as caught:
        ebft.check_bundle(bad)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("made_once")
@pytest.mark.parametrize(
    ("name", "old", "new", "match"),
    [
        ("tables/methods.csv", b"EBFT", b"EBFX", "tables/methods.csv does not follow"),
        ("tables/paper_orders.tex", b"SFT", b"RLVR", "tables/paper_orders.tex does not follow"),
        ("report.html", b"0.45", b"0.54", "report.html does not follow"),
    ],
)
def test_shown_numbers_that_the_results_do_not_give(
    whole: Path, tmp_path: Path, name: str, old: bytes, new: bytes, match: str
) -> None:
    _, files = archive.unpack(whole)
    assert old in files[name]
    with pytest.raises(ResultsError, match=match):
        ebft.check_bundle(changed(whole, tmp_path / "bad.zip", {name: files[name].replace(old, new)}))


@pytest.mark.usefixtures("made_once")
@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"tables/more.csv": b"a\n1\n"}, "'tables/more.csv' does not belong to its results"),
        ({"tables/methods.md": None}, "'tables/methods.md' does not belong to its results, or is missing"),
        ({"report.html": None}, "lacks 'report.html'"),
        ({"results/scores/scores.parquet": None}, "lacks 'results/scores/scores.parquet'"),
        ({"results/scores/scores.parquet": b"PAR1 nothing PAR1"}, "scores.parquet cannot be read as Parquet"),
        ({"study.yaml": b"a: &a [*a]\n"}, "with its aliases it holds more than"),
        ({"study.yaml": b"a: [1"}, "study.yaml cannot be read"),
        ({"study.yaml": b"[" * 5000}, "nested more than 50 levels deep"),
        ({"study.yaml": b"- 1\n"}, "study.yaml"),
    ],
)
def test_damaged_content_with_right_digests(
    whole: Path, tmp_path: Path, files: Mapping[str, bytes | None], match: str
) -> None:
    with pytest.raises(ResultsError, match=match) as caught:
        ebft.check_bundle(changed(whole, tmp_path / "bad.zip", files))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("made_once")
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.set_column(0, "study", pa.array([1.5] * len(t))), "column study is double, not string"),
        (lambda t: t.drop_columns(["message"]), "column message is missing, not string"),
        (lambda t: t.set_column(0, "study", t["study"].dictionary_encode()), "column study is dictionary"),
        (lambda t: t.replace_schema_metadata({"schema_version": "1", "table": "x"}), "is not a file of the table"),
    ],
)
def test_tables_of_another_schema(whole: Path, tmp_path: Path, change: Any, match: str) -> None:
    table = change(events(whole))
    table = table.replace_schema_metadata({"schema_version": "1", **(table.schema.metadata or {})})
    with pytest.raises(ResultsError, match=match):
        ebft.check_bundle(changed(whole, tmp_path / "bad.zip", {EVENTS: as_parquet(table)}))


def test_tables_that_would_fill_the_memory(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that every row repeats takes its length once in the file, and once per row in memory."""
    rows = events(whole).take(pa.array([0] * 100))
    index = rows.column_names.index("message")
    rows = rows.set_column(index, rows.schema.field("message"), pa.array(["x" * 10**5] * 100))
    content = as_parquet(pa.concat_tables([rows] * 20))
    assert len(content) < 10**6
    monkeypatch.setattr(module, "MAX_TABLE_BYTES", 10**8)
    with pytest.raises(ResultsError, match="too large to check"):
        ebft.check_bundle(changed(whole, tmp_path / "bad.zip", {EVENTS: content}))
    monkeypatch.setattr(module, "MAX_VALUES", 1000)
    with pytest.raises(ResultsError, match="more than 1000 values"):
        ebft.check_bundle(changed(whole, tmp_path / "bad.zip", {EVENTS: content}))


EVENTS = "results/events/events.parquet"


def events(whole: Path) -> pa.Table:
    _, files = archive.unpack(whole)
    return pq.read_table(pa.BufferReader(files[EVENTS]))


def test_a_bundle_of_another_version_is_not_made_again(whole: Path, tmp_path: Path) -> None:
    bad = changed(whole, tmp_path / "old.zip", {"report.html": b"other"}, written_by="0.1", study="a\n\x1b[2J")
    found = ebft.check_bundle(bad)
    assert not found.is_rendered
    assert found.study == "a [2J"
    assert found.in_words().endswith(f"not made again: written by ebft-study 0.1, this is {ebft.__version__}")


# --- notebooks, unreadable studies, the command line ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (
            {"cells": [{"cell_type": "code", "source": "1", "execution_count": None}]},
            "jupyter execute --inplace new.ipynb",
        ),
        ({"cells": 3}, "new.ipynb: is no notebook"),
    ],
)
def test_notebooks_without_results(study: Path, tmp_path: Path, content: Any, match: str) -> None:
    (tmp_path / "new.ipynb").write_text(json.dumps(content))
    with pytest.raises(ResultsError, match=match):
        ebft.bundle(study, tmp_path / "x.zip", notebooks=[tmp_path / "new.ipynb"])


def test_a_missing_notebook_is_named(study: Path, tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"none\.ipynb: cannot be read"):
        ebft.bundle(study, tmp_path / "x.zip", notebooks=[tmp_path / "none.ipynb"])


def test_a_study_with_unreadable_rows_is_not_bundled(study: Path, tmp_path: Path) -> None:
    other = shutil.copytree(study, tmp_path / "mini")
    file = next((other / "results" / "metrics").glob("*.parquet"))
    file.write_bytes(b"broken")
    with pytest.raises(ResultsError, match="A bundle without these rows would show other numbers"):
        ebft.bundle(other, tmp_path / "x.zip")
    assert not (tmp_path / "x.zip").exists()


@pytest.mark.parametrize("name", ["empty", "a name"])
def test_a_study_without_trials(tmp_path: Path, name: str) -> None:
    write_spec(tmp_path / name)
    assert ebft.check_bundle(ebft.bundle(tmp_path / name, tmp_path / "x.zip")).n_trials == 0


@pytest.mark.usefixtures("made_once")
def test_the_command_line(study: Path, whole: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    notebook = study / "results.ipynb"
    written = run(app, ["bundle", str(study), "--to", str(tmp_path / "b.zip"), "--notebook", str(notebook)])
    assert written.output.strip() == str(tmp_path / "b.zip")
    assert (tmp_path / "b.zip").read_bytes() == whole.read_bytes()
    assert "the same numbers" in run(app, ["bundle", "--check", str(whole)]).output
    for arguments in ([], [str(study), "--check", str(whole)]):
        assert "Give one of them" in str(run(app, ["bundle", *arguments]).exception)
    (tmp_path / "b.zip").write_bytes(whole.read_bytes()[:-9])
    assert getattr(run(app, ["bundle", "--check", str(tmp_path / "b.zip")]).exception, "exit_code", 0) == 2


# --- comparison of texts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a 0.123 ± 0.004", "a 0.124 ± 0.004", True),
        ("a −0.001", "a 0.000", True),
        ("a 0.123", "a 0.125", False),
        ("a 0.123", "a 0.1234", False),
        ("n 3 of 3", "n 2 of 3", False),
        ("a 0.5", "b 0.5", False),
        ("a\nb", "a", False),
        ("a 1.0\nb 2.0", "a 1.0\nb 2.3", False),
    ],
)
def test_numbers_may_differ_in_their_last_digit(one: str, other: str, same: bool) -> None:
    assert (first_difference(one, other) == "") == same
    assert (first_difference(other, one) == "") == same
