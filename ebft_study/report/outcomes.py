"""Figures of outcomes: configurations against the base model, over a grid, along each setting, and the Pareto front.

Differences are to the base model of the same trial: below zero is a gain, for CE and CFM alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ebft_study import text
from ebft_study.analysis import pareto
from ebft_study.analysis.configuration import Map, equal_but_for
from ebft_study.analysis.curves import DIVERGENCE
from ebft_study.analysis.selection import ranked
from ebft_study.analysis.settings import assignments, is_number, objectives, sort_key
from ebft_study.analysis.statistics import Interval
from ebft_study.analysis.summary import Configuration, StudySummary
from ebft_study.report import drawing
from ebft_study.report.drawing import ReportFigure, Style

# More rows than this cannot be distinguished: the best by validation are drawn, and the caption says so.
MAX_ROWS = 30
MAX_SETTINGS = 6
MAX_LABELS = 12
# Nor can more lines along a setting.
MAX_LINES = 24


def differences(study: StudySummary) -> ReportFigure | None:
    """Every configuration's held-out CE and CFM minus the base model's, with intervals and single seeds."""
    rows = _measured(study.configurations)
    if not rows:
        return None
    shown, omitted = drawing.most_relevant(study, rows, MAX_ROWS)
    styles = drawing.configuration_styles(study)
    figure = Figure(figsize=(8.4, 1.3 + 0.3 * len(shown)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, metric in zip(panels, drawing.TITLES, strict=True):
        label = f"difference to base model ({drawing.unit_of(metric)})"
        drawing.interval_panel(axes, 0, title=drawing.panel_title(study, metric), label=label)
        for y, configuration in enumerate(shown):
            _difference_row(axes, y, configuration, metric, styles[configuration.name])
    drawing.row_labels(panels[0], [c.label for c in shown])
    caption = (
        "Mean over seeds of the held-out value after training minus the base model's, with the 95 % interval over "
        "seeds; the small dots below it are single seeds. Left of the dashed line is better than the base model."
        f"{omitted}"
    )
    return ReportFigure("differences", "Every configuration against the base model", caption, figure)


def _measured(configurations: Sequence[Configuration]) -> list[Configuration]:
    return [c for c in configurations if any(c.change(metric).n for metric in drawing.TITLES)]


def _difference_row(axes: Axes, y: int, configuration: Configuration, metric: str, style: Style) -> None:
    final, base = (values.get((metric, None), {}) for values in (configuration.final, configuration.base))
    singles = [final[seed] - base[seed] for seed in final if seed in base]
    axes.plot(singles, [y + 0.26] * len(singles), ".", color=style.color, alpha=0.6, markersize=4, markeredgewidth=0)
    drawing.interval_row(axes, y, configuration.change(metric), style)


# --- a grid of two settings ------------------------------------------------------------------------------------


def heat_maps(study: StudySummary) -> ReportFigure | None:
    """Held-out CE and CFM over two numeric settings, as differences to the base model."""
    if not _is_grid(study) or not _measured(study.on_axes):
        return None
    down, across = study.varying  # the first setting of a configuration goes down
    columns, rows = (sorted({c.settings[name] for c in study.on_axes}) for name in (across, down))
    width = min(max(2.6 + 1.9 * len(columns), 7.2), 11)
    figure = Figure(figsize=(width, 1.5 + 0.75 * len(rows)), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2, sharey=True), drawing.TITLES, strict=True):
        cells = {(c.settings[down], c.settings[across]): c.change(metric) for c in study.on_axes}
        _heat_map(axes, [[cells.get((row, column)) for column in columns] for row in rows], drawing.unit_of(metric))
        axes.set_xticks(np.arange(len(columns)) + 0.5, [text.setting(value) for value in columns])
        axes.set_yticks(np.arange(len(rows)) + 0.5, [text.setting(value) for value in rows])
        axes.set_title(drawing.panel_title(study, metric))
        axes.set_xlabel(text.named(across))
    figure.axes[0].set_ylabel(text.named(down))
    caption = (
        "Difference to the base model, mean over seeds, with the half-width of its 95 % interval below. Blue is "
        "better than the base model, red worse. The colour scale may saturate so that one outlier does not hide "
        "the rest; the numbers are exact."
    )
    title = f"Held-out CE and CFM over {text.symbol(down)} × {text.symbol(across)}"
    return ReportFigure("heat_maps", title, caption, figure)


def _is_grid(study: StudySummary) -> bool:
    return len(study.varying) == 2 and all(is_number(c.settings[n]) for c in study.on_axes for n in study.varying)


def _heat_map(axes: Axes, cells: Sequence[Sequence[Interval | None]], unit: str) -> None:
    """Draw rows of differences; None where a configuration was not run."""
    values = np.array([[cell.mean if cell else math.nan for cell in row] for row in cells])
    limit = _color_limit(values)
    image = axes.pcolormesh(values, cmap="RdBu_r", norm=Normalize(-limit, limit), edgecolors="white", linewidth=1.5)
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            _annotate_cell(axes, x + 0.5, y + 0.5, cell, limit)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    saturated = bool(np.nanmax(np.abs(values), initial=0) > limit)
    bar = axes.figure.colorbar(image, ax=axes, extend="both" if saturated else "neither", fraction=0.05, pad=0.02)
    bar.set_label(unit, size=8)
    bar.ax.tick_params(labelsize=7.5)
    bar.outline.set_visible(False)


def _annotate_cell(axes: Axes, x: float, y: float, change: Interval | None, limit: float) -> None:
    if change is None or change.n == 0:
        missing = "not run" if change is None else "no finished\ntrial"
        axes.text(x, y, missing, ha="center", va="center", fontsize=7.5, color=drawing.QUIET)
        return
    color = "white" if abs(change.mean) > 0.62 * limit else drawing.INK
    decimals = text.decimals_of(limit)
    margin = f"± {text.number(change.half_width, decimals)}" if change.n > 1 else "one seed"
    axes.text(x, y + 0.1, text.signed(change.mean, decimals), ha="center", va="center", fontsize=10, color=color)
    axes.text(x, y - 0.2, margin, ha="center", va="center", fontsize=7.5, color=color)


def _color_limit(values: np.ndarray) -> float:
    """Symmetric limit that one outlier does not set: at most DIVERGENCE times the median size."""
    sizes = np.abs(values[np.isfinite(values)])
    return float(min(sizes.max(), DIVERGENCE * np.median(sizes)) or 1.0) if len(sizes) else 1.0


# --- along each setting ----------------------------------------------------------------------------------------


def along_settings(study: StudySummary) -> ReportFigure | None:
    """Held-out change of CE and CFM along each varying setting, where no heat map shows them."""
    drawn = _measured(study.on_axes)
    if not study.varying or _is_grid(study) or not drawn:
        return None
    names = study.varying[:MAX_SETTINGS]
    figure = Figure(figsize=(8.4, 0.5 + 2.5 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 2, squeeze=False)
    for row, name in zip(panels, names, strict=True):
        for axes, metric in zip(row, drawing.TITLES, strict=True):
            _along(axes, study, name, metric, drawn)
            axes.set_xlabel(text.named(name))
        row[0].set_ylabel("difference to base model")
        if 1 < len(row[1].get_legend_handles_labels()[1]) <= MAX_LABELS:
            row[1].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7.5)
    for axes, metric in zip(panels[0], drawing.TITLES, strict=True):
        axes.set_title(drawing.panel_title(study, metric))
    others = [text.symbol(name) for name in study.varying[MAX_SETTINGS:]]
    more = f" Not drawn: {text.listed(others)}." if others else ""
    fewer = (
        f" Where a setting has more lines than {MAX_LINES}, those with the best configurations by validation "
        f"{study.objective[0]} are drawn."
    )
    caption = (
        "Held-out value minus the base model's, mean over seeds with its 95 % interval, "
        "against each setting that varies. Lines join configurations that differ in this setting alone; a row's "
        f"colours show the other settings. Below the dashed line is better than the base model.{more}"
        + fewer
        * any(len(_lines(study, name, drawn)) > MAX_LINES for name in names)
    )
    return ReportFigure("settings", "Outcome along each setting", caption, figure)


def _lines(study: StudySummary, name: str, drawn: Sequence[Configuration]) -> dict[Map, list[Configuration]]:
    """Configurations that differ in this setting alone, by their other settings."""
    return equal_but_for(name, study.varying, [c for c in drawn if name not in c.unread])


def _best_lines(lines: dict[Map, list[Configuration]]) -> dict[Map, list[Configuration]]:
    """At most `MAX_LINES`, those with the best configurations, in their order."""
    if len(lines) <= MAX_LINES:
        return lines
    ranks = {c.name: rank for rank, c in enumerate(ranked(c for line in lines.values() for c in line))}
    order = sorted(lines, key=lambda others: min(ranks.get(c.name, len(ranks)) for c in lines[others]))
    chosen = set(order[:MAX_LINES])
    return {others: line for others, line in lines.items() if others in chosen}


def _along(axes: Axes, study: StudySummary, name: str, metric: str, drawn: Sequence[Configuration]) -> None:
    groups = _best_lines(_lines(study, name, drawn))
    values = sorted({c.settings[name] for line in groups.values() for c in line}, key=sort_key)
    place, numeric = dict(zip(values, drawing.setting_axis(axes, values), strict=True)), all(map(is_number, values))
    axes.axhline(0, color=drawing.BASE_COLOR, linestyle="--", linewidth=1.2)
    for index, (others, style) in enumerate(zip(groups, drawing.sequence(len(groups)), strict=True)):
        label = assignments(dict(others), [key for key, _ in others])
        dodge = 0.0 if numeric else 0.16 * ((index + 0.5) / len(groups) - 0.5)
        x = [place[c.settings[name]] + dodge for c in groups[others]]
        changes = [c.change(metric) for c in groups[others]]
        margins = [change.half_width if change.n > 1 else 0.0 for change in changes]
        axes.errorbar(
            x, [change.mean for change in changes], yerr=margins, color=style.color, linestyle=style.linestyle,
            marker="o", markersize=5, linewidth=0.9, elinewidth=1.5, label=drawing.wrapped(label) or None,
        )  # fmt: skip


# --- several objectives ----------------------------------------------------------------------------------------


def pareto_front(study: StudySummary) -> ReportFigure | None:
    """The first two objectives of every configuration, with the front marked."""
    goals = objectives(study.results.spec)
    shown = pareto.points(study) if len(goals) > 1 else []
    front = sorted(point.values[:2] for point in shown if point.on_front)
    if not front:
        return None
    styles = drawing.configuration_styles(study)
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    if len(goals) == 2:
        # Steps turn away from the region that the front dominates.
        corner: Any = "post" if goals[0][1] == "min" else "pre"
        axes.step(*zip(*front, strict=True), where=corner, color=drawing.INK, linewidth=1.0, zorder=1)
    label_points = sum(point.on_front or point.configuration.baseline is not None for point in shown) <= MAX_LABELS
    for point in shown:
        x, y = point.values[:2]
        is_baseline, color = point.configuration.baseline is not None, styles[point.configuration.name].color
        axes.scatter(
            x,
            y,
            s=46 if point.on_front else 26,
            facecolor=color if point.on_front or is_baseline else "none",
            edgecolor=color,
            marker="s" if is_baseline else "o",
            zorder=2,
        )
        if label_points and (point.on_front or is_baseline):
            axes.annotate(point.configuration.label, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7)
    axes.margins(x=0.12, y=0.08)
    labels = [f"{metric} ({'lower' if mode == 'min' else 'higher'} is better)" for metric, mode in goals]
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    of_all = f" The front is that of all {len(goals)} objectives, of which two are drawn."
    more = of_all if len(goals) > 2 else ""
    caption = (
        "Validation values after training, means over seeds. Filled circles: no other configuration is at least as "
        f"good in every objective and better in one. Squares are baselines.{more}"
    )
    return ReportFigure("pareto_front", "The Pareto front", caption, figure)
