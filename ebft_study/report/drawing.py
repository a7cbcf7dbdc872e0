"""The parts that all figures share: one style per configuration, legends, the base model's line, titles and limits.

A configuration has the same colour in every figure that compares configurations, safe for colour-blind readers. Where
two settings span a grid, the first chooses the hue and the second the lightness, so that the eye can follow either.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, MaxNLocator

from ebft_study import text
from ebft_study.analysis.selection import comparable, ranked
from ebft_study.analysis.settings import is_number, sort_key
from ebft_study.analysis.statistics import Interval
from ebft_study.analysis.summary import MAX_GROUPS, Configuration, StudySummary
from ebft_study.results import METRICS

INK = "#222222"
QUIET = "#6b6b6b"
BASE_COLOR = "#6b6b6b"
BASE_LABEL = "base model"
# Hues that stay apart in deuteranopia and protanopia; light to dark within each.
_RAMPS = (
    ("#6db1e6", "#2372b8", "#0a3464"),
    ("#f2a654", "#d2611a", "#843600"),
    ("#e2aac9", "#c4619a", "#4f1d3a"),
)
_SEQUENCE = ("#2372b8", "#d2611a", "#27a39b", "#e2aac9", "#843600", "#6db1e6", "#4f1d3a", "#f2a654")
_LINES = ("-", (0, (4, 1.5)), (0, (1.5, 1.2)), (0, (7, 1.5, 1.5, 1.5)))
_MARKERS = ("o", "v", "D")
_BASELINES = ("#000000", "#555555")

# Metrics compared on the held-out split, with the titles of their panels.
TITLES = {"ce_loss": "Held-out CE", "cfm_loss": "Held-out CFM"}
LEGEND_CHARACTERS = 26
# Names that fit below a panel of half the width.
TICK_CHARACTERS = 45
# Positive numbers whose largest is so many times the smallest are on a logarithmic scale.
LOG_RATIO = 30

RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9a9a9a",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.8,
    "text.color": INK,
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class ReportFigure:
    """A figure with its file name, title, and a caption that says how to read it."""

    name: str
    title: str
    caption: str
    figure: Figure

    def __post_init__(self) -> None:
        _without_formulas(self.figure)


def _without_formulas(figure: Figure) -> None:
    """Show users' texts as they are; only the powers of ten along logarithmic axes are formulas."""
    for words in figure.findobj(Text):
        words.set_parse_math(False)
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        is_log = isinstance(axis.get_major_formatter(), LogFormatter)
        for label in axis.get_ticklabels(which="both"):
            label.set_parse_math(is_log)


@dataclass(frozen=True)
class Style:
    """Colour, marker and line of one configuration."""

    color: str
    linestyle: Any = "-"
    marker: str = "o"


def configuration_styles(study: StudySummary) -> dict[str, Style]:
    """Configuration name -> style."""
    names = [c.name for c in study.on_axes]
    styles = _grid_styles(study) or dict(zip(names, sequence(len(names)), strict=True))
    baselines = [c.name for c in study.configurations if c.baseline is not None]
    for name, color in zip(baselines, itertools.cycle(_BASELINES), strict=False):
        styles[name] = Style(color, (0, (5, 1.2, 1, 1.2)), "s")
    return styles


def _grid_styles(study: StudySummary) -> dict[str, Style]:
    """Hue by the first varying setting, lightness by the second; empty where the settings are no small grid."""
    if len(study.varying) != 2:
        return {}
    first, second = study.varying
    hues, shades = (sorted({c.settings[name] for c in study.on_axes}, key=sort_key) for name in study.varying)
    if len(hues) > len(_RAMPS) or len(shades) > len(_RAMPS[0]):
        return {}
    # With two levels the extremes of a ramp stay furthest apart.
    levels = {1: (1,), 2: (0, 2), 3: (0, 1, 2)}[len(shades)]
    styles = {}
    for c in study.on_axes:
        hue, shade = hues.index(c.settings[first]), shades.index(c.settings[second])
        styles[c.name] = Style(_RAMPS[len(hues) - 1 - hue][levels[shade]], marker=_MARKERS[hue])
    return styles


def sequence(number: int) -> list[Style]:
    """Styles that differ in colour, then in the line."""
    combinations = itertools.cycle(Style(color, line) for line, color in itertools.product(_LINES, _SEQUENCE))
    return list(itertools.islice(combinations, number))


