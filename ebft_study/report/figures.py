"""Figures of a study: `draw_all` for all of them, and those with curves: over steps and along the completion.

A drawing function returns None where the study has nothing to draw. Lower is better for CE and CFM everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from ebft_study.analysis.curves import frame_of, series, spread
from ebft_study.analysis.equal_cost import AMOUNTS
from ebft_study.analysis.selection import comparable
from ebft_study.analysis.statistics import mean_interval
from ebft_study.analysis.summary import COMPARED, Configuration, StudySummary
from ebft_study.report import drawing, effects, importance, outcomes, scaling, side_by_side
from ebft_study.report.drawing import ReportFigure, Style
from ebft_study.results import METRICS

# More lines than this cannot be distinguished: the best by validation are drawn, and the caption says so.
MAX_LINES = 12


def draw_all(study: StudySummary) -> list[ReportFigure]:
    """Every figure that the study's data allow."""
    return draw(
        study,
        outcomes.differences,
        side_by_side.figure,
        learning_curves,
        cost_curves,
        outcomes.heat_maps,
        outcomes.along_settings,
        effects.figure,
        importance.importance,
        importance.marginal_effects,
        importance.parallel_coordinates,
        length_profile,
        entropy_by_position,
        outcomes.pareto_front,
        scaling.figure,
    )


def draw(study: StudySummary, *drawers: Callable[[StudySummary], ReportFigure | None]) -> list[ReportFigure]:
    """Some of the figures, without those for which the study has nothing to draw."""
    with matplotlib.rc_context(drawing.RC):
        return [figure for drawer in drawers if (figure := drawer(study)) is not None]


def _curve(axes: Axes, x: ArrayLike, y: ArrayLike, style: Style, label: str, marker: str = "") -> None:
    axes.plot(x, y, color=style.color, linestyle=style.linestyle, marker=marker, markersize=3.5, label=label)


def _band(axes: Axes, x: ArrayLike, low: ArrayLike, high: ArrayLike, style: Style) -> None:
    axes.fill_between(x, low, high, color=style.color, alpha=0.14, lw=0)


# --- learning curves -------------------------------------------------------------------------------------------


def learning_curves(study: StudySummary) -> ReportFigure | None:
    """CE, CFM, the judge's CFM (validation) and reward (training batch) over steps."""
    titles = {
        "ce_loss": "Validation CE",
        "cfm_loss": "Validation CFM loss",
        "judge_cfm_loss": "Validation CFM loss of the judge",
        **{metric: f"Validation {metric}" for metric in study.compared if METRICS[metric].plugin},
        "reward": "Reward of the training rollouts",
    }
    panels = [metric for metric in titles if study.results.metrics[metric].notna().any()]
    if not panels:
        return None
    shown, omitted = drawing.most_relevant(study, study.configurations, MAX_LINES)
    figure = Figure(figsize=(8.4, 0.5 + 2.55 * len(panels)), layout="constrained")
    for axes, metric in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        _learning_curve(axes, study, shown, metric)
        axes.set_title(titles[metric])
        axes.set_ylabel(drawing.unit_of(metric))
    axes.set_xlabel("optimizer step")
    drawing.add_legend(figure)
    caption = (
        "Lines are means over the seeds of a configuration, bands span its lowest to highest seed; the dashed line is "
        "the base model (step 0), where the study has one value of it. Thin lines ending in × are trials that did not "
        "finish; they are not in the means. "
        "A line that rises far above the rest leaves the frame. "
        "The reward's scale depends on α, so compare its course, not its height, across α."
        f"{omitted}"
    )
    return ReportFigure("learning_curves", "Learning curves", caption, figure)


def _learning_curve(axes: Axes, study: StudySummary, shown: Sequence[Configuration], metric: str) -> None:
    styles, means = drawing.configuration_styles(study), list[pd.Series]()
    for configuration in shown:
        style = styles[configuration.name]
        finished, unfinished = series(study, configuration, metric)
        if len(finished):
            line = spread(finished)
            _band(axes, line["step"], line["low"], line["high"], style)
            _curve(axes, line["step"], line["mean"], style, configuration.label)
            means.append(line["mean"])
        for of_trial in unfinished:
            label = None if len(finished) else f"{configuration.label} ×"
            axes.plot(of_trial.index, of_trial, color=style.color, linewidth=0.8, alpha=0.7, label=label)
            axes.plot(of_trial.index[-1:], of_trial[-1:], "x", color=style.color, markersize=5)
    steps = study.results.metrics["step"]
    at_start = study.results.metrics.loc[steps == 0, metric].dropna()
    axes.set_xlim(0, max(steps.max(), 1))
    if len(at_start):
        if limits := frame_of(at_start.mean(), means):
            axes.set_ylim(*limits)
        if len(comparable(study.configurations, metric)) == len(study.of_one_base(metric)) == 1:
            drawing.base_line(axes, at_start.mean())


# --- over cost -------------------------------------------------------------------------------------------------


