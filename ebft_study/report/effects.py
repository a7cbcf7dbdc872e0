"""The figure of effects: each value of each setting against its reference, on held-out values, all else equal."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ebft_study import text
from ebft_study.analysis.configuration import Map
from ebft_study.analysis.effects import Effect, effects, subjects
from ebft_study.analysis.settings import assignments
from ebft_study.analysis.summary import StudySummary
from ebft_study.report import drawing
from ebft_study.report.content import NAMES
from ebft_study.report.drawing import ReportFigure

MAX_ROWS = 30


def figure(study: StudySummary) -> ReportFigure | None:
    """A row per value of a setting that is not its reference, a panel per metric; the settings of features as one."""
    found = {(each.settings, each.reference, each.metric): each for each in all_effects(study)}
    rows = list(dict.fromkeys((settings, reference) for settings, reference, _ in found))
    metrics = [metric for metric in study.compared if any(m == metric for _, _, m in found)]
    if not rows:
        return None
    shown = rows[:MAX_ROWS]
    drawn = Figure(figsize=(8.4, 1.35 + 0.3 * len(shown)), layout="constrained")
    panels = drawn.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        at = f", {study.length} tokens" if metric == "cfm_loss" else ""
        label = f"difference\n({drawing.unit_of(metric)})"
        drawing.interval_panel(axes, 0, title=f"Held-out {NAMES[metric]}{at}", label=label, ticks=4)
        for y, (settings, reference) in enumerate(shown):
            if each := found.get((settings, reference, metric)):
                _row(axes, y, each)
    drawing.row_labels(panels[0], [f"{named(a)}, not {named(b)}" for a, b in shown])
    caption = (
        "Held-out value with one value of a setting minus that with another, all other settings equal: means over the "
        "configurations that differ in it alone, paired by seed, with 95 % intervals. Left of the dashed line is "
        "better. Filled: the interval excludes zero, not corrected for the number of rows."
        + f" Drawn are the first {MAX_ROWS} of {len(rows)} rows."
        * (len(rows) > MAX_ROWS)
    )
    return ReportFigure("effects", "What each setting does to held-out values", caption, drawn)


def all_effects(study: StudySummary) -> list[Effect]:
    """The effects of all settings of a study on each metric by which it compares configurations."""
    return [each for names in subjects(study) for metric in study.compared for each in effects(study, names, metric)]


def named(settings: Map) -> str:
    """`α=1`, or the choice alone where an axis of choices is the only setting."""
    if len(settings) == 1 and isinstance(settings[0][1], str):
        return text.setting(settings[0][1])
    return assignments(dict(settings), [name for name, _ in settings])


def _row(axes: Axes, y: int, effect: Effect) -> None:
    difference = effect.difference
    is_clear = difference.side != "unclear"
    if difference.n > 1:
        axes.plot([difference.low, difference.high], [y, y], color=drawing.INK, linewidth=1.8)
    color = drawing.INK if is_clear else "white"
    axes.plot(difference.mean, y, "o", markerfacecolor=color, markeredgecolor=drawing.INK, markersize=6)
