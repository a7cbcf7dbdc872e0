"""Figures: what is drawn for which study, in one set of colours, labelled, with no text on top of other text."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from ebft_study.analysis import importance
from ebft_study.analysis.effects import effects as analysis_effects
from ebft_study.analysis.methods import tasks
from ebft_study.analysis.summary import StudySummary, summarize
from ebft_study.report import drawing, effects, figures, outcomes, side_by_side
from ebft_study.report.drawing import ReportFigure
from ebft_study.results import load
from tests import notebooks
from tests.synthetic_study import PAPER_LIKE, write_study

ALWAYS = {"differences", "learning_curves", "cost_curves", "cfm_over_length", "entropy"}
OF_SETTINGS = {"importance", "marginal_effects", "parallel_coordinates"}


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
    assert set(drawn) == ALWAYS | OF_SETTINGS | {"heat_maps", "effects"}


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
        assert all(any(label) for label in labels) or report_figure.name == "parallel_coordinates"
        states_units = any("token" in text or "norm" in text or "FLOPs" in text for label in labels for text in label)
        assert states_units or report_figure.name in ("importance", "parallel_coordinates"), report_figure.name


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


def test_curves_over_cost_are_the_means_at_the_evaluations(grid: StudySummary, drawn: dict[str, ReportFigure]) -> None:
    flops, seconds = drawn["cost_curves"].figure.axes
    for model, by_flops, by_time in zip(grid.best_by_method(), flops.lines, seconds.lines, strict=True):
        rows = grid.results.metrics[grid.results.metrics["trial_id"].isin(model.trials["trial_id"])]
        means = rows.groupby("step")[["flops", "update_seconds", "cfm_loss"]].mean()
        assert by_flops.get_xdata() == pytest.approx(means["flops"].to_numpy())
        assert by_time.get_xdata() == pytest.approx(means["update_seconds"].to_numpy())
        for drawn_line in (by_flops, by_time):
            assert drawn_line.get_ydata() == pytest.approx(means["cfm_loss"].to_numpy())


def test_other_axes_are_drawn_along_each_setting(tmp_path: Path) -> None:
    effects = {(rate, kind): (-0.1, 0.0) for rate in (1e-4, 1e-2) for kind in ("none", "variant_i")}
    other = study(
        tmp_path / "s",
        effects=effects | {None: (-0.2, -0.01)},
        settings=lambda key: {"learning_rate": key[0], "whitening": key[1]},
        seeds=(0, 1),
    )
    by_name = {p.name: p for p in figures.draw_all(other)}
    of_settings = {"settings", "effects", "marginal_effects", "parallel_coordinates"}
    assert set(by_name) == ALWAYS | of_settings, "four are too few to rank"
    assert len(by_name["settings"].figure.axes) == 4
    with matplotlib.rc_context(drawing.RC):
        assert overlapping_texts(by_name["settings"].figure) == []
        assert texts_outside(by_name["settings"].figure) == []


def along_learning_rate(key: tuple[float, str, float]) -> tuple[float, float]:
    """Best at 1e-4; nothing else has an effect."""
    distance = abs(math.log10(key[0]) + 4)
    return (0.02 * distance, 0.05 * distance)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> StudySummary:
    """A range, names and numbers; two configurations are incomplete."""
    rates = [float(f"{10**exponent:.2g}") for exponent in np.linspace(-6, -3.2, 8)]
    keys = [(rate, *kind) for rate in rates for kind in (("none", 0.0), ("variant_i", 0.0), ("none", 0.1))]
    return study(
        tmp_path_factory.mktemp("figures") / "mixed",
        effects={**{key: along_learning_rate(key) for key in keys}, None: (-0.2, -3.0)},
        settings=lambda key: {"learning_rate": key[0], "whitening": key[1], "gamma": key[2]},
        seeds=(0, 1),
        steps=4,
        log_every=4,
        statuses={(keys[0], 0): "stopped", (keys[1], 1): "failed"},
    )


def test_importance_shows_each_share_beside_its_threshold(mixed: StudySummary) -> None:
    report_figure = {p.name: p for p in figures.draw_all(mixed)}["importance"]
    (axes,) = report_figure.figure.axes
    (group,) = importance.varied_groups(mixed)
    ranking = importance.importances(mixed, group)
    assert axes.get_yticklabels()[0].get_text() == "lr (learning_rate)"
    assert [bar.get_width() for bar in axes.patches] == [each.share for each in ranking]
    marks = [line.get_xdata()[0] for line in axes.lines if line.get_label() == "threshold without effect"]
    assert marks == [each.threshold for each in ranking]
    assert (
        "Among 22 configurations (2 incomplete left out, some for their values: stopped early)" in report_figure.caption
    )
    assert "lr clearly matters; lr is first in" in report_figure.caption


def test_parallel_lines_are_complete_configurations_through_their_values(mixed: StudySummary) -> None:
    report_figure = {p.name: p for p in figures.draw_all(mixed)}["parallel_coordinates"]
    (axes,) = report_figure.figure.axes
    lines = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert sum(len(line.get_xdata()) == 4 for line in lines) == 22, "three settings and the objective; no baseline"
    assert sum(len(line.get_xdata()) == 3 for line in lines) == 2, "incomplete ones have no outcome"
    best = max(lines, key=lambda line: line.get_zorder())
    names = [label.get_text() for label in axes.get_xticklabels()]
    at_rate = names.index("lr\n(learning_rate)")
    heights = [line.get_ydata()[at_rate] for line in lines]
    assert best.get_ydata()[3] == 0, "the lowest objective"
    assert len({round(height, 6) for height in heights}) == 8, "a range has its own scale"
    assert sorted({round(height, 6) for height in heights})[1] == pytest.approx(1 / 7, abs=0.01), "which is logarithmic"
    assert "2 configurations without a result for every seed" in report_figure.caption


def test_text_of_figures_of_settings_is_readable(mixed: StudySummary) -> None:
    with matplotlib.rc_context(drawing.RC):
        for report_figure in figures.draw_all(mixed):
            if report_figure.name in {*OF_SETTINGS, "effects"}:
                assert overlapping_texts(report_figure.figure) == [], report_figure.name
                assert texts_outside(report_figure.figure) == [], report_figure.name


def test_average_effects_are_those_of_the_analysis(grid: StudySummary, drawn: dict[str, ReportFigure]) -> None:
    (group,) = importance.varied_groups(grid)
    for axes, name in zip(drawn["marginal_effects"].figure.axes, ("alpha", "gamma"), strict=True):
        effect = importance.marginal_effect(grid, group, name)
        assert effect is not None
        assert list(axes.containers[0].lines[0].get_ydata()) == [each.mean for each in effect.effects]


def test_one_setting_has_no_figure_of_several(tmp_path: Path) -> None:
    effects = {1e-4 * i: (0.0, 0.1 * i) for i in range(1, 11)}
    one = study(tmp_path / "s", effects=effects, settings=lambda key: {"learning_rate": key}, seeds=(0,))
    assert not OF_SETTINGS & {p.name for p in figures.draw_all(one)}


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


def test_effects_are_drawn_with_their_intervals(tmp_path: Path) -> None:
    networks = summarize(load(notebooks.networks(tmp_path / "study")))
    (report_figure,) = figures.draw(networks, effects.figure)
    panels = report_figure.figure.axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        "Held-out CE", "Held-out CFM, 8 tokens", "Held-out Judge CFM",
    ]  # fmt: skip
    for axes, metric in zip(panels, ("ce_loss", "cfm_loss", "judge_cfm_loss"), strict=True):
        expected = analysis_effects(networks, ("network",), metric)
        drawn = [line for line in axes.get_lines() if line.get_marker() == "o"]
        means = [float(line.get_xdata()[0]) for line in drawn]  # type: ignore[index]
        assert means == pytest.approx([each.difference.mean for each in expected])
        filled = [line.get_markerfacecolor() != "white" for line in drawn]
        assert filled == [each.difference.side != "unclear" for each in expected]
    with matplotlib.rc_context(drawing.RC):
        assert overlapping_texts(report_figure.figure) == []


def test_methods_are_drawn_at_their_means_with_the_base_model(tmp_path: Path) -> None:
    compared = summarize(load(notebooks.methods(tmp_path / "study")))
    (report_figure,) = figures.draw(compared, side_by_side.figure)
    (task,) = tasks(compared)
    for axes, column in zip(report_figure.figure.axes, task.columns, strict=True):
        drawn = [float(line.get_xdata()[0]) for line in axes.get_lines() if line.get_marker() == "o"]  # type: ignore[index]
        assert drawn == pytest.approx([method.mean(column).mean for method in task.methods.values()])
        (base,) = (line for line in axes.get_lines() if line.get_linestyle() == "--")
        assert base.get_xdata()[0] == task.methods["Base"].mean(column).mean  # type: ignore[index]
    with matplotlib.rc_context(drawing.RC):
        assert overlapping_texts(report_figure.figure) == []


def test_rlvr_is_among_the_curves_of_methods(tmp_path: Path) -> None:
    compared = summarize(load(notebooks.methods(tmp_path / "study")))
    (report_figure,) = figures.draw(compared, figures.length_profile)
    labels = [text.get_text() for text in report_figure.figure.legends[0].get_texts()]
    assert sum("RLVR" in label for label in labels) == 1


def test_texts_of_users_are_no_formulas_and_powers_of_ten_are() -> None:
    """Half a formula would end the report."""
    hostile = "$\\frac{1}{$ of $x"
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([1e-4, 1e-2], [0, 1], label=hostile)
    axes.set(xscale="log", xlabel=hostile, title=hostile)
    axes.set_yticks([0, 1], [hostile, "b"])
    axes.legend()
    ReportFigure("x", "x", "x", figure)
    figure.canvas.draw()
    assert [label.get_parse_math() for label in axes.get_xticklabels()] == [True] * len(axes.get_xticklabels())
    assert not any(words.get_parse_math() for words in (axes.title, axes.xaxis.label, *axes.get_yticklabels()))
