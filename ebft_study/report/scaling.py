"""The report's section on scaling: fitted laws, how well they foresaw what was held out, and effective speedups.

Silent for a study without two sizes or two amounts of data. The numbers are those of `analysis.scaling`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ebft_study import text
from ebft_study.analysis.methods import NAMES
from ebft_study.analysis.scaling import study as of_study
from ebft_study.analysis.scaling.fits import Estimate, Fit
from ebft_study.analysis.scaling.heldout import Extrapolation
from ebft_study.analysis.scaling.levels import levels
from ebft_study.analysis.scaling.study import MethodLaw, SharedLaw, StudyLaws
from ebft_study.analysis.statistics import CONFIDENCE, mean_interval
from ebft_study.analysis.summary import HELDOUT, StudySummary
from ebft_study.report import drawing
from ebft_study.report.drawing import ReportFigure

laws_of_all = functools.lru_cache(maxsize=1)(of_study.laws_of_all)
MEASURES = {"ce_loss": "CE", "cfm_loss": "gain in CFM", "judge_cfm_loss": "gain in judge\N{NO-BREAK SPACE}CFM"}
SPLITS = {"heldout": "held-out", "validation": "validation"}
AXIS_NAMES = {"parameters": "parameters", "tokens": "training tokens"}
UNCLEAR = " (not clear)"
"""The end of a factor whose interval holds 1."""
AMOUNT_NAMES = {"tokens": "data", "flops": "FLOPs", "seconds": "time"}


@dataclass(frozen=True)
class ScalingSection:
    """Rows as text: a law per method, and an effective speedup per method and amount."""

    rows: list[tuple[str, str, str, str, str, str]]
    """Measure, method, scales and points, form, parameters, held-out score or the reason why there is no law."""
    speedups: list[tuple[str, str, str, str, str]]
    """Measure, method, amount, factor, range of costs."""
    notes: list[str]
    """On each measure."""
    split: str
    """Whose values the laws are of."""


def section(study: StudySummary) -> ScalingSection | None:
    """The laws of every loss that compares over the study; None for a study without an axis of scale."""
    of_all = laws_of_all(study)
    if not of_all:
        return None
    rows = [(MEASURES[found.metric], *_row(law, found)) for found in of_all for law in found.methods]
    speedups = [
        (
            MEASURES[found.metric],
            NAMES.get(each.method, each.method),
            AMOUNT_NAMES[each.amount],
            f"{_estimate(each.factor)}{'' if each.is_clear else UNCLEAR}",
            text.NOTHING if each.amount == "tokens" else " to ".join(f"{ratio:.2f}" for ratio in each.ratios),
        )
        for found in of_all
        for each in (found.shared.speedups if found.shared else ())
    ]
    notes = [f"{MEASURES[found.metric]}: {note}" for found in of_all if (note := _note(found))]
    return ScalingSection(rows, speedups, notes, of_all[0].split)


def _row(law: MethodLaw, found: StudyLaws) -> tuple[str, str, str, str, str]:
    scales = len(set(zip(*(levels(law.points[name]) for name in found.axes), strict=True)))
    size = f"{scales}\N{NO-BREAK SPACE}scales, {law.points['trial_id'].nunique()}\N{NO-BREAK SPACE}trials"
    name = NAMES.get(law.method, law.method)
    if law.fit is None:
        return name, size, "none", text.NOTHING, law.reason
    shown = [name for name in law.fit.values if name not in "AB" or not law.fit.form.is_log]
    values = ", ".join(f"{name} {_estimate(law.fit.estimate(name))}" for name in shown)
    return name, size, law.fit.form.formula, values, _score(law.score, found)


def _score(score: Extrapolation | None, found: StudyLaws) -> str:
    if score is None:
        return "not tested: too few scales are left without those held out"
    pairs = (
        f"; order of methods foreseen in {score.ranked} of {score.n_pairs} pairs, "
        f"{score.ranked_before} by the scale before"
    )
    held = "the largest size" if "parameters" in found.axes else "the last half of the data"
    return (
        f"{held}: error {100 * score.error:.2g} % (last value {100 * score.last_value_error:.2g} %), "
        f"90 % interval holds {score.covered} of {score.n_scales}{pairs * (score.n_pairs > 0)}"
    )


def _note(found: StudyLaws) -> str:
    return " ".join(filter(None, (_ended(found.reason), _of_shared(found.shared, found) if found.shared else "")))


def _ended(sentence: str) -> str:
    return sentence and f"{sentence.rstrip('.')}."


def _of_shared(shared: SharedLaw, found: StudyLaws) -> str:
    parts = [f"One law for all methods, with a multiplier of data for each: {_score(shared.score, found)}."]
    if math.isnan(shared.p_value):
        parts.append("Too few points test whether one multiplier is enough.")
    elif shared.p_value < 1 - CONFIDENCE:
        parts.append(
            f"But the methods differ by more than a multiplier (p = {shared.p_value:.2g}): no one factor compares them."
        )
    else:
        parts.append(f"The points do not contradict one multiplier for each (p = {shared.p_value:.2g}).")
    if shared.score and shared.score.covered < shared.score.n_scales / 2:
        parts.append(
            "The form misses most of what was held out, so neither multipliers nor test are to be trusted far."
        )
    return " ".join(parts)


def _estimate(value: Estimate) -> str:
    """`0.34 (0.31 to 0.37)`; amounts as powers of ten, open ends in words."""
    if math.isinf(value.high) and value.low <= 0:
        return f"{_number(value.value)} (any)"
    if math.isinf(value.high):
        return f"{_number(value.value)} (above {_number(value.low)})"
    if value.low <= 0:
        return f"{_number(value.value)} (up to {_number(value.high)})"
    return f"{_number(value.value)} ({_number(value.low)} to {_number(value.high)})"


def _number(value: float) -> str:
    return text.power(value) if value >= 1e4 else f"{value:.3g}"


# --- figure ----------------------------------------------------------------------------------------------------


def figure(study: StudySummary) -> ReportFigure | None:
    """Every loss that compares over the study against each axis of scale, with the fitted laws."""
    of_all = [found for found in laws_of_all(study) if found.methods]
    if not of_all:
        return None
    n_columns = max(len(found.axes) for found in of_all)
    drawn = Figure(figsize=(4.2 * n_columns + 1.4, 0.4 + 3.0 * len(of_all)), layout="constrained")
    rows = drawn.subplots(len(of_all), n_columns, squeeze=False, sharex="col", sharey="row")
    for panels, found in zip(rows, of_all, strict=True):
        for axes, axis in zip(panels, found.axes, strict=True):
            for law, style in zip(found.methods, drawing.sequence(len(found.methods)), strict=True):
                _panel(axes, law, axis, found.axes, style)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e+0", "e").replace("e+", "e"))
            axes.xaxis.set_minor_locator(NullLocator())
        measure = found.metric if found.metric not in of_study.GAINS else MEASURES[found.metric]
        panels[0].set_ylabel(f"{SPLITS[found.split]} {measure}\n({drawing.unit_of(found.metric)})")
    for axes, axis in zip(rows[-1], of_all[-1].axes, strict=True):
        axes.set_xlabel(AXIS_NAMES[axis])
    drawing.add_legend(drawn)
    moment = "at the end of training" if of_all[0].split == HELDOUT else "at every evaluation"
    others = " One line for each value of the other axis." * (n_columns > 1)
    caption = (
        f"Losses {moment}, means over seeds with 95 % intervals, and the law of each method where its points can tell "
        f"one.{others} Solid is the range of the points."
    )
    return ReportFigure("scaling", "Scaling laws", caption, drawn)


def _panel(axes: Axes, law: MethodLaw, axis: str, all_axes: tuple[str, ...], style: drawing.Style) -> None:
    others = [name for name in all_axes if name != axis]
    points = law.points.assign(x=levels(law.points[axis]), other=levels(law.points[others[0]]) if others else 0)
    label = NAMES.get(law.method, law.method)
    for _, line in points.groupby("other"):
        for _, scale in line.groupby("x"):
            level = mean_interval(scale["value"])
            axes.errorbar(
                scale[axis].mean(), level.mean, yerr=level.half_width if level.n > 1 else 0.0,
                color=style.color, marker=style.marker, markersize=3.5, linewidth=1.1, label=label,
            )  # fmt: skip
        if law.fit:
            _line(axes, law.fit, line, axis, others, style)


def _line(axes: Axes, fit: Fit, line: pd.DataFrame, axis: str, others: list[str], style: drawing.Style) -> None:
    """The law along an axis, at the mean of the other one; dashed for a factor of three beyond the points."""
    low, high = line[axis].min(), line[axis].max()
    for x, dashes in ((np.geomspace(low, high, 40), "-"), (np.geomspace(high, 3 * high, 10), (0, (3, 2)))):
        table = pd.DataFrame({axis: x} | {name: line[name].mean() for name in (*others, "start")})
        axes.plot(x, fit.predict(table), color=style.color, linestyle=dashes, linewidth=1.2)
