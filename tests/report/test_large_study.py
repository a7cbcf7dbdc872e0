"""Reports of studies with more configurations than anybody reads, with small limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebft_study.analysis.summary import StudySummary, summarize
from ebft_study.report import collected, content, outcomes, page
from ebft_study.results import load
from tests.synthetic_study import write_study

EFFECTS = {(a, g): (0.0, -0.1 * a - 0.05 * g) for a in (0.0, 0.5, 1.0) for g in (0.0, 0.1)} | {None: (-0.2, 0.0)}
STATUSES = {((0.0, 0.0), 0): "failed", ((0.5, 0.0), 1): "stopped"}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudySummary:
    folder = tmp_path_factory.mktemp("large") / "s"
    return summarize(load(write_study(folder, effects=EFFECTS, seeds=(0, 1), statuses=STATUSES, with_scores=True)))


def test_tables_of_a_page_list_the_best_and_the_baselines(study: StudySummary) -> None:
    every = [row.label for row in content.configuration_rows(study)]
    few = [row.label for row in content.configuration_rows(study, 2)]
    assert few == [*every[:3], every[-1]]  # the base model, the two best, SFT
    assert every[-1] == "SFT"
    names = {c.label for c in content.listed(study, 2)}
    assert names == {*few} - {"base model"}
    assert {row["configuration"] for row in content.trial_rows(study, 2)} == names
    assert {row.label for row in content.evidence_rows(study, 2)} <= names
    assert len(content.cost_rows(study, 2)) == 6
    assert len(content.trial_rows(study)) == len(content.cost_rows(study)) == 14


def test_trials_that_did_not_finish_are_all_named(study: StudySummary) -> None:
    assert [row["status"] for row in content.unfinished_rows(study)] == ["failed", "stopped"]


def test_a_page_says_what_it_leaves_out(study: StudySummary, monkeypatch: pytest.MonkeyPatch) -> None:
    assert content.omitted(study) == ""
    monkeypatch.setattr(content, "MAX_CONFIGURATIONS", 2)
    monkeypatch.setattr(content, "MAX_UNFINISHED", 1)
    monkeypatch.setattr(page, "draw_all", lambda study: [])
    shown = Path(str(page.write_summary(study))).read_text()
    assert shown.count("Of 6 configurations, tables list the 2 best by validation cfm_loss") == 2
    assert "and 1 more" in shown
    assert "failed after" in shown
    assert "Held-out values of the best configurations" in shown
    table = collected.tables(study)["outcomes"]
    assert len(table.rows) == 8
    assert table.caption.startswith("Held-out values of all configurations")


def test_of_many_lines_along_a_setting_those_with_the_best_configurations_are_drawn(
    study: StudySummary, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = outcomes._lines(study, "gamma", study.on_axes)
    assert [dict(others)["alpha"] for others in lines] == [0.0, 0.5, 1.0]
    assert outcomes._best_lines(lines) == lines
    monkeypatch.setattr(outcomes, "MAX_LINES", 2)
    assert [dict(others)["alpha"] for others in outcomes._best_lines(lines)] == [0.5, 1.0]
