"""The methods of a study beside each other: rows, choices, starts, and the numbers that must not be compared."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ebft_study.analysis.downstream import benchmark_scores
from ebft_study.analysis.methods import Column, Task, tasks
from ebft_study.analysis.statistics import mean_interval
from ebft_study.analysis.summary import StudySummary, summarize
from ebft_study.results import TrialRecorder, load
from tests.synthetic_study import EFFECTS, LEVELS, METHODS, of_method, write_benchmark, write_study

SCORE, CE, CFM = Column("mini", "pass_at_k", 1), Column("", "ce_loss", None), Column("", "cfm_loss", None)
WARM = (-0.05, -0.02)


def written(folder: Path, **options: Any) -> StudySummary:
    write_study(folder, **{"effects": EFFECTS, "settings": of_method, "warm": WARM, **options})
    write_benchmark(folder, LEVELS)
    return summarize(load(folder))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudySummary:
    return written(tmp_path_factory.mktemp("methods") / "study")


def of(study: StudySummary) -> Task:
    (task,) = tasks(study)
    return task


def scores(study: StudySummary, name: str, step: int | None = None) -> dict[int, float]:
    """pass@1 of a method by seed, from the tables."""
    trials = study.results.trials
    settings = {"warm_start_steps": 0, **METHODS[name]}
    own = trials[
        (trials["method"] == settings["method"]) & (trials["warm_start_steps"] == settings["warm_start_steps"])
    ]
    rows = study.results.evaluations
    rows = rows[rows["metric"] == "pass_at_k"].set_index(["trial_id", "step"])["value"]
    return {
        int(row["seed"]): float(rows[row["trial_id"], row["steps_done"] if step is None else step])
        for row in own.to_dict("records")
    }


def test_the_rows_are_those_of_table_1_in_its_order(study: StudySummary) -> None:
    task = of(study)
    assert list(task.methods) == ["Base", "Warm start", "SFT", "EBFT", "EBFT (ws.)", "RLVR", "RLVR (ws.)"]
    assert task.columns == (CE, CFM, SCORE)
    assert (task.unchosen, task.has_one_map) == ((), True)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_scores_and_losses_of_its_last_step(study: StudySummary, name: str) -> None:
    method = of(study).methods[name]
    assert method.values[SCORE] == pytest.approx(scores(study, name))
    assert method.mean(SCORE).mean == pytest.approx(np.mean(list(scores(study, name).values())))
    assert method.mean(SCORE).n_sequences == 50
    (c,) = (c for c in study.configurations if c.settings["method"] == METHODS[name]["method"]
            and c.warm_start_steps == METHODS[name].get("warm_start_steps", 0))  # fmt: skip
    assert method.values[CE] == c.final["ce_loss", None]
    assert method.values[CFM] == c.final["cfm_loss", None]


def test_starts_have_the_values_of_their_step_and_are_no_choice(study: StudySummary) -> None:
    task = of(study)
    base, warm = task.methods["Base"], task.methods["Warm start"]
    assert base.values[SCORE] == pytest.approx(scores(study, "SFT", step=0))
    assert base.mean(CE).mean == pytest.approx(3.639)
    assert warm.values[SCORE] == pytest.approx(scores(study, "RLVR (ws.)", step=20))
    assert warm.mean(CE).mean == pytest.approx(3.639 + WARM[0])
    assert (base.selected, warm.selected) == (None, None)


def test_differences_are_paired_by_seed_and_problem(study: StudySummary) -> None:
    task = of(study)
    gap = mean_interval(task.methods["EBFT"].minus(task.methods["SFT"], SCORE).values())
    one, other = scores(study, "EBFT"), scores(study, "SFT")
    assert gap.mean == pytest.approx(np.mean([one[seed] - other[seed] for seed in (0, 1, 2)]))
    assert gap.n_sequences == 50
    assert gap.half_width < 0.2 * task.methods["SFT"].mean(SCORE).half_width


def test_of_several_learning_rates_the_other_seeds_choose(tmp_path: Path) -> None:
    rates = (1e-4, 2e-4, 3e-4, 4e-4, 5e-4)
    effects = {("SFT", rate): (0.0, 0.0) for rate in rates} | {"EBFT": (0.0, 0.0)}
    study = written(tmp_path / "s", effects=effects, noise=0.02, seeds=(0, 1, 2))
    method = of(study).methods["SFT"]
    trials, losses = study.results.trials, study.results.metrics
    last = losses.sort_values("step").groupby("trial_id")["cfm_loss"].last()
    sft = trials[trials["method"] == "sft"].set_index(["learning_rate", "seed"])["trial_id"]
    rows = study.results.evaluations
    rows = rows[(rows["metric"] == "pass_at_k") & (rows["step"] > 0)].set_index("trial_id")["value"]
    expected, chosen = {}, {}
    for seed in (0, 1, 2):
        means = {rate: np.mean([last[sft[rate, s]] for s in (0, 1, 2) if s != seed]) for rate in rates}
        chosen[seed] = min(rates, key=lambda rate: means[rate])
        expected[seed] = rows[sft[chosen[seed], seed]]
    assert len(set(chosen.values())) > 1
    assert method.values[SCORE] == pytest.approx(expected)
    assert method.is_choice
    spread = np.std(list(expected.values()), ddof=1)
    assert method.mean(SCORE).error == pytest.approx(spread, rel=1e-4)
    assert not of(study).methods["Base"].is_choice


def test_cfm_of_different_feature_maps_is_not_in_one_table(tmp_path: Path) -> None:
    def settings(key: Any) -> dict[str, Any]:
        return of_method(key) | ({"pooling": "mean"} if key == "SFT" else {})

    task = of(written(tmp_path / "s", settings=settings))
    assert not task.has_one_map
    assert task.columns == (CE, SCORE)


def test_a_completion_length_of_training_is_no_feature_map(tmp_path: Path) -> None:
    def settings(key: Any) -> dict[str, Any]:
        return of_method(key) | ({"completion_length": 16} if key == "SFT" else {})

    assert CFM in of(written(tmp_path / "s", settings=settings)).columns


def test_a_method_that_nothing_can_choose_for_is_named(tmp_path: Path) -> None:
    def settings(key: Any) -> dict[str, Any]:
        return of_method("EBFT") | {"pooling": key[1]} if isinstance(key, tuple) else of_method(key)

    effects = {("EBFT", "last_token"): (0.0, 0.0), ("EBFT", "mean"): (0.0, 0.0)}
    effects |= {"SFT": (0.0, 0.0), "RLVR": (0.0, 0.0)}  # type: ignore[dict-item]
    task = of(written(tmp_path / "s", effects=effects, settings=settings))
    assert task.unchosen == ("EBFT",)
    assert "EBFT" not in task.methods


def test_methods_of_several_warm_starts_share_no_row_of_one(tmp_path: Path) -> None:
    effects = {("EBFT (ws.)", 1e-4): (0.0, 0.0), ("RLVR (ws.)", 2e-4): (0.0, 0.0)}
    assert list(of(written(tmp_path / "s", effects=effects)).methods) == ["Base", "EBFT (ws.)", "RLVR (ws.)"]


def test_trials_that_did_not_finish_count_nowhere(tmp_path: Path) -> None:
    statuses = {("EBFT", 1): "failed", **{("RLVR", seed): "stopped" for seed in (0, 1, 2)}}
    task = of(written(tmp_path / "s", statuses=statuses))
    assert "RLVR" not in task.methods
    assert task.methods["EBFT"].values[SCORE].keys() == {0, 2}
    assert task.methods["Base"].values[SCORE].keys() == {0, 1, 2}


def test_a_step_where_a_method_has_not_begun_is_not_its_end(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", effects=EFFECTS, settings=of_method, warm=WARM)
    for row in load(folder).trials.to_dict("records"):
        recorder = TrialRecorder(folder, study="s", trial_id=row["trial_id"], attempt=0)
        rows = [{"benchmark": "mini", "metric": "pass_at_k", "position": 1, "value": 0.3, "count": 9}]
        warm = int(row["warm_start_steps"])
        for step in {0, warm // 2 if row["method"] == "ebft" else warm}:
            recorder.evaluations(step, rows)
    study = summarize(load(folder))
    (benchmark,) = benchmark_scores(study)
    assert [label for label, _, _ in benchmark.rows] == ["base model"]
    task = of(study)
    having = [name for name, method in task.methods.items() if SCORE in method.values]
    assert having == ["Base", "Warm start"]


def test_two_data_sets_are_two_tasks(tmp_path: Path) -> None:
    def settings(key: Any) -> dict[str, Any]:
        return of_method(key[0]) | ({"dataset": "mini_unstructured"} if key[1] else {})

    effects = dict.fromkeys(itertools.product(("SFT", "EBFT"), (False, True)), (0.0, 0.0))
    found = tasks(written(tmp_path / "s", effects=effects, settings=settings))
    assert {task.label for task in found} == {"dataset=mini_functions", "dataset=mini_unstructured"}
    assert all(list(task.methods) == ["Base", "SFT", "EBFT"] for task in found)


def test_studies_without_benchmarks_or_with_one_method_have_no_table(tmp_path: Path) -> None:
    assert tasks(summarize(load(write_study(tmp_path / "without")))) == ()
    assert tasks(written(tmp_path / "one", effects={"EBFT": (0.0, 0.0)})) == ()
