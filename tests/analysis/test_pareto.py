"""The Pareto front: against the definition, against Optuna's, and in the report."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from optuna.distributions import FloatDistribution

from ebft_study.analysis import pareto
from ebft_study.analysis.settings import objectives
from ebft_study.analysis.summary import StudySummary, summarize
from ebft_study.report import outcomes, write_report
from ebft_study.results import load
from tests.synthetic_study import write_study

BOTH = [{"metric": "ce_loss", "mode": "min"}, {"metric": "cfm_loss", "mode": "min"}]
# (alpha, gamma) -> change of (CE, CFM): the first three trade one for the other, the fourth is worse than the second.
EFFECTS = {
    (1.0, 0.0): (0.30, -0.30),
    (1.0, 0.1): (0.10, -0.20),
    (0.5, 0.0): (-0.10, 0.00),
    (0.5, 0.1): (0.20, -0.10),
    None: (-0.50, -0.50),
}


@pytest.mark.parametrize("modes", list(itertools.product(("min", "max"), repeat=2)))
def test_the_front_is_that_of_optuna(modes: tuple[str, str]) -> None:
    values = np.random.default_rng(0).integers(0, 6, (40, 2)).astype(float)  # with ties and equals
    study = optuna.create_study(directions=[f"{mode}imize" for mode in modes])
    for x, y in values:
        study.add_trial(
            optuna.create_trial(params={"x": x}, distributions={"x": FloatDistribution(0, 9)}, values=[x, y])
        )
    ours = {tuple(row) for row, best in zip(values, pareto.front(values.tolist(), modes), strict=True) if best}
    assert ours == {tuple(trial.values) for trial in study.best_trials}


def test_equal_rows_are_both_on_the_front_and_nothing_has_none() -> None:
    assert pareto.front([(1.0, 2.0), (1.0, 2.0), (1.0, 3.0)], ["min", "min"]) == [True, True, False]
    assert pareto.front([], ["min", "min"]) == []


def summary_of(folder: Path, objective: object = BOTH, **changes: object) -> StudySummary:
    write_study(folder, effects=EFFECTS, noise=0.001, **changes)  # type: ignore[arg-type]
    content = yaml.safe_load((folder / "study.yaml").read_text())
    (folder / "study.yaml").write_text(yaml.safe_dump({**content, "objective": objective}))
    return summarize(load(folder))


def test_the_table_lists_the_front_without_baselines(tmp_path: Path) -> None:
    study = summary_of(tmp_path / "s")
    points = pareto.points(study)
    on_front = {tuple(p.configuration.settings[k] for k in ("alpha", "gamma")) for p in points if p.on_front}
    assert on_front == {(1.0, 0.0), (1.0, 0.1), (0.5, 0.0)}
    assert points[-1].configuration.baseline == "sft"  # which would beat them all
    first = [point.values[0] for point in points if point.on_front]
    assert first == sorted(first)
    rows = pareto.rows(study)
    assert len(rows) == 3
    assert len(rows[0]["values"]) == 2
    figure = outcomes.pareto_front(study)
    assert figure
    assert "lower is better" in figure.figure.axes[0].get_xlabel()


def test_what_did_not_finish_is_not_compared(tmp_path: Path) -> None:
    stopped = {((0.5, 0.0), seed): "stopped" for seed in (0, 1, 2)}
    study = summary_of(tmp_path / "s", statuses=stopped)
    assert not any(point.configuration.settings["alpha"] == 0.5 and point.on_front for point in pareto.points(study)
                   if point.configuration.settings["gamma"] == 0.0)  # fmt: skip


def test_one_objective_has_no_front(tmp_path: Path) -> None:
    study = summary_of(tmp_path / "s", BOTH[0], seeds=(0,))
    assert pareto.rows(study) == []
    assert outcomes.pareto_front(study) is None
    assert objectives(study.results.spec) == [("ce_loss", "min")]
    assert objectives({}) == []


def test_the_page_has_figure_and_table(tmp_path: Path) -> None:
    summary_of(tmp_path / "s", [*BOTH, {"metric": "reward", "mode": "max"}], seeds=(0,))
    page = write_report(tmp_path / "s").read_text()
    assert "The Pareto front" in page
    assert "min ce_loss, min cfm_loss and max reward" in page
    assert (tmp_path / "s" / "figures" / "pareto_front.svg").exists()
