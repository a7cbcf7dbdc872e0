"""A step by phase beside the naive one, and how its time grows, drawn from rows."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from benchmarks.rows import Row

INK, QUIET, OURS, NAIVE = "#222222", "#6b6b6b", "#2372b8", "#c9c9c9"
PHASE_COLORS = {"rollouts": "#2372b8", "features": "#d2611a", "scoring": "#27a39b", "optimizer": "#e2aac9"}
# As in the reports, whose style needs pandas; a GPU machine may lack it.
RC: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": "#9a9a9a",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
TITLES = {"T": "Sequence length T", "n": "Samples n", "G": "Completion length G", "model": "Model"}

Series = dict[str, tuple[Row, float]]
"""Value of what varies -> measured row and predicted seconds."""


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG of whatever of the two the rows hold; nothing if they hold neither."""
    steps, grown = _steps(rows), _growth(rows)
    if not steps and not grown:
        return
    heights = [0.9 + 0.7 * len(steps)] * bool(steps) + [2.9] * bool(grown)
    with plt.rc_context(RC):
        figure = plt.figure(figsize=(11, sum(heights)), layout="constrained")
        bands = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
        if steps:
            _draw_steps(bands[0].subplots(), steps)
        if grown:
            panels = bands[-1].subplots(1, len(grown), sharey=True, squeeze=False)[0]
            for panel, (name, series) in zip(panels, grown.items(), strict=True):
                _draw_growth(panel, name, series)
            _label_growth(panels[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _steps(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Sequence length -> seconds of every phase, of the whole step, and of the naive one."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        match = re.fullmatch(r"step/(T=\d+)/(?:(ours|naive)|(\w+)/seconds)", row.name)
        if match:
            found[match[1]][match[2] or match[3]] = float(row.value)
    return dict(found)


def _growth(rows: Sequence[Row]) -> dict[str, Series]:
    """What varies -> its series."""
    predicted = {row.name: float(row.value) for row in rows if row.name.endswith("/predicted")}
    found: dict[str, Series] = defaultdict(dict)
    for row in rows:
        match = re.fullmatch(r"growth/(\w+)=([^/]+)/seconds", row.name)
        if match:
            found[match[1]][match[2]] = (row, predicted[row.name.replace("/seconds", "/predicted")])
    return dict(found)


def _draw_steps(axes: Axes, steps: dict[str, dict[str, float]]) -> None:
    labels = []
    for place, (length, taken) in enumerate(steps.items()):
        left = 0.0
        for phase, color in PHASE_COLORS.items():
            axes.barh(2 * place, taken[phase], left=left, color=color, label="" if place else phase)
            left += taken[phase]
        axes.barh(2 * place + 0.85, taken["naive"], color=NAIVE)
        labels += [(2 * place, f"ours, {length}"), (2 * place + 0.85, f"naive, {length}")]
    axes.set_yticks([at for at, _ in labels], [label for _, label in labels])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(title="One step", xlabel="seconds")
    axes.legend(frameon=False, ncols=len(PHASE_COLORS), loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)


def _draw_growth(axes: Axes, name: str, series: Series) -> None:
    # Models by what is expected of them, numbers by their value.
    ordered = sorted(series.items(), key=lambda item: item[1][1])
    rows, predicted = zip(*(found for _, found in ordered), strict=True)
    labels = [label for label, _ in ordered]
    taken = [float(row.value) for row in rows]
    spread = [[v - (row.low or v) for v, row in zip(taken, rows, strict=True)]]
    spread += [[(row.high or v) - v for v, row in zip(taken, rows, strict=True)]]
    places = range(len(labels))
    axes.errorbar(places, taken, yerr=spread, color=OURS, marker="o", linewidth=1.8, label="measured")
    axes.plot(places, predicted, color=QUIET, linestyle=(0, (4, 1.5)), label="expected from FLOPs")
    axes.set_xticks(places, labels)
    axes.set(title=TITLES[name], yscale="log")


def _label_growth(axes: Axes) -> None:
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("seconds per step")
    axes.legend(frameon=False, loc="upper left")
