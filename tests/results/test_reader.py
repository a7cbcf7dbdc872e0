"""Reading: duplicates resolved, older files accepted, damaged files reported instead of fatal; compaction."""

from __future__ import annotations

import functools
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from ebft_study import config, results
from ebft_study.errors import ConfigError, ResultsError
from ebft_study.results import (
    StudyRecorder,
    TrialRecorder,
    compact,
    compaction,
    copies,
    load,
    read_table,
    reader,
    schema,
    writer,
)
from ebft_study.storage import storage_path
from ebft_study.study.folder import study_yaml
from tests import synthetic_study


def record(folder: Path, trial_id: str = "t1", attempt: int = 0) -> TrialRecorder:
    return TrialRecorder(folder, study="s", trial_id=trial_id, attempt=attempt)


def finish(folder: Path, trial_id: str, status: str = "finished") -> None:
    settings = config.flatten(config.RunConfig())
    row = {"trial_id": trial_id, "attempt": 0, "status": status, "hyperparameters": settings}
    StudyRecorder(folder, study="s").trial(row)


def test_of_a_step_reported_twice_the_highest_attempt_wins(tmp_path: Path) -> None:
    late, early = record(tmp_path, attempt=1), record(tmp_path, attempt=0)
    late.metrics(10, {"loss": 1.5})
    early.metrics(10, {"loss": 1.0})
    early.metrics(20, {"loss": 0.9})
    for recorder, value in ((late, 7.0), (early, 5.0)):
        recorder.evaluations(10, [{"benchmark": "heldout", "metric": "ce_loss", "value": value, "count": 1}])
    metrics = read_table(tmp_path, "metrics")
    assert metrics[["step", "attempt", "loss"]].to_numpy().tolist() == [[10, 1, 1.5], [20, 0, 0.9]]
    assert read_table(tmp_path, "evaluations")["value"].tolist() == [7.0]


def test_reports_of_one_step_complete_each_other(tmp_path: Path) -> None:
    recorder = record(tmp_path)
    recorder.metrics(10, {"loss": 1.0})
    recorder.metrics(10, {"ce_loss": 2.0, "kl": 0.5})
    recorder.metrics(10, {"ce_loss": 3.0})
    assert read_table(tmp_path, "metrics").loc[0, ["loss", "ce_loss", "kl"]].tolist() == [1.0, 3.0, 0.5]


def test_profile_rows_differ_by_position_and_all_stay(tmp_path: Path) -> None:
    rows = [
        {"benchmark": "heldout", "metric": "cfm_loss", "position": position, "value": float(position or 0), "count": 1}
        for position in (1, 2, 4, None)
    ]
    record(tmp_path).evaluations(0, rows)
    assert sorted(read_table(tmp_path, "evaluations")["value"]) == [0.0, 1.0, 2.0, 4.0]


@pytest.mark.parametrize("damage", ["truncated", "text", "alien", "other table", "empty"])
def test_a_damaged_file_is_reported_and_the_rest_still_loads(tmp_path: Path, damage: str) -> None:
    recorder = record(tmp_path)
    recorder.metrics(0, {"loss": 1.0})
    recorder.metrics(1, {"loss": 2.0})
    folder = tmp_path / "results" / "metrics"
    bad = folder / "bad.parquet"
    good = sorted(folder.glob("*.parquet"))[0]
    if damage == "truncated":
        bad.write_bytes(good.read_bytes()[:-100])
    elif damage == "text":
        bad.write_text("not parquet")
    elif damage == "alien":
        pq.write_table(pa.table({"colour": ["red"]}), bad)
    elif damage == "empty":
        bad.touch()
    else:
        recorder.event("started", "x")
        shutil.copy(next((tmp_path / "results" / "events").glob("*.parquet")), bad)
    results = load(tmp_path)
    assert results.metrics["loss"].tolist() == [1.0, 2.0]
    about_bad = [problem for problem in results.problems if "bad.parquet" in problem]
    assert len(about_bad) == 1
    assert "\n" not in about_bad[0]


