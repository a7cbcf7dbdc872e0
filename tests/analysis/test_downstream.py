"""Scores on benchmarks by configuration: intervals over seeds and problems, base models, contamination."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ebft_study.analysis.downstream import benchmark_scores
from ebft_study.analysis.statistics import t_quantile
from ebft_study.analysis.summary import StudySummary, summarize
from ebft_study.report import content
from ebft_study.report.samples import Samples, best_of_methods
from ebft_study.results import TrialRecorder, load
from tests.synthetic_study import write_study

PROBLEMS = 6


def passes(trial: int, k: int) -> np.ndarray:
    """A value for each problem."""
    return np.random.default_rng([trial, k]).random(PROBLEMS)


def record(folder: Path, trial_id: str, attempt: int, step: int, values: dict[int, np.ndarray], overlap: float) -> None:
    recorder = TrialRecorder(folder, study="s", trial_id=trial_id, attempt=attempt)
    rows: list[dict[str, Any]] = [
        {"benchmark": "mini", "metric": "pass_at_k", "position": k, "value": float(of_k.mean()),
         "standard_error": 0.1, "count": PROBLEMS}
        for k, of_k in values.items()
    ]  # fmt: skip
    lists = [
        {"benchmark": "mini", "metric": "pass_at_k", "position": k, "values": of_k.tolist(),
         "sequences": list(range(PROBLEMS)), "counts": [1] * PROBLEMS}
        for k, of_k in values.items()
    ]  # fmt: skip
    share = {"benchmark": "mini", "metric": "contaminated_fraction", "position": None, "value": overlap, "count": 6}
    recorder.evaluations(step, [*rows, share])
    recorder.scores(step, lists)
    recorder.samples(step, [{"benchmark": "mini", "sequence": 3, "anchor": 16, "sample": 0, "completion": "x"}])


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudySummary, StudySummary]:
    """Without and with benchmarks; of every trial the base model, a step in between, and the last step."""
    folder = write_study(tmp_path_factory.mktemp("downstream") / "study")
    before = summarize(load(folder))
    for number, row in enumerate(before.results.trials.to_dict("records")):
        for step, extra in ((0, 1000), (10, 2000), (int(row["steps_done"]), 0)):
            values = {k: passes(1000 if step == 0 else number + extra, k) for k in (1, 16)}
            record(folder, row["trial_id"], int(row["attempt"]), step, values, 0.25 if number else 0.5)
    return before, summarize(load(folder))


def test_a_configuration_has_the_mean_over_seeds_with_an_interval_over_seeds_and_problems(
    study: tuple[StudySummary, StudySummary],
) -> None:
    _, summary = study
    (scores,) = benchmark_scores(summary)
    assert scores.columns == (("pass_at_k", 1), ("pass_at_k", 16))
    assert scores.contaminated == (0.25, 0.5)
    ids = summary.results.trials["trial_id"].tolist()
    for c, (label, n, found) in zip(summary.configurations, scores.rows[1:], strict=True):
        table = np.array([passes(ids.index(trial), 16) for trial in c.finished["trial_id"]], dtype=np.float32)
        interval = found["pass_at_k", 16]
        assert (label, n) == (c.label, len(table))
        assert interval.mean == pytest.approx(table.mean())
        over_seeds = t_quantile(0.05, len(table) - 1) * table.mean(axis=1).std(ddof=1) / math.sqrt(len(table))
        over_problems = t_quantile(0.05, PROBLEMS - 1) * table.mean(axis=0).std(ddof=1) / math.sqrt(PROBLEMS)
        assert interval.half_width == pytest.approx(math.hypot(over_seeds, over_problems), rel=1e-4)


def test_the_base_model_has_the_scores_of_step_0(study: tuple[StudySummary, StudySummary]) -> None:
    (scores,) = benchmark_scores(study[1])
    label, n, found = scores.rows[0]
    assert (label, n) == ("base model", 0)
    assert found["pass_at_k", 1].mean == pytest.approx(passes(1000, 1).mean())


def test_each_benchmark_has_its_own_last_step(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", effects={None: (0.0, 0.0)}, seeds=(0,))
    recorder = TrialRecorder(folder, study="s", trial_id="t000", attempt=0)
    for step, name, value in ((10, "short", 0.1), (20, "short", 0.2), (20, "long", 0.3), (40, "long", 0.4)):
        row = {"benchmark": name, "metric": "pass_at_k", "position": 1, "value": value, "count": 9}
        recorder.evaluations(step, [row])
    scores = benchmark_scores(summarize(load(folder)))
    found = {each.name: [of_one["pass_at_k", 1].mean for _, _, of_one in each.rows] for each in scores}
    assert found == {"long": [0.4], "short": [0.2]}


def test_benchmarks_change_no_other_number(study: tuple[StudySummary, StudySummary]) -> None:
    without, with_ones = study
    assert benchmark_scores(without) == []
    assert content.benchmark_tables(without) == []
    assert content.configuration_rows(without) == content.configuration_rows(with_ones)
    assert content.evidence_rows(without) == content.evidence_rows(with_ones)
    assert best_of_methods(without, Samples(without)) == best_of_methods(with_ones, Samples(with_ones))


def test_tables_name_the_scores(study: tuple[StudySummary, StudySummary]) -> None:
    (table,) = content.benchmark_tables(study[1])
    assert table.columns == ["pass@1", "pass@16"]
    assert "25.0 to 50.0 %" in table.contamination
    assert all("±" in score for _, _, scores in table.rows[1:] for score in scores)
