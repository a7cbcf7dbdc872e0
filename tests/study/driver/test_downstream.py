"""The command `evaluate`: a finished run, its checkpoints, and what is refused before anything starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from ebft_study import api, data, report, results
from ebft_study.errors import ConfigError, DataError, EbftError, ResultsError
from tests.evaluation.downstream import files
from tests.tiny_run import tiny_config

SHORT = ["benchmark_samples=4", "benchmark_max_tokens=6"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without benchmarks, of which all checkpoints were kept."""
    folder = tmp_path_factory.mktemp("trained")
    settings = tiny_config(folder, keep_checkpoints=3, ema_decay=0.5, learning_rate=0.05, text_column=None,
                           prompt_column="prompt", answer_column="answer", dataset=str(pairs(folder)))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EBFT_STUDY_CACHE", str(folder / "cache"))
        api.train(settings, output=folder / "run")
    return folder


def pairs(folder: Path) -> Path:
    """Training data that contain one of the two sentences of the benchmark."""
    rows = [{"prompt": f"value {k} index", "answer": f" list {k} of the name and"} for k in range(60)]
    rows += [{"prompt": f"{k}: das ist ein kleines haus", "answer": " a house"} for k in range(30)]
    return files.write_lines(folder / "pairs.jsonl", rows)


@pytest.fixture
def study(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EBFT_STUDY_CACHE", str(trained / "cache"))
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


def recorded(study: Path) -> pd.DataFrame:
    rows = results.load(study).evaluations
    return rows[rows["benchmark"] != "heldout"]


def test_a_checkpoint_is_evaluated_and_recorded_once(study: Path) -> None:
    name = files.parallel(study.parent)
    rows, skipped = api.evaluate(study, [name], [], SHORT)
    assert skipped == ()
    found = {(row["metric"], row["position"]): row["value"] for row in rows}
    assert found["contaminated_fraction", None] == 1.0  # the other sentence is too short to tell
    first = recorded(study)
    assert set(first["step"]) == {4}
    assert set(first["metric"]) >= {"greedy_bleu", "best_of_k_bleu", "corpus_bleu", "unparsed_answers"}
    loaded = results.load(study)
    assert set(loaded.scores["benchmark"]) == {"validation", "heldout", "wmt22_de-en"}
    assert loaded.samples["benchmark"].notna().sum() == 2 * 5
    assert "evaluated" in set(loaded.events["kind"])
    again, _ = api.evaluate(study, [name], ["t0000"], SHORT)
    assert again == rows
    columns = ["step", "benchmark", "metric", "position", "value"]
    pd.testing.assert_frame_equal(recorded(study)[columns], first[columns])


def test_the_training_data_are_read_once(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    load_text = data.load_text
    monkeypatch.setattr(data, "load_text", lambda settings: read.append(settings) or load_text(settings))
    humaneval = files.write_lines(study.parent / "h.jsonl", files.HUMANEVAL)
    rows, _ = api.evaluate(study, [files.parallel(study.parent), f"humaneval:{humaneval}"], [], SHORT)
    found = {row["benchmark"]: row["value"] for row in rows if row["metric"] == "contaminated_fraction"}
    assert found == {"wmt22_de-en": 1.0, "humaneval": 0.0}
    assert len(read) == 1


def test_checkpoints_can_be_chosen(study: Path) -> None:
    name = files.parallel(study.parent)
    rows = {which: api.evaluate(study, [name], [], SHORT, checkpoint=which)[0] for which in ("2", "last", "best")}
    assert {row["step"] for row in rows["2"]} == {2}
    assert {row["step"] for row in rows["last"]} == {4}
    best = results.load(study).best_checkpoint("t0000")
    assert best is not None
    assert {row["step"] for row in rows["best"]} == {int(best.name.rpartition("_")[2])}


def test_the_scores_are_those_of_the_run_itself(trained: Path, study: Path, tmp_path: Path) -> None:
    """Of averaged weights, at the end of a run that evaluates the benchmark by itself."""
    name = files.parallel(tmp_path)
    record: dict[str, Any] = yaml.safe_load((study / "study.yaml").read_text())["run"]
    short = {"benchmark_samples": 4, "benchmark_max_tokens": 6, "benchmarks": [name]}
    settings = {**record, "name": "itself", "evaluation": {**record["evaluation"], **short}}
    api.train(settings, output=tmp_path / "itself")
    columns = ["metric", "position", "value", "standard_error"]
    by_itself = recorded(tmp_path / "itself")
    by_itself = by_itself[by_itself["step"] == 4][columns].reset_index(drop=True)
    api.evaluate(study, [name], [], SHORT)
    afterwards = recorded(study)[columns]
    afterwards = afterwards[afterwards["metric"] != "contaminated_fraction"].reset_index(drop=True)
    pd.testing.assert_frame_equal(by_itself, afterwards)


def test_the_report_shows_benchmarks(study: Path) -> None:
    assert "benchmarks" not in Path(str(report.write_report(study))).read_text().split("<nav ")[1].split("Learning")[0]
    api.evaluate(study, [files.parallel(study.parent)], [], SHORT)
    page = Path(str(report.write_report(study))).read_text()
    assert "BLEU, best of 4" in page
    assert "100.0 % of its problems" in page


def test_check_refuses_solutions_that_fail(study: Path) -> None:
    rows = [files.HUMANEVAL[0], {**files.HUMANEVAL[1], "canonical_solution": "    return x[1]\n"}]
    path = files.write_lines(study.parent / "h.jsonl", rows)
    with pytest.raises(DataError, match=r"humaneval: 1 of its solutions fail their own tests: HumanEval/1 \(failed"):
        api.evaluate(study, [f"humaneval:{path}"], [], SHORT, check=True)
    assert len(recorded(study)) == 0
    path = files.write_lines(study.parent / "h.jsonl", files.HUMANEVAL)
    rows_found, _ = api.evaluate(study, [f"humaneval:{path}"], [], SHORT, check=True)
    assert {row["benchmark"] for row in rows_found} == {"humaneval"}


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"trials": ["t7"]}, ResultsError, "has no trial 't7'. Its trials: t0000"),
        ({"checkpoint": "3"}, ResultsError, "trial t0000 has no checkpoint '3'"),
        ({"checkpoint": "first"}, ConfigError, "is neither last, best nor a step"),
        ({"overrides": ["alpha=1"]}, ConfigError, "reward.alpha=1: is a setting of the trained model"),
        ({"overrides": ["benchmark_max_tokens=999"]}, ConfigError, "128 positions"),
        ({"overrides": ["benchmark_sample=1"]}, ConfigError, "Did you mean 'benchmark_samples'"),
        ({"benchmarks": ["humanevl"]}, DataError, "Did you mean 'humaneval'"),
    ],
)
def test_mistakes_are_refused_before_anything_starts(
    study: Path, keywords: dict[str, Any], error: type[EbftError], message: str
) -> None:
    arguments = {"benchmarks": [files.parallel(study.parent)], **keywords}
    with pytest.raises(error) as refused:
        api.evaluate(study, **arguments)
    assert message in str(refused.value)
    assert len(recorded(study)) == 0