def test_a_file_of_an_older_schema_loads_with_nulls_and_keeps_its_own_columns(tmp_path: Path) -> None:
    finish(tmp_path, "new")
    path = tmp_path / "results" / "trials" / "new.parquet"
    old = pq.read_table(path).drop_columns(["gamma", "configuration"])
    old = old.set_column(old.column_names.index("trial_id"), "trial_id", pa.array(["old"]))
    old = old.set_column(old.column_names.index("n_samples"), "n_samples", pa.array([4], pa.int32()))
    old = old.append_column("forgotten_setting", pa.array([3.5]))
    metadata = {"schema_version": "0", "table": "trials"}
    pq.write_table(old.replace_schema_metadata(metadata), path.with_name("old.parquet"))
    trials = read_table(tmp_path, "trials").set_index("trial_id")
    assert pd.isna(trials.loc["old", "gamma"])
    assert trials.loc["old", "n_samples"] == 4
    assert trials.loc["old", "forgotten_setting"] == 3.5
    assert trials.loc["new", "gamma"] == 0.0


def test_a_study_without_any_results_has_empty_typed_tables(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("question: does it work?\n")
    results = load(tmp_path)
    assert results.spec == {"question": "does it work?"}
    for table in schema.TABLES:
        frame = getattr(results, table)
        assert len(frame) == 0
        assert list(frame.columns) == [column.name for column in schema.columns(table)]
    assert results.problems == []


def test_a_study_is_found_by_name_or_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "studies" / "quick"
    record(folder).metrics(0, {"loss": 1.0})
    (folder / "study.yaml").write_text("question: q\n")
    monkeypatch.chdir(tmp_path)
    assert len(load("quick").metrics) == len(load(folder).metrics) == 1
    with pytest.raises(ResultsError, match="Studies there: quick"):
        load("quack")


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "a: !!python/object/apply:os.system ['true']"])
def test_a_damaged_study_file_is_a_problem_not_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "study.yaml").write_text(content)
    results = load(tmp_path)
    assert results.spec == {}
    assert len(results.problems) == 1


# --- compaction ------------------------------------------------------------------------------------------------


def build_two_trials(folder: Path) -> None:
    for trial_id, status in (("done-a001-000001", "finished"), ("busy", "running")):
        finish(folder, trial_id, status)
        recorder = record(folder, trial_id)
        for step in range(4):
            recorder.metrics(step, {"loss": float(step), "reward": float("nan")})
            recorder.samples(step, [{"sequence": 0, "anchor": 8, "sample": 0, "context": "c"}])
        recorder.event("started", "started")


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    return {table: read_table(folder, table) for table in schema.TABLES}


def assert_same(left: dict[str, pd.DataFrame], right: dict[str, pd.DataFrame]) -> None:
    for table in schema.TABLES:
        pd.testing.assert_frame_equal(left[table], right[table])


def test_compaction_merges_finished_trials_only_and_changes_no_row(tmp_path: Path) -> None:
    build_two_trials(tmp_path)
    before = tables(tmp_path)
    compact(tmp_path)
    assert_same(before, tables(tmp_path))
    names = sorted(path.name.split("-")[0] for path in (tmp_path / "results" / "metrics").glob("*.parquet"))
    assert names == ["busy"] * 4 + ["compacted"]
    assert len(pd.read_parquet(tmp_path / "results" / "metrics")) == 8, "plain pandas sees every row once"


def test_compacting_again_merges_what_was_compacted_before(tmp_path: Path) -> None:
    build_two_trials(tmp_path)
    compact(tmp_path)
    finish(tmp_path, "busy")
    before = tables(tmp_path)
    compact(tmp_path)
    compact(tmp_path)
    assert_same(before, tables(tmp_path))
    for table in ("metrics", "samples", "events"):
        assert len(list((tmp_path / "results" / table).glob("*.parquet"))) == 1


