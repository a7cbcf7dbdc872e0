"""One look for all figures: a colour per configuration, the same everywhere, safe for colour-blind readers.

Where two settings span a grid, the first chooses the hue and the second the lightness, so that the eye can follow
either. Labels stand at the ends of lines; a legend is needed nowhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from ebft_study.report.tables import Configuration, Study, order

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
_MARKERS = ("o", "v", "D")
_BASELINES = ("#000000", "#555555")

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
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.8,
    "text.color": INK,
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Look:
    """How one configuration is drawn."""

    color: str
    linestyle: Any = "-"
    marker: str = "o"


def looks(study: Study) -> dict[str, Look]:
    """Configuration name -> look."""
    on_axes = [c for c in study.configurations if c.baseline is None]
    baselines = [c for c in study.configurations if c.baseline is not None]
    chosen = _grid_looks(study, on_axes) or _sequence_looks(on_axes)
    for configuration, color in zip(baselines, itertools.cycle(_BASELINES), strict=False):
        chosen[configuration.name] = Look(color, (0, (5, 1.2, 1, 1.2)), "s")
    return chosen


def _grid_looks(study: Study, configurations: Sequence[Configuration]) -> dict[str, Look]:
    """Hue by the first varying setting, lightness by the second; empty where the settings are no small grid."""
    if len(study.varying) != 2:
        return {}
    hues, shades = (_levels(configurations, name) for name in study.varying)
    if len(hues) > len(_RAMPS) or len(shades) > len(_RAMPS[0]):
        return {}
    first, second = study.varying
    # With two levels the extremes of a ramp stay furthest apart.
    places = {1: (1,), 2: (0, 2), 3: (0, 1, 2)}[len(shades)]
    return {
        c.name: Look(
            _RAMPS[len(hues) - 1 - hues.index(c.settings[first])][places[shades.index(c.settings[second])]],
            marker=_MARKERS[hues.index(c.settings[first])],
        )
        for c in configurations
    }


def _sequence_looks(configurations: Sequence[Configuration]) -> dict[str, Look]:
    kinds = itertools.product(("-", (0, (4, 1.5)), (0, (1.5, 1.2)), (0, (7, 1.5, 1.5, 1.5))), _SEQUENCE)
    return {c.name: Look(color, line) for c, (line, color) in zip(configurations, itertools.cycle(kinds), strict=False)}


def _levels(configurations: Sequence[Configuration], setting: str) -> list[Any]:
    """Distinct values of a setting in the order of the configurations, which is that of the values."""
    values: list[Any] = []
    for configuration in configurations:
        if configuration.settings[setting] not in values:
            values.append(configuration.settings[setting])
    return sorted(values, key=order)


def readable(color: str) -> tuple[float, float, float]:
    """The colour, darkened until text in it stands out from white paper (a contrast of at least 4.5 to 1)."""
    red, green, blue = to_rgb(color)
    while 1.05 / (_luminance(red, green, blue) + 0.05) < 4.5:
        red, green, blue = 0.95 * red, 0.95 * green, 0.95 * blue
    return red, green, blue


def _luminance(*rgb: float) -> float:
    """Relative luminance of an sRGB colour, 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def label_line_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], *, size: float = 8) -> None:
    """Write labels right of line ends (x, y, text, colour), moved apart vertically where they would overlap."""
    if not ends:
        return
    low, high = axes.get_ylim()
    height_points = axes.get_window_extent().height * 72 / axes.figure.get_dpi()
    spacing = (high - low) * size * 1.25 / height_points
    order = np.argsort([y for _, y, _, _ in ends], kind="stable")
    wanted = np.clip([ends[i][1] for i in order], low, high)
    placed = spread(wanted, spacing)
    for index, at in zip(order, placed, strict=True):
        x, y, label, color = ends[index]
        height = (at - low) / (high - low)
        axes.text(1.035, height, label, transform=axes.transAxes, va="center", fontsize=size, color=readable(color))
        reach = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[0]
        if reach > 0.9:  # a leader from a line that ends earlier would look like data
            _leader(axes, (x, min(max(y, low), high)), height, color)


def _leader(axes: Axes, start: tuple[float, float], height: float, color: str) -> None:
    line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.7, "shrinkA": 0, "shrinkB": 2}
    axes.annotate("", start, (1.03, height), textcoords="axes fraction", arrowprops=line, annotation_clip=False)


def spread(wanted: np.ndarray, spacing: float) -> np.ndarray:
    """Ascending positions at least `spacing` apart and as near to `wanted` as can be (pooled runs keep their mean)."""
    runs: list[tuple[float, int]] = []
    for y in wanted:
        centre, count = float(y), 1
        while runs and centre - runs[-1][0] < (count + runs[-1][1]) / 2 * spacing:
            before, size = runs.pop()
            centre, count = (before * size + centre * count) / (size + count), size + count
        runs.append((centre, count))
    return np.concatenate([centre + spacing * (np.arange(count) - (count - 1) / 2) for centre, count in runs])
