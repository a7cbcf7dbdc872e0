"""Lineage: whose weights a trial exploited, read from the events of a study."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebft_study import results
from ebft_study.analysis.summary import summarize
from ebft_study.report import content
from ebft_study.results.lineage import EXPLOIT, lineage, settings_in_force
from tests.synthetic_study import PAPER_LIKE, write_study

SMALL = {key: PAPER_LIKE[key] for key in ((1.0, 0.0), (1.0, 0.1), None)}
EXPLOITED = {
    "step": 20, "donor": "t000", "donor_step": 25, "donor_attempt": 0, "score": 2.5, "donor_score": 2.25,
    "checkpoint": "train/t001-2/checkpoint_00000025", "before": {"gamma": 0.1}, "after": {"gamma": 0.05},
}  # fmt: skip


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = write_study(tmp_path / "s", effects=SMALL, seeds=(0,))
    recorder = results.StudyRecorder(folder, study="s")
    recorder.event(EXPLOIT, "continues", trial_id="t001", attempt=2, **EXPLOITED)
    recorder.event(
        EXPLOIT, "continues", trial_id="t001", attempt=4, **{**EXPLOITED, "step": 40, "after": {"gamma": 0.2}}
    )
    return folder


def test_every_exploit_is_a_row_in_order(study: Path) -> None:
    for source in (study, results.load(study)):
        rows = lineage(source).drop(columns="time").to_dict("records")
        assert rows[0] == {"trial_id": "t001", "attempt": 2, **EXPLOITED}
        assert [row["attempt"] for row in rows] == [2, 4]


def test_the_settings_of_every_lineage_of_every_trial(study: Path) -> None:
    rows = settings_in_force(results.load(study)).to_dict("records")
    assert [(row["trial_id"], row["from_attempt"], row["gamma"]) for row in rows] == [
        ("t000", 0, 0.0), ("t001", 0, 0.1), ("t001", 2, 0.05), ("t001", 4, 0.2),
    ]  # fmt: skip


def test_a_study_without_exploits_has_an_empty_lineage(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", effects=SMALL, seeds=(0,))
    assert lineage(folder).empty
    assert list(lineage(folder).columns)[:3] == ["time", "trial_id", "attempt"]
    assert content.lineage_rows(summarize(results.load(folder))) == []


def test_the_report_has_a_line_for_each(study: Path) -> None:
    rows = content.lineage_rows(summarize(results.load(study)))
    assert rows[0] == {
        "trial": "t001", "step": "20", "donor": "t000", "donor_step": "25", "score": "2.500", "donor_score": "2.250",
        "before": "γ=0.1", "after": "γ=0.05",
    }  # fmt: skip