@pytest.mark.parametrize("merged_before", [True, False])
def test_a_compaction_that_wrote_no_manifest_is_completed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merged_before: bool
) -> None:
    build_two_trials(tmp_path)
    if merged_before:
        compact(tmp_path)
    finish(tmp_path, "busy")
    before = tables(tmp_path)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compaction, "_write_manifest", crash)
        with pytest.raises(KeyboardInterrupt):
            compact(tmp_path)
    compact(tmp_path)
    assert not [problem for problem in load(tmp_path).problems if "study.yaml" not in problem]
    assert_same(before, tables(tmp_path))
    (merged,) = (tmp_path / "results" / "metrics").glob("*.parquet")
    merged.unlink()
    problems: list[str] = []
    read_table(tmp_path, "metrics", problems)
    assert problems == [f"{merged}: is missing, and with it the rows of ended trials. Restore it"]


def test_a_crash_between_merging_and_removing_leaves_no_double_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_two_trials(tmp_path)
    before = tables(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", _crash)
        with pytest.raises(KeyboardInterrupt):
            compact(tmp_path)
    assert len(list((tmp_path / "results" / "metrics").glob("*.parquet"))) == 9
    assert_same(before, tables(tmp_path))
    compact(tmp_path)
    assert len(pd.read_parquet(tmp_path / "results" / "metrics")) == 8
    assert_same(before, tables(tmp_path))


def _crash(path: Path, missing_ok: bool = False) -> None:
    if path.suffix == ".parquet":
        raise KeyboardInterrupt


def test_compaction_leaves_damaged_files_where_they_are(tmp_path: Path) -> None:
    build_two_trials(tmp_path)
    damaged = sorted((tmp_path / "results" / "metrics").glob("done*.parquet"))[0]
    damaged.write_bytes(b"broken")
    compact(tmp_path)
    assert damaged.exists()
    assert len(read_table(tmp_path, "metrics")) == 7


def test_files_that_vanish_while_reading_are_listed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_two_trials(tmp_path)
    before = tables(tmp_path)
    real, calls = reader.read_file, []

    def read_while_compacting(path: Path, *arguments: Any) -> pa.Table:
        calls.append(path)
        if len(calls) == 1:
            monkeypatch.setattr(reader, "read_file", real)
            compact(tmp_path)
        return real(path, *arguments)

    monkeypatch.setattr(reader, "read_file", read_while_compacting)
    pd.testing.assert_frame_equal(before["metrics"], read_table(tmp_path, "metrics"))


# --- damage ------------------------------------------------------------------------------------------------------


def test_no_flipped_bit_of_a_file_changes_a_table_unnoticed(tmp_path: Path) -> None:
    """Wherever it is: in the data, in a column's name, in the names of merged files."""
    build_two_trials(tmp_path)
    compact(tmp_path)
    before, generator = read_table(tmp_path, "metrics"), random.Random(0)
    compacted = next((tmp_path / "results" / "metrics").glob("compacted*.parquet"))
    small = next((tmp_path / "results" / "metrics").glob("busy*.parquet"))
    for path, n_left in ((compacted, 4), (small, 7)):
        whole = path.read_bytes()
        for _ in range(150):
            at = generator.randrange(len(whole))
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << generator.randrange(8))]) + whole[at + 1 :])
            problems: list[str] = []
            read = read_table(tmp_path, "metrics", problems)
            assert len(problems) == 1, at
            assert problems[0].startswith(f"{path}: ")
            assert len(read) == n_left
        path.write_bytes(whole)
    pd.testing.assert_frame_equal(before, read_table(tmp_path, "metrics"))


def test_a_compacted_file_that_is_gone_is_noticed(tmp_path: Path) -> None:
    build_two_trials(tmp_path)
    compact(tmp_path)
    finish(tmp_path, "busy")
    compact(tmp_path)
    (compacted,) = (tmp_path / "results" / "metrics").glob("compacted*.parquet")
    problems: list[str] = []
    assert len(read_table(tmp_path, "metrics", problems))
    assert problems == []
    compacted.unlink()
    assert read_table(tmp_path, "metrics", problems).empty
    assert problems == [f"{compacted}: is missing, and with it the rows of ended trials. Restore it"]
    (compacted.parent / ".compacted.json").write_text("{")
    read_table(tmp_path, "metrics", problems := [])
    assert "The next compaction writes it again" in problems[0]


