"""Figures: what is drawn for which study, in one set of colours, labelled, with no text on top of other text."""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from ebft_study.analysis.summary import StudySummary, summarize
from ebft_study.report import drawing, figures, outcomes
from ebft_study.report.drawing import ReportFigure
from ebft_study.results import load
from tests.synthetic_study import PAPER_LIKE, write_study

ALWAYS = {"differences", "learning_curves", "cfm_over_length", "entropy"}


def study(folder: Path, **options: object) -> StudySummary:
    return summarize(load(write_study(folder, **options)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> StudySummary:
    return study(tmp_path_factory.mktemp("figures") / "grid")


@pytest.fixture(scope="module")
def drawn(grid: StudySummary) -> dict[str, ReportFigure]:
    return {report_figure.name: report_figure for report_figure in figures.draw_all(grid)}


def visible_texts(figure: Figure) -> list[tuple[str, Bbox]]:
    """Text and extent of everything that is written, tick labels beyond an axis' limits aside: those are not drawn."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    beyond = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        beyond |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in beyond]
    return [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in texts]


def overlapping_texts(figure: Figure) -> list[tuple[str, str]]:
    texts = visible_texts(figure)
    return [
        (a, b)
        for (a, left), (b, right) in itertools.combinations(texts, 2)
        if left.padded(-1).overlaps(right.padded(-1))  # touching by a pixel is not overlap
    ]


def texts_outside(figure: Figure) -> list[str]:
    page = figure.bbox.padded(1)
    return [text for text, box in visible_texts(figure) if not (page.contains(*box.min) and page.contains(*box.max))]


def test_a_grid_of_two_numbers_gets_heat_maps(drawn: dict[str, ReportFigure]) -> None:
    assert set(drawn) == ALWAYS | {"heat_maps"}


def test_no_text_overlaps_or_leaves_the_page(drawn: dict[str, ReportFigure]) -> None:
    with matplotlib.rc_context(drawing.RC):
        for report_figure in drawn.values():
            assert overlapping_texts(report_figure.figure) == [], report_figure.name
            assert texts_outside(report_figure.figure) == [], report_figure.name


def test_every_panel_says_what_its_axes_are(drawn: dict[str, ReportFigure]) -> None:
    for report_figure in drawn.values():
        labels = [
            (axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")) for axes in report_figure.figure.axes
        ]
        assert all(any(label) for label in labels), report_figure.name
        assert any("token" in text for label in labels for text in label), f"{report_figure.name} states units"


def test_heat_maps_are_annotated_with_the_differences(grid: StudySummary, drawn: dict[str, ReportFigure]) -> None:
    written = {t.get_text() for t in drawn["heat_maps"].figure.findobj(Text)}
    for configuration in grid.ebft:
        for metric in ("ce_loss", "cfm_loss"):
            mean = configuration.change(metric).mean
            assert f"{mean:+.3f}".replace("-", "−") in written


def test_a_cell_that_was_not_run_is_told_from_one_that_did_not_finish(tmp_path: Path) -> None:
    effects = {(0.0, 0.0): (0.3, 0.2), (1.0, 0.0): (-0.02, -0.03), (1.0, 0.1): (-0.1, -0.03)}
    statuses = {((1.0, 0.1), seed): "failed" for seed in (0, 1)}
    incomplete = study(tmp_path / "s", effects=effects, statuses=statuses, seeds=(0, 1))
    report_figure = {p.name: p for p in figures.draw_all(incomplete)}["heat_maps"]
    written = [t.get_text() for t in report_figure.figure.findobj(Text)]
    assert written.count("not run") == 2, "once per metric: alpha=0, gamma=0.1"
    assert written.count("no finished\ntrial") == 2


def test_each_configuration_has_a_style_of_its_own(grid: StudySummary) -> None:
    styles = drawing.configuration_styles(grid)
    assert set(styles) == {c.name for c in grid.configurations}
    assert len({(each.color, str(each.linestyle)) for each in styles.values()}) == len(grid.configurations)


def _simulate(color: str, matrix: np.ndarray) -> np.ndarray:
    rgb = np.array(matplotlib.colors.to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(matrix @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    f = np.cbrt(np.maximum(xyz / (0.9505, 1.0, 1.089), 1e-4))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Dichromatic vision in linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
DEUTERANOPIA = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
PROTANOPIA = np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]])


def test_a_sequence_of_configurations_has_colours_apart(tmp_path: Path) -> None:
    effects = {1e-4 * i: (0.0, 0.0) for i in range(1, 12)}
    many = study(tmp_path / "s", effects=effects, settings=lambda key: {"learning_rate": key}, seeds=(0,))
    styles = [(each.color, str(each.linestyle)) for each in drawing.configuration_styles(many).values()]
    assert len(set(styles)) == len(effects)
    for vision in (np.eye(3), DEUTERANOPIA, PROTANOPIA):
        seen = [_simulate(color, vision) for color in {color for color, _ in styles}]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 15


@pytest.mark.parametrize("vision", [np.eye(3), DEUTERANOPIA, PROTANOPIA], ids=["normal", "deuteranopia", "protanopia"])
def test_colours_stay_apart_for_colour_blind_readers(grid: StudySummary, vision: np.ndarray) -> None:
    colors = [each.color for each in drawing.configuration_styles(grid).values()]
    for left, right in itertools.combinations(colors, 2):
        distance = np.linalg.norm(_simulate(left, vision) - _simulate(right, vision))
        assert distance > 15, (left, right)


def test_other_axes_are_drawn_along_each_setting(tmp_path: Path) -> None:
    effects = {(rate, kind): (-0.1, 0.0) for rate in (1e-4, 1e-2) for kind in ("none", "variant_i")}
    other = study(
        tmp_path / "s",
        effects=effects | {None: (-0.2, -0.01)},
        settings=lambda key: {"learning_rate": key[0], "whitening": key[1]},
        seeds=(0, 1),
    )
    by_name = {p.name: p for p in figures.draw_all(other)}
    assert set(by_name) == ALWAYS | {"settings"}
    assert len(by_name["settings"].figure.axes) == 4
    with matplotlib.rc_context(drawing.RC):
        assert overlapping_texts(by_name["settings"].figure) == []
        assert texts_outside(by_name["settings"].figure) == []


def test_many_configurations_are_cut_to_the_best_and_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "MAX_LINES", 3)
    monkeypatch.setattr(outcomes, "MAX_ROWS", 4)
    effects = {1e-4 * i: (-0.01, -0.01 * i) for i in range(1, 8)} | {None: (-0.2, 0.1)}
    many = study(tmp_path / "s", effects=effects, settings=lambda key: {"learning_rate": key}, seeds=(0,))
    by_name = {p.name: p for p in figures.draw_all(many)}
    assert "5 more are in the table" in by_name["learning_curves"].caption
    assert "4 more are in the table" in by_name["differences"].caption
    labels = [t.get_text() for t in by_name["differences"].figure.findobj(Text)]
    assert {"lr=7e-4", "lr=6e-4", "lr=5e-4"} <= set(labels), "the lowest CFM stays"
    assert "SFT" in labels, "baselines stay although their CFM is the worst"


def test_a_diverging_line_does_not_flatten_the_others(tmp_path: Path) -> None:
    effects = {**{k: PAPER_LIKE[k] for k in ((1.0, 0.0), (1.0, 0.1), None)}, (0.0, 0.0): (30.0, 12.0)}
    by_name = {p.name: p for p in figures.draw_all(study(tmp_path / "s", effects=effects, seeds=(0, 1)))}
    ce, cfm = by_name["learning_curves"].figure.axes[:2]
    assert ce.get_ylim()[1] - ce.get_ylim()[0] < 2
    assert cfm.get_ylim()[1] - cfm.get_ylim()[0] < 1


def test_nothing_is_drawn_from_nothing(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("question: q\n")
    assert figures.draw_all(summarize(load(tmp_path))) == []
