"""Figures to hover over: what they show is in the tables, and they work in one file."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import vl_convert
from PIL import Image

from ebft_study.analysis.summary import StudySummary, summarize
from ebft_study.report import drawing, interactive
from ebft_study.report.interactive import InteractiveFigure
from ebft_study.results import load
from tests import notebooks
from tests.synthetic_study import PAPER_LIKE, write_study


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> StudySummary:
    folder = tmp_path_factory.mktemp("interactive") / "grid"
    return summarize(load(write_study(folder, statuses={((1.0, 0.0), 1): "stopped"})))


@pytest.fixture(scope="module")
def curves(grid: StudySummary) -> InteractiveFigure:
    figure = interactive.curves(grid)
    assert figure is not None
    return figure


def rows(part: dict[str, Any], spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The data of a chart or layer."""
    found: list[dict[str, Any]] = spec["datasets"][part["data"]["name"]]
    return found


def layers(chart: dict[str, Any]) -> list[dict[str, Any]]:
    return [inner for layer in chart["layer"] for inner in (layers(layer) if "layer" in layer else [layer])]


def test_a_panel_for_each_loss_with_a_line_for_each_configuration(
    grid: StudySummary, curves: InteractiveFigure
) -> None:
    assert [chart["title"] for chart in curves.spec["vconcat"]] == ["Validation CE", "Validation CFM"]
    for chart, metric in zip(curves.spec["vconcat"], ("ce_loss", "cfm_loss"), strict=True):
        (data,) = {json.dumps(rows(layer, curves.spec)) for layer in chart["layer"] if layer["mark"]["type"] == "line"}
        drawn = json.loads(data)
        measured = grid.results.metrics
        for c in grid.configurations:
            of_seeds = measured[measured["trial_id"].isin(c.finished["trial_id"])].groupby("step")[metric]
            lines = {row["step"]: row for row in drawn if row["line"] == c.name}
            assert set(lines) == {0, 20, 40}
            for step, expected in of_seeds.agg(["mean", "min", "max"]).iterrows():
                row = lines[step]
                assert [row["mean"], row["low"], row["high"]] == pytest.approx(expected.tolist(), abs=1e-5)
                assert row["n"] == c.n_finished
        stopped = [row for row in drawn if row["trials"] == "not finished"]
        assert {row["configuration"] for row in stopped} == {"α=1, γ=0"}
        assert [row["step"] for row in stopped] == [0, 20]
        labels = [layer for layer in chart["layer"] if layer["mark"]["type"] == "line"]
        units = {layer["encoding"]["y"]["title"] for layer in labels}
        assert units == {drawing.unit_of(metric)}


def test_what_a_pointer_shows_is_read_from_the_row(curves: InteractiveFigure) -> None:
    """Over the nearest point Vega-Lite reads names from the cell around it, which has none."""
    compiled = json.dumps(vl_convert.vegalite_to_vega(curves.spec))
    assert compiled.count("lowest seed") >= 2
    assert "voronoi" not in compiled


def test_colours_are_those_of_the_report(grid: StudySummary, curves: InteractiveFigure) -> None:
    styles = drawing.configuration_styles(grid)
    (line,) = (part for part in curves.spec["vconcat"][0]["layer"] if part["mark"]["type"] == "line")
    scale = line["encoding"]["color"]["scale"]
    expected = {c.label: styles[c.name].color for c in grid.configurations}
    assert dict(zip(scale["domain"], scale["range"], strict=True)) == expected


def test_more_configurations_than_fit_beside_the_curves_have_their_names_where_one_points(tmp_path: Path) -> None:
    effects = {1e-5 * rate: (-0.1, -0.01) for rate in range(1, 51)}
    options: dict[str, Any] = {"settings": lambda key: {"learning_rate": key}, "seeds": (0,)}
    figure = interactive.curves(summarize(load(write_study(tmp_path / "study", effects=effects, **options))))
    assert figure is not None
    (line,) = (part for part in figure.spec["vconcat"][0]["layer"] if part["mark"]["type"] == "line")
    assert line["encoding"]["color"]["legend"] is None
    assert len({row["configuration"] for row in rows(line, figure.spec)}) == 50
    assert Image.open(io.BytesIO(figure.png)).size[0] < 1000


def test_scores_on_benchmarks_are_panels_of_their_own(tmp_path: Path) -> None:
    figure = interactive.curves(summarize(load(notebooks.methods(tmp_path / "study"))))
    assert figure is not None
    assert [chart["title"] for chart in figure.spec["vconcat"]][-1] == "mini: pass@1"


def test_parallel_coordinates_have_every_complete_configuration(grid: StudySummary) -> None:
    figure = interactive.parallel_coordinates(grid)
    assert figure is not None
    (chart,) = figure.spec["vconcat"]
    line, reach = (part for part in layers(chart) if part["mark"]["type"] == "line")
    assert [each["field"] for each in reach["encoding"]["tooltip"]] == ["configuration", "objective", "seeds"]
    drawn = rows(line, figure.spec)
    complete = [c for c in grid.on_axes if c.is_complete]
    assert len(complete) == len(PAPER_LIKE) - 2
    assert {row["configuration"] for row in drawn} == {c.label for c in complete}
    for c in complete:
        mine = [row for row in drawn if row["configuration"] == c.label]
        assert [row["axis"] for row in mine] == ["α (alpha)", "γ (gamma)", "validation cfm_loss"]
        assert [row["objective"] for row in mine] == pytest.approx([c.validated()] * 3, abs=1e-5)
    heights = {row["configuration"]: row["height"] for row in drawn if row["place"] == 2}
    order = sorted(complete, key=lambda c: c.validated())
    assert heights[order[0].label] == 0.0
    assert heights[order[1].label] <= heights[order[-1].label]


def test_a_study_without_reports_or_settings_has_none(tmp_path: Path) -> None:
    statuses = {((1.0, 0.0), 0): "pending"}
    study = summarize(
        load(write_study(tmp_path / "s", effects={(1.0, 0.0): (0.0, 0.0)}, seeds=(0,), statuses=statuses))
    )
    assert interactive.curves(study) is None
    assert interactive.parallel_coordinates(study) is None


def test_a_page_needs_nothing_but_the_library_and_shows_a_picture_without_it(curves: InteractiveFigure) -> None:
    html = curves.html()
    picture = Image.open(io.BytesIO(curves.png))
    assert picture.format == "PNG"
    assert picture.size[0] > 500
    assert html.index("<img ") < html.index("<script>")
    assert "https://" not in html.replace(curves.spec["$schema"], "")
    assert len(interactive.library()) + len(html.encode()) < 1.5e6
    assert interactive.library().count("</script") == 1


def test_names_do_not_end_the_script(tmp_path: Path) -> None:
    figure = InteractiveFigure("x", "a <title>", "", {"title": "</script><b>"})
    object.__setattr__(figure, "png", b"")
    html = figure.html()
    assert html.count("</script") == 1
    assert "a &lt;title&gt;" in html
    (spec,) = re.findall(r"vegaEmbed\(place, (.*), \{actions", html)
    assert json.loads(spec) == figure.spec