def test_files_of_versions_without_digests_are_read(tmp_path: Path) -> None:
    """Their names end with a token alone; that of compacted files has as many digits as a digest."""
    build_two_trials(tmp_path)
    compact(tmp_path)
    before = tables(tmp_path)
    for path in (tmp_path / "results").glob("*/*-*.parquet"):
        earlier = re.sub("-[0-9a-f]{16}[.]parquet$", ".parquet", path.name)
        assert earlier != path.name or path.parent.name == "trials"
        path.rename(path.with_name(earlier))
    for path in (tmp_path / "results").glob("*/.compacted.json"):
        path.unlink()
    assert_same(before, tables(tmp_path))
    problems: list[str] = []
    read_table(tmp_path, "metrics", problems)
    assert problems == []


# --- parts of tables ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", schema.TABLES)
def test_some_columns_are_those_of_the_whole_table(tmp_path: Path, table: str) -> None:
    build_two_trials(tmp_path)
    record(tmp_path, "done", attempt=1).metrics(2, {"kl": 0.5})
    whole = read_table(tmp_path, table)
    for names in (["label", "loss", "value", "message"], []):
        part = read_table(tmp_path, table, columns=names)
        assert {*names} & {*whole.columns} <= {*part.columns}
        assert len(part.columns) < len(whole.columns)
        pd.testing.assert_frame_equal(part, whole[list(part.columns)])


def test_rows_of_many_files_are_joined_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_two_trials(tmp_path)
    before = tables(tmp_path)
    monkeypatch.setattr(reader, "_FILES_AT_ONCE", 2)
    assert_same(before, tables(tmp_path))


def test_damage_in_columns_that_are_not_read_is_named(tmp_path: Path) -> None:
    """By the digest where a file has one, else because such a file is read whole."""
    build_two_trials(tmp_path)
    folder = tmp_path / "results" / "metrics"
    for path in folder.glob("busy*.parquet"):
        pages = pq.ParquetFile(path).metadata.row_group(0)
        names = [pages.column(index).path_in_schema for index in range(pages.num_columns)]
        at = pages.column(names.index("loss")).data_page_offset + 20
        content = path.read_bytes()
        earlier = path.with_name(re.sub("-[0-9a-f]{16}[.]parquet$", ".parquet", path.name))
        for target in (path, earlier):
            target.write_bytes(content[: at + 10] + bytes([content[at + 10] ^ 1]) + content[at + 11 :])
            for read in (functools.partial(read_table, columns=["kl"]), reader.check_table):
                read(tmp_path, "metrics", problems := [])
                assert problems, target
                assert all(problem.startswith(f"{target}: ") for problem in problems)
            target.unlink()
        path.write_bytes(content)
    reader.check_table(tmp_path, "metrics", problems := [])
    assert problems == []


def test_a_check_names_damaged_trials(tmp_path: Path) -> None:
    build_two_trials(tmp_path)
    path = next((tmp_path / "results" / "trials").glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-1])
    problems: list[str] = []
    reader.check_table(tmp_path, "trials", problems)
    assert problems == [f"{path}: is damaged, its copy is used"]


def test_files_of_few_rows_are_not_compressed(tmp_path: Path) -> None:
    """What pays in a large file takes most of the time of reading a small one."""
    for rows, codec in ((1, "UNCOMPRESSED"), (200, "ZSTD")):
        values = [{"study": "s", "trial_id": "t", "attempt": 0, "step": step, "loss": 1.0} for step in range(rows)]
        table = writer.build_table("metrics", [{**row, "written_at": writer.now()} for row in values])
        file = pq.ParquetFile(pa.BufferReader(writer.as_parquet(table)))
        column = file.metadata.row_group(0).column(file.schema_arrow.names.index("step"))
        assert (column.compression, column.statistics is not None) == (codec, rows > 1)
        assert file.read().equals(table)