def add_legend(figure: Figure) -> None:
    """Put one legend for all panels to the right of them."""
    entries: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(wrapped(label), handle)
    figure.legend(entries.values(), entries.keys(), loc="outside right upper")


def wrapped(label: str) -> str:
    return textwrap.fill(label, LEGEND_CHARACTERS)


def base_line(axes: Axes, value: float = 0.0) -> None:
    """Draw a horizontal line at the base model's value."""
    axes.axhline(value, color=BASE_COLOR, linestyle="--", linewidth=1.2, zorder=1, label=BASE_LABEL)


def interval_panel(axes: Axes, reference: float, *, title: str, label: str, ticks: int = 5) -> None:
    """Prepare a panel of horizontal intervals, with a dashed line at `reference` unless it is NaN."""
    if math.isfinite(reference):
        axes.axvline(reference, color=BASE_COLOR, linestyle="--", linewidth=1.2)
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y", visible=False)


def interval_row(axes: Axes, y: float, interval: Interval, style: Style, **marker: Any) -> None:
    """Draw a mean with its interval, where there is one, in a panel of intervals."""
    if math.isfinite(interval.half_width):
        axes.plot([interval.low, interval.high], [y, y], color=style.color, linewidth=2)
    if interval.n:
        axes.plot(interval.mean, y, style.marker, **{"color": style.color, "markersize": 5.5, **marker})


def row_labels(axes: Axes, labels: Sequence[str]) -> None:
    """Name the rows of a panel of intervals, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)


def compared_configurations(study: StudySummary) -> list[tuple[str, Configuration]]:
    """Labels of each method's best configurations, within each feature map where no more can be compared."""
    return [(c.label if c.baseline else f"{c.settings['method'].upper()} {c.label}", c) for c in study.best_by_method()]


def choice_note(study: StudySummary) -> str:
    """How `compared_configurations` chooses, for captions."""
    groups = len(comparable(study.ebft, study.objective[0]))
    within = (f" of each of the first {MAX_GROUPS} feature maps" if groups > MAX_GROUPS else " of each feature map") * (
        groups > 1
    )
    return f"Drawn are the best configurations of each method{within} by validation {study.objective[0]}."


def most_relevant(
    study: StudySummary, configurations: Sequence[Configuration], limit: int
) -> tuple[list[Configuration], str]:
    """At most `limit` configurations in their order, baselines before others, and a note on those left out."""
    if len(configurations) <= limit:
        return list(configurations), ""
    names = [c.name for c in ranked(configurations)]
    order = sorted(
        configurations, key=lambda c: (c.baseline is None, names.index(c.name) if c.name in names else len(names))
    )
    drawn = {c.name for c in order[:limit]}
    note = (
        f" Drawn are the {limit} best by validation {study.objective[0]}, baselines included and those with all seeds "
        f"first; {len(configurations) - limit} more are in the table."
    )
    return [c for c in configurations if c.name in drawn], note


def setting_axis(axes: Axes, values: Sequence[Any], room: int = TICK_CHARACTERS) -> list[float]:
    """Prepare the x axis for sorted values of a setting; returns their places: numbers as they are, others in order.

    Args:
        room: characters that fit below the axis; names that need more are slanted.
    """
    if not all(map(is_number, values)):
        labels = [text.setting(value) for value in values]
        crowded = len(labels) * max(map(len, labels)) > room
        slant: dict[str, Any] = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        axes.set_xticks(range(len(values)), labels, **slant)
        axes.margins(x=0.15)
        return [float(place) for place in range(len(values))]
    if min(values) > 0 and max(values) / min(values) >= LOG_RATIO:
        axes.set_xscale("log")
    elif len(values) > 1 and min(np.diff(values)) > 0.1 * (values[-1] - values[0]):
        axes.set_xticks(values, [text.setting(value) for value in values])
    else:
        axes.locator_params(axis="x", nbins=4)
    return list(values)


def unit_of(metric: str) -> str:
    return METRICS[metric].unit or metric


def panel_title(study: StudySummary, metric: str) -> str:
    """The title of a panel of held-out values; CFM says at which completion length."""
    at = f", {study.length} tokens" if metric == "cfm_loss" and study.length is not None else ""
    return TITLES[metric] + at
