"""A figure of rows: our step by phase next to the naive one, and how its time grows."""

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


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG of whatever of the two the rows hold; nothing if they hold neither."""
    steps: dict[str, dict[str, float]] = defaultdict(dict)
    series: dict[str, list[tuple[float, str, Row]]] = defaultdict(list)
    by_name = {row.name: row for row in rows}
    for name, row in by_name.items():
        if match := re.fullmatch(r"step/(T=\d+)/(?:(ours|naive)|(\w+)/seconds)", name):
            steps[match[1]][match[2] or match[3]] = float(row.value)
        elif match := re.fullmatch(r"growth/(\w+)=([^/]+)/seconds", name):
            predicted = float(by_name[name.replace("/seconds", "/predicted")].value)
            series[match[1]].append((predicted, match[2], row))
    if not steps and not series:
        return
    heights = [0.9 + 0.7 * len(steps)] * bool(steps) + [2.9] * bool(series)
    with plt.rc_context(RC):
        figure = plt.figure(figsize=(11, sum(heights)), layout="constrained")
        bands = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
        if steps:
            _draw_steps(bands[0].subplots(), steps)
        if series:
            panels = bands[-1].subplots(1, len(series), sharey=True, squeeze=False)[0]
            for panel, (name, points) in zip(panels, series.items(), strict=True):
                _draw_growth(panel, TITLES[name], points)
            panels[0].set_yscale("log", base=2)
            panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panels[0].set_ylabel("seconds per step")
            panels[0].legend(frameon=False, loc="upper left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw_steps(axes: Axes, steps: dict[str, dict[str, float]]) -> None:
    """`steps`: sequence length -> seconds of every phase, of the whole step, and of the naive one."""
    labels: dict[float, str] = {}
    for index, (length, seconds) in enumerate(steps.items()):
        ours, naive = 2 * index, 2 * index + 0.85
        left = 0.0
        for phase, color in PHASE_COLORS.items():
            axes.barh(ours, seconds[phase], left=left, color=color, label="" if index else phase)
            left += seconds[phase]
        axes.barh(naive, seconds["naive"], color=NAIVE)
        labels |= {ours: f"ours, {length}", naive: f"naive, {length}"}
    axes.set_yticks(list(labels), list(labels.values()))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(title="One step", xlabel="seconds")
    axes.legend(frameon=False, ncols=len(PHASE_COLORS), loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)


def _draw_growth(axes: Axes, title: str, points: list[tuple[float, str, Row]]) -> None:
    """`points`: predicted seconds, label and measured row; in the order of the prediction."""
    predicted, labels, rows = zip(*sorted(points, key=lambda point: point[0]), strict=True)
    seconds = [float(row.value) for row in rows]
    low = [value - (row.low or value) for value, row in zip(seconds, rows, strict=True)]
    high = [(row.high or value) - value for value, row in zip(seconds, rows, strict=True)]
    at = range(len(labels))
    axes.errorbar(at, seconds, yerr=[low, high], color=OURS, marker="o", linewidth=1.8, label="measured")
    axes.plot(at, predicted, color=QUIET, linestyle=(0, (4, 1.5)), label="expected from FLOPs")
    axes.set_xticks(at, labels)
    axes.set(title=title, yscale="log")