@pytest.mark.parametrize("content", [b"[1]", b"[null]", b"{}", b"1", b"[" * 10**5])
def test_a_manifest_of_another_kind_is_named(tmp_path: Path, content: bytes) -> None:
    folder = synthetic_study.write_study(tmp_path / "s", effects={None: (0.0, 0.0)}, seeds=(0,))
    (folder / "results" / "metrics" / reader.MANIFEST).write_bytes(content)
    read = results.load(folder)
    assert len(read.metrics) > 0
    assert [problem.partition(": ")[2] for problem in read.problems] == [
        "cannot be read. The next compaction writes it again"
    ]


@pytest.mark.parametrize(
    ("part", "value", "where"),
    [
        ("resources", {"cpus_per_worker": ""}, "resources.cpus_per_worker"),
        ("provenance", {"data": {"d": {"fingerprint": 1e308}}}, "provenance.data.d.fingerprint"),
        ("versions", [1], "versions"),
        ("warm_start", [{}], "warm_start.0.study"),
    ],
)
def test_a_part_of_study_yaml_of_another_type_is_named_and_left_out(
    tmp_path: Path, part: str, value: object, where: str
) -> None:
    folder = synthetic_study.write_study(tmp_path / "s", effects={None: (0.0, 0.0)}, seeds=(0,))
    content = yaml.safe_load((folder / "study.yaml").read_text())
    (folder / "study.yaml").write_text(yaml.safe_dump({**content, part: value}))
    read = results.load(folder)
    assert part not in read.spec
    assert f"study.yaml: {where}: " in read.problems[0]
    with pytest.raises(ConfigError, match=where):
        study_yaml.content(folder)


def test_a_study_yaml_that_was_changed_by_hand_is_named(tmp_path: Path) -> None:
    folder = synthetic_study.write_study(tmp_path / "s", effects={None: (0.0, 0.0)}, seeds=(0,))
    written = (folder / "study.yaml").read_bytes()
    copies.write(storage_path(folder / "study.yaml"), written)
    assert results.load(folder).problems == []
    (folder / "study.yaml").write_bytes(b"# a comment\n" + written)
    assert results.load(folder).problems == []
    (folder / "study.yaml").write_bytes(written.replace(b"tiny-1m", b"tiny-5m"))
    assert "was changed by hand" in results.load(folder).problems[0]


@pytest.mark.parametrize("content", [b"a: " + b"1" * 5000, b"[" * 10**4])
def test_a_study_yaml_that_yaml_stumbles_over_is_replaced_by_its_copy(tmp_path: Path, content: bytes) -> None:
    folder = synthetic_study.write_study(tmp_path / "s", effects={None: (0.0, 0.0)}, seeds=(0,))
    copies.write(storage_path(folder / "study.yaml"), (folder / "study.yaml").read_bytes())
    (folder / "study.yaml").write_bytes(content)
    read = results.load(folder)
    assert read.spec["study"] == "s"
    assert "its copy is used" in read.problems[0]


@pytest.mark.parametrize("compactions", [0, 1, 2])
@pytest.mark.parametrize("table", ["metrics", "samples", "events"])
def test_a_file_that_is_gone_is_noticed_before_and_after_merging(tmp_path: Path, table: str, compactions: int) -> None:
    finish(tmp_path, "busy", "running")
    finish(tmp_path, "done")
    for trial_id in ("busy", "done"):
        recorder = record(tmp_path, trial_id)
        for step in range(3):
            recorder.metrics(step, {"loss": 1.0})
            recorder.samples(step, [{"sequence": 0, "anchor": 8, "sample": 0}])
            recorder.event("evaluated", "x")
        recorder.event("finished", "the last file, which nobody would miss")
    assert reader.missing_files(tmp_path) == []
    first = min((tmp_path / "results" / table).glob("done-*.parquet"))
    first.unlink()
    for number in range(compactions):
        compact(tmp_path)
        finish(tmp_path, "busy")
        assert len(list((tmp_path / "results" / table).glob("compacted-*"))) == 1, number
    (problem,) = reader.missing_files(tmp_path)
    assert problem == f"{tmp_path / 'results'}: files of done-a000 are missing (1 of 10). Restore them"
    assert problem in load(tmp_path).problems
