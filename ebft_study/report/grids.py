"""Figures of outcomes over settings: a heat map where two numbers span a grid, else plots along each setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ebft_study import text
from ebft_study.analysis.statistics import Interval
from ebft_study.report import style
from ebft_study.report.pictures import DIVERGENCE, TITLES, Picture, panel_title, unit_of
from ebft_study.report.tables import Configuration, Study, order

MAX_AXES = 6
MAX_LABELS = 8
MAX_CHARACTERS = 45


def heat_maps(study: Study) -> Picture | None:
    """Held-out CE and CFM over two numeric settings, as differences to the base model."""
    on_axes = [c for c in study.configurations if c.baseline is None]
    if not _is_grid(study, on_axes) or not any(c.change("cfm_loss").n or c.change("ce_loss").n for c in on_axes):
        return None
    across, down = _grid_axes(study)
    columns, rows = (sorted({c.settings[name] for c in on_axes}) for name in (across, down))
    width = min(2.6 + 1.9 * len(columns), 11)
    figure = Figure(figsize=(max(width, 7.2), 1.5 + 0.75 * len(rows)), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2, sharey=True), TITLES, strict=True):
        _heat_map(axes, figure, on_axes, metric, (across, columns), (down, rows))
        axes.set_title(panel_title(study, metric))
        axes.set_xlabel(text.named(across))
    figure.axes[0].set_ylabel(text.named(down))
    caption = (
        "Difference to the base model, mean over seeds, with the half-width of its 95 % interval below. Blue is "
        "better than the base model, red worse. The colour scale may saturate so that one outlier does not hide "
        "the rest; the numbers are exact."
    )
    title = f"{text.symbol(down)} × {text.symbol(across)}"
    return Picture("heat_maps", f"Held-out CE and CFM over {title}", caption, figure)


def _is_grid(study: Study, on_axes: Sequence[Configuration]) -> bool:
    return len(study.varying) == 2 and all(
        isinstance(c.settings[name], int | float) and not isinstance(c.settings[name], bool)
        for c in on_axes
        for name in study.varying
    )


def _grid_axes(study: Study) -> tuple[str, str]:
    """(across, down): the setting that stands first in the configuration goes down."""
    down, across = study.varying
    return across, down


def _heat_map(
    axes: Axes,
    figure: Figure,
    configurations: Sequence[Configuration],
    metric: str,
    across: tuple[str, list[Any]],
    down: tuple[str, list[Any]],
) -> None:
    (column_name, columns), (row_name, rows) = across, down
    cells = {(c.settings[row_name], c.settings[column_name]): c.change(metric) for c in configurations}
    values = np.array([[cells[r, k].mean if (r, k) in cells else math.nan for k in columns] for r in rows])
    limit = _color_limit(values)
    image = axes.pcolormesh(values, cmap="RdBu_r", norm=Normalize(-limit, limit), edgecolors="white", linewidth=1.5)
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            _annotate_cell(axes, x + 0.5, y + 0.5, cells.get((row, column)), limit, text.decimals_of(limit))
    axes.set_xticks(np.arange(len(columns)) + 0.5, [text.setting(v) for v in columns])
    axes.set_yticks(np.arange(len(rows)) + 0.5, [text.setting(v) for v in rows])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    saturated = bool(np.nanmax(np.abs(values), initial=0) > limit)
    bar = figure.colorbar(image, ax=axes, extend="both" if saturated else "neither", fraction=0.05, pad=0.02)
    bar.set_label(unit_of(metric), size=8)
    bar.ax.tick_params(labelsize=7.5)
    bar.outline.set_visible(False)


def _annotate_cell(axes: Axes, x: float, y: float, change: Interval | None, limit: float, places: int) -> None:
    if change is None or change.n == 0:
        missing = "not run" if change is None else "no finished\ntrial"
        axes.text(x, y, missing, ha="center", va="center", fontsize=7.5, color=style.QUIET)
        return
    color = "white" if abs(change.mean) > 0.62 * limit else style.INK
    axes.text(x, y + 0.1, text.signed(change.mean, places), ha="center", va="center", fontsize=10, color=color)
    margin = f"± {text.number(change.half_width, places)}" if change.n > 1 else "one seed"
    axes.text(x, y - 0.2, margin, ha="center", va="center", fontsize=7.5, color=color)


def _color_limit(values: np.ndarray) -> float:
    """Symmetric limit that one outlier does not set: at most DIVERGENCE times the median size."""
    sizes = np.abs(values[np.isfinite(values)])
    return float(min(sizes.max(), DIVERGENCE * np.median(sizes)) or 1.0) if len(sizes) else 1.0


def axis_plots(study: Study) -> Picture | None:
    """Held-out change of CE and CFM along each varying setting, where no heat map shows them."""
    on_axes = [c for c in study.configurations if c.baseline is None]
    drawn = [c for c in on_axes if c.change("ce_loss").n or c.change("cfm_loss").n]
    if not study.varying or _is_grid(study, on_axes) or not drawn:
        return None
    names = study.varying[:MAX_AXES]
    crowded = any(_crowded(_labels(drawn, name)) for name in names)
    figure = Figure(figsize=(8.4, 0.5 + (2.9 if crowded else 2.4) * len(names)))
    figure.subplots_adjust(
        left=0.09,
        right=0.83 if len(study.varying) > 1 else 0.98,
        top=1 - 0.3 / figure.get_figheight(),
        bottom=(0.3 if crowded else 0.2) / len(names),
    )
    figure.subplots_adjust(wspace=0.28, hspace=0.7 if crowded else 0.42)
    panels = figure.subplots(len(names), 2, squeeze=False)
    for row, name in zip(panels, names, strict=True):
        for axes, metric in zip(row, TITLES, strict=True):
            _along(axes, study, name, metric, drawn, labelled=metric == "cfm_loss")
            axes.set_xlabel(text.named(name))
        row[0].set_ylabel("difference to base model")
    for axes, metric in zip(panels[0], TITLES, strict=True):
        axes.set_title(panel_title(study, metric))
    others = [text.symbol(name) for name in study.varying[MAX_AXES:]]
    more = f" Not drawn: {text.listed(others)}." if others else ""
    caption = (
        "Held-out value minus the base model's for every configuration, mean over seeds with its 95 % interval, "
        "against each setting that varies. Grey lines join configurations that differ in this setting alone. "
        f"Below the dashed line is better than the base model.{more}"
    )
    return Picture("settings", "Outcome along each setting", caption, figure)


def _along(axes: Axes, study: Study, name: str, metric: str, drawn: Sequence[Configuration], *, labelled: bool) -> None:
    looks, ends = style.looks(study), []
    values = sorted({c.settings[name] for c in drawn}, key=order)
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    axes.axhline(0, color=style.BASE_COLOR, linestyle="--", linewidth=1.2)
    groups = _equal_but_for(study, name, drawn)
    for index, (others, group) in enumerate(groups.items()):
        dodge = 0.0 if numeric else 0.16 * ((index + 0.5) / len(groups) - 0.5)
        points = [(c, (c.settings[name] if numeric else values.index(c.settings[name])) + dodge) for c in group]
        means = [c.change(metric).mean for c in group]
        if len(group) > 1:
            axes.plot([x for _, x in points], means, color=style.QUIET, linewidth=0.8, zorder=1)
            ends.append((points[-1][1], means[-1], others, style.QUIET))
        for configuration, x in points:
            _point(axes, x, configuration.change(metric), looks[configuration.name])
    if not numeric:
        labels = _labels(drawn, name)
        slant: dict[str, Any] = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if _crowded(labels) else {}
        axes.set_xticks(range(len(values)), labels, **slant)
        axes.margins(x=0.15)
    elif min(values) > 0 and max(values) / min(values) >= 30:
        axes.set_xscale("log")
    elif len(values) > 1 and min(np.diff(values)) > 0.1 * (values[-1] - values[0]):
        axes.set_xticks(values, [text.setting(v) for v in values])
    if labelled and len(groups) <= MAX_LABELS and len(study.varying) > 1:
        style.label_line_ends(axes, ends, size=7.5)


def _labels(configurations: Sequence[Configuration], name: str) -> list[str]:
    """Of the values of a setting that has no numbers, in their order; none for numbers, which a scale shows."""
    values = sorted({c.settings[name] for c in configurations}, key=order)
    return (
        []
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        else [text.setting(v) for v in values]
    )


def _crowded(labels: Sequence[str]) -> bool:
    """Whether labels side by side would run into each other."""
    return len(labels) * max(map(len, labels), default=0) > MAX_CHARACTERS


def _point(axes: Axes, x: float, change: Interval, look: style.Look) -> None:
    error = [[change.mean - change.low], [change.high - change.mean]] if change.n > 1 else None
    axes.errorbar([x], [change.mean], yerr=error, fmt=look.marker, color=look.color, markersize=5, linewidth=1.5)


def _equal_but_for(study: Study, name: str, configurations: Sequence[Configuration]) -> dict[str, list[Configuration]]:
    """Configurations that differ in setting `name` alone, under a text of their other varying settings."""
    groups: dict[str, list[Configuration]] = {}
    for c in configurations:
        others = [f"{text.symbol(key)}={text.setting(c.settings[key])}" for key in study.varying if key != name]
        groups.setdefault(", ".join(others), []).append(c)
    return groups