def cost_curves(study: StudySummary) -> ReportFigure | None:
    """The objective on the validation split over FLOPs and time of updates: each method's best."""
    metric = study.objective[0] if study.objective[0] in COMPARED else "cfm_loss"
    styles = drawing.configuration_styles(study)
    figure = Figure(figsize=(8.4, 3.1), layout="constrained")
    panels = figure.subplots(1, len(AMOUNTS), sharey=True)
    for axes, amount in zip(panels, AMOUNTS, strict=True):
        for label, model in drawing.compared_configurations(study):
            values, amounts = (series(study, model, name)[0] for name in (metric, amount))
            shared = values.index.intersection(amounts.index)
            if len(shared):
                x, y, style = amounts.loc[shared].mean(axis=1), values.loc[shared], styles[model.name]
                _band(axes, x, y.min(axis=1), y.max(axis=1), style)
                _curve(axes, x, y.mean(axis=1), style, label, style.marker)
        axes.set_xlabel(f"updates so far ({drawing.unit_of(amount)})")
        axes.set_xlim(left=0)
    if not any(axes.lines for axes in panels):
        return None
    panels[0].set_title(f"Validation {drawing.TITLES[metric].removeprefix('Held-out ')}")
    panels[0].set_ylabel(drawing.unit_of(metric))
    drawing.add_legend(figure)
    caption = (
        "Lines are means over the seeds of a configuration at its evaluations, bands span the lowest to the highest. "
        "FLOPs and time are those of all updates so far, from the base model on, warm start included. Each line ends "
        "where the configuration's data do; before its end a learning-rate schedule is unfinished. "
        f"{drawing.choice_note(study)}"
    )
    return ReportFigure("cost_curves", "At equal FLOPs and at equal time", caption, figure)


# --- along the completion --------------------------------------------------------------------------------------


def length_profile(study: StudySummary) -> ReportFigure | None:
    """CFM over completion length for the base model and each method's best, and the differences to the base model."""
    models = drawing.compared_configurations(study)
    models = [(label, c) for label, c in models if any(c.level("cfm_loss", length).n for length in study.lengths)]
    base = [study.base("cfm_loss", length) for length in study.lengths]
    if len(study.lengths) < 2 or (not models and all(map(math.isnan, base))):
        return None
    styles = drawing.configuration_styles(study)
    figure = Figure(figsize=(8.4, 3.3), layout="constrained")
    levels, gains = figure.subplots(1, 2)
    levels.plot(study.lengths, base, "--", color=drawing.BASE_COLOR, linewidth=1.4, marker=".")
    drawing.base_line(gains)
    for label, model in models:
        style = styles[model.name]
        changes = [model.change("cfm_loss", length) for length in study.lengths]
        means = [model.level("cfm_loss", length).mean for length in study.lengths]
        _curve(levels, study.lengths, means, style, label, style.marker)
        _curve(gains, study.lengths, [change.mean for change in changes], style, label, style.marker)
        _band(gains, study.lengths, [change.low for change in changes], [change.high for change in changes], style)
    levels.set_title("Held-out CFM")
    levels.set_ylabel(drawing.unit_of("cfm_loss"))
    gains.set_title("Difference to the base model")
    for axes in (levels, gains):
        _length_axis(axes, study)
    drawing.add_legend(figure)
    caption = (
        "Left: held-out CFM against the length of the completion (mean over seeds). Right: the same minus the base "
        "model, with 95 % intervals over seeds; below zero is better. The dotted line marks the length of the "
        f"rollouts in training. {drawing.choice_note(study)}"
    )
    return ReportFigure("cfm_over_length", "CFM over completion length", caption, figure)


def _length_axis(axes: Axes, study: StudySummary) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(study.lengths, [str(length) for length in study.lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("completion length (tokens)")
    if study.length is not None:
        axes.axvline(study.length, color=drawing.QUIET, linestyle=":", linewidth=1)
        at_bottom = axes.get_xaxis_transform()
        axes.text(study.length, 0.02, f" G={study.length}", transform=at_bottom, fontsize=8, color=drawing.QUIET)


def entropy_by_position(study: StudySummary) -> ReportFigure | None:
    """Entropy of the k-th generated token: flat for a calibrated model."""
    models = drawing.compared_configurations(study)
    measured = {key for _, c in models for key in (*c.final, *c.base)}
    positions = sorted({k for metric, k in measured if metric == "entropy" and k is not None})
    if not positions:
        return None
    styles = drawing.configuration_styles(study)
    figure = Figure(figsize=(8.4, 3.1), layout="constrained")
    axes = figure.subplots()
    base = [study.base("entropy", k) for k in positions]
    axes.plot(positions, base, "--", color=drawing.BASE_COLOR, linewidth=1.4, label=drawing.BASE_LABEL)
    for label, model in models:
        by_position = [list(model.final.get(("entropy", k), {}).values()) for k in positions]
        if all(by_position):
            _band(axes, positions, list(map(min, by_position)), list(map(max, by_position)), styles[model.name])
            _curve(axes, positions, [mean_interval(v).mean for v in by_position], styles[model.name], label)
    axes.set_title("Entropy of the next token during generation, held-out contexts")
    axes.set_xlabel("position in the completion (tokens)")
    axes.set_ylabel("nats/token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.01)
    drawing.add_legend(figure)
    caption = (
        "A calibrated model's entropy does not drift with the position of the generated token. Lines are means "
        f"over seeds, bands span the lowest to the highest. {drawing.choice_note(study)}"
    )
    return ReportFigure("entropy", "Entropy by position", caption, figure)
