"""The figure of methods side by side: held-out losses and benchmark scores of each, as in the paper's Table 1."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ebft_study.analysis.methods import BASE, ORDER, WARM_START, Column, Task, tasks
from ebft_study.analysis.summary import StudySummary
from ebft_study.report import drawing
from ebft_study.report.drawing import ReportFigure
from ebft_study.report.methods import column_name

MAX_PANELS = 4


def figure(study: StudySummary) -> ReportFigure | None:
    """Each method's losses and scores after training, a row of panels per task."""
    all_tasks = tasks(study)
    if not all_tasks:
        return None
    shown = [task.columns[:MAX_PANELS] for task in all_tasks]
    heights = [len(task.methods) + 3.4 for task in all_tasks]
    drawn = Figure(figsize=(8.8, 0.26 * sum(heights)), layout="constrained")
    parts = drawn.subfigures(len(all_tasks), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, task, columns in zip(parts, all_tasks, shown, strict=True):
        if task.label:
            part.suptitle(task.label, x=0.01, ha="left", fontsize=10)
        row = part.subplots(1, max(map(len, shown)), squeeze=False)[0]
        for axes in row[len(columns) :]:
            axes.set_visible(False)
        for axes, column in zip(row, columns, strict=False):
            _panel(axes, task, column)
            drawing.row_labels(axes, list(task.methods) if axes is row[0] else [""] * len(task.methods))
    left_out = sum(len(task.columns) - len(columns) for task, columns in zip(all_tasks, shown, strict=True))
    caption = (
        "Held-out losses and scores after training: means over seeds with 95 % intervals; the dashed line is the base "
        "model. Lower is better for losses, higher for scores. Where a method has several configurations, each seed is "
        "scored by the one that the other seeds choose."
        + f" {left_out} more column{'s are' if left_out > 1 else ' is'} in the table."
        * (left_out > 0)
    )
    return ReportFigure("methods", "The methods side by side", caption, drawn)


def _panel(axes: Axes, task: Task, column: Column) -> None:
    styles = dict(zip(ORDER[2:], drawing.sequence(len(ORDER) - 2), strict=True))
    base = task.methods[BASE].mean(column).mean if BASE in task.methods else math.nan
    unit = drawing.unit_of(column.metric)
    label = "score" if unit == column.metric else unit
    drawing.interval_panel(axes, base, title=column_name(column).replace(": ", ":\n"), label=label, ticks=3)
    for y, (name, method) in enumerate(task.methods.items()):
        color = drawing.BASE_COLOR if name in (BASE, WARM_START) else styles.get(name, drawing.Style(drawing.INK)).color
        drawing.interval_row(axes, y, method.mean(column), drawing.Style(color))
