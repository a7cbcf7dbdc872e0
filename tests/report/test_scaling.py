"""The report's section on scaling, on studies whose laws are known."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ebft_study.analysis.scaling.fits import Estimate
from ebft_study.analysis.scaling.study import laws
from ebft_study.analysis.summary import StudySummary, summarize
from ebft_study.report import scaling
from ebft_study.report.page import write
from ebft_study.results import load
from ebft_study.storage import storage_path
from tests.analysis.scaling.test_points import BATCHES, SEQUENCE, SIZES, STEPS, loss, written
from tests.synthetic_study import write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudySummary:
    """Data of one size: EBFT makes two tokens of one, at three times the FLOPs."""
    keys = [(method, "tiny-1m", batch) for method in ("sft", "ebft") for batch in (*BATCHES, 64)]
    return written(tmp_path_factory.mktemp("scaling") / "study", keys, noise=1e-3)


def test_a_study_without_an_axis_of_scale_has_no_section(tmp_path: Path) -> None:
    study = summarize(load(write_study(tmp_path / "study")))
    assert scaling.section(study) is None
    assert scaling.figure(study) is None
    page = Path(str(write(storage_path(tmp_path / "study")))).read_text()
    assert 'id="scaling"' not in page


def test_rows_have_the_law_that_made_the_study_and_its_held_out_score(study: StudySummary) -> None:
    section = scaling.section(study)
    assert section is not None
    measures = ("CE", "gain in CFM")
    assert [row[:2] for row in section.rows] == [(m, name) for m in measures for name in ("EBFT", "SFT")]
    exponents = {"CE": (r"(?:alpha|beta)", 0.5), "gain in CFM": ("B", 1.5)}
    for measure, _, points, form, values, score in section.rows:
        assert points.split() == ["6", "scales,", "12", "trials"]
        assert "tokens" in form
        name, true = exponents[measure]
        exponent = re.search(rf"{name} ([\d.]+) \(([\d.]+) to ([\d.]+)\)", values)
        assert exponent
        value, low, high = map(float, exponent.groups())
        assert low < value < high
        assert low < true < high
        assert ("A 0." in values) == (measure == "gain in CFM"), "an asymptote is a result, a coefficient is none"
        assert re.match(
            r"the last half of the data: error [\d.]+ % \(last value [\d.]+ %\), 90 % interval holds \d of 1", score
        )
    for measure in measures:
        factors = {row[2]: row[3:] for row in section.speedups if row[:2] == (measure, "EBFT")}
        assert re.match(r"(1\.9|2\.?0?)\d* \(", factors["data"][0])
        assert factors["data"][1] == "–"
        assert factors["FLOPs"][1] == "3.00 to 3.00"
        assert re.match(r"0\.6\d* \(", factors["FLOPs"][0])
    assert [note.partition(":")[0] for note in section.notes] == list(measures)
    for note in section.notes:
        assert "One law for all methods" in note
        assert "do not contradict one multiplier" in note


def test_a_law_that_misses_what_was_held_out_is_not_to_be_trusted(study: StudySummary) -> None:
    found = laws(study)
    assert found is not None
    assert found.shared is not None
    assert found.shared.score is not None
    for covered, is_missed in ((0, True), (found.shared.score.n_scales, False)):
        score = replace(found.shared.score, covered=covered)
        note = scaling._note(replace(found, shared=replace(found.shared, score=score)))
        assert ("misses most of what was held out" in note) == is_missed


def test_the_figure_has_every_point_and_the_laws(study: StudySummary) -> None:
    figure = scaling.figure(study)
    assert figure is not None
    axes, _ = figure.figure.axes
    centers = {
        (round(float(line.get_xdata()[0])), round(float(line.get_ydata()[0]), 2))  # type: ignore[index]
        for line in axes.get_lines()
        if len(line.get_xdata()) == 1  # type: ignore[arg-type]
    }
    for batch in (*BATCHES, 64):
        tokens = batch * SEQUENCE * STEPS
        for factor in (1, 2):
            assert any(x == tokens and abs(y - loss(1e6, factor * tokens)) < 0.02 for x, y in centers)
    curves = [line for line in axes.get_lines() if len(line.get_xdata()) == 40]  # type: ignore[arg-type]
    assert len(curves) == 2
    sft = curves[1]
    np.testing.assert_allclose(sft.get_ydata(), [loss(1e6, x) for x in sft.get_xdata()], atol=0.01)  # type: ignore[union-attr]


def test_the_page_says_why_there_is_no_law(tmp_path: Path) -> None:
    written(tmp_path / "study", [("sft", model, 4) for model in list(SIZES)[:3]])
    page = Path(str(write(storage_path(tmp_path / "study")))).read_text()
    section = page[page.index('id="scaling"') :]
    section = section[: section.index("<h2", 10)]
    assert "3 values of parameters: a law with an exponent and a floor passes through any three" in section
    assert "<svg" in section


@pytest.mark.parametrize(
    ("estimate", "words"),
    [
        (Estimate(0.34, 0.312, 0.371), "0.34 (0.312 to 0.371)"),
        (Estimate(1.2, 0.0, 1.9), "1.2 (up to 1.9)"),
        (Estimate(1.2, 0.4, float("inf")), "1.2 (above 0.4)"),
        (Estimate(1.2e7, 0.0, float("inf")), "1.2e7 (any)"),
    ],
)
def test_open_ends_are_in_words(estimate: Estimate, words: str) -> None:
    assert scaling._estimate(estimate) == words
