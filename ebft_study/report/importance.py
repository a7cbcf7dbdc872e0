"""Figures of a study of several settings: which of them matter, what each value does, and all configurations at once.

All three show the study's first objective on the validation split, by which configurations are ranked, and one row of
panels for each group of configurations between which it may be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ebft_study import text
from ebft_study.analysis.curves import DIVERGENCE
from ebft_study.analysis.importance import (
    MAX_VALUES,
    PARTS,
    Importance,
    MarginalEffect,
    complete,
    importances,
    is_population,
    marginal_effect,
    obstacle,
    values_of,
    varied_groups,
    varying_in,
)
from ebft_study.analysis.settings import is_number
from ebft_study.analysis.summary import MAX_GROUPS, Configuration, StudySummary
from ebft_study.report import drawing
from ebft_study.report.drawing import ReportFigure

CLEAR, UNCLEAR = "#2372b8", "#b9c4cf"
COLORS = "viridis"
INCOMPLETE = "#bdbdbd"
MAX_PANELS = 12
MAX_SETTINGS = 6
MAX_VALUE_CHARACTERS = 16
NOT_READ = "not read"
# Lines through one value lie side by side, the best at the bottom, within this part of an axis.
SPREAD = 0.05


def importance(study: StudySummary) -> ReportFigure | None:
    """The importance of each varying setting, with its interval and the threshold that it has to exceed."""
    explained = [group for group in varied_groups(study) if not obstacle(study, group)]
    groups = explained[:MAX_GROUPS]
    if not groups:
        return None
    rankings = [importances(study, group) for group in groups]
    heights = [len(ranking) + 1.2 for ranking in rankings]
    figure = Figure(figsize=(8.4, 0.6 + 0.36 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, group, ranking in zip(panels, groups, rankings, strict=True):
        for y, each in enumerate(ranking):
            _importance_row(axes, y, each)
        axes.set_yticks(range(len(ranking)), [text.named(each.name) for each in ranking])
        axes.set_ylim(len(ranking) - 0.4, -0.6)
        axes.set_xlim(0, 1)
        axes.grid(axis="y", visible=False)
        axes.set_title(_label(study, group) if len(groups) > 1 else "")
    axes.set_xlabel("share of the variance of ranks that the setting explains alone")
    drawing.add_legend(figure)
    caption = (
        f"How much of the order of the configurations by validation {study.objective[0]} each setting explains alone "
        "(PED-ANOVA, averaged over all target quantiles), with the 95 % interval over configurations and seeds. The "
        "black mark is what a setting without any effect exceeds in 5 % of shuffles of the values, for one setting or "
        "more: a grey bar cannot be told from none. What settings do only in combination is in no bar. "
        f"{' '.join(_reading(study, *each, groups) for each in zip(groups, rankings, strict=True))}{_of(explained)}"
    )
    return ReportFigure("importance", "Which settings matter", caption, figure)


def _importance_row(axes: Axes, y: int, each: Importance) -> None:
    label = "clear" if each.is_clear else "not clear"
    axes.barh(y, each.share, height=0.6, color=CLEAR if each.is_clear else UNCLEAR, label=label)
    axes.plot([each.low, each.high], [y, y], color=drawing.INK, linewidth=1.2, label="95 % interval")
    axes.plot(
        [each.threshold] * 2, [y - 0.4, y + 0.4], color="#000000", linewidth=2.4, label="threshold without effect"
    )


def _reading(
    study: StudySummary, group: Sequence[Configuration], ranking: Sequence[Importance], groups: Sequence[Any]
) -> str:
    """A sentence on one group: what is clear, how stable the first rank is, and what was left out."""
    first, measured = ranking[0], complete(group)
    clear = [text.symbol(each.name) for each in ranking if each.is_clear]
    verdict = f"{text.listed(clear)} clearly matter{'s' * (len(clear) == 1)}" if clear else "no setting clearly matters"
    label = f" of {_label(study, group)}" if len(groups) > 1 else ""
    left_out = [c for c in group if c not in measured]
    stopped = any((c.trials["status"] == "stopped").any() for c in left_out)
    rest = f" ({len(left_out)} incomplete left out{', some for their values: stopped early' * stopped})"
    return (
        f"Among {len(measured)} configurations{label}{rest * bool(left_out)}, {verdict}; {text.symbol(first.name)} is "
        f"first in {100 * first.first:.0f} % of the resamples."
    )


def _of(groups: Sequence[Sequence[Configuration]]) -> str:
    more = f" Drawn are the first {MAX_GROUPS} of {len(groups)} groups of configurations that can be compared."
    return more * (len(groups) > MAX_GROUPS)


def _label(study: StudySummary, group: Sequence[Configuration]) -> str:
    """`pooling=mean`: what the configurations of a group share and those of others do not."""
    return study.map_label(group[0].map_of(study.objective[0]))


# --- marginal effects ------------------------------------------------------------------------------------------


def marginal_effects(study: StudySummary) -> ReportFigure | None:
    """The mean effect of each value of each setting on the objective, over all combinations of the other settings."""
    groups = varied_groups(study)
    effects = [
        (g, effect) for g in groups for name in varying_in(study, g) if (effect := marginal_effect(study, g, name))
    ]
    if not effects:
        return None
    shown = effects[:MAX_PANELS]
    columns = min(3, max(sum(other is group for other, _ in shown) for group, _ in shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(8.4, 0.4 + 2.5 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=len(groups) == 1).flat)
    for axes, (group, effect) in zip(panels, shown, strict=False):
        _marginal_panel(axes, effect)
        axes.set_title(_label(study, group) if len(groups) > 1 else "")
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel(f"effect on {study.objective[0]}\n({drawing.unit_of(study.objective[0])})")
    others = [text.symbol(name) for name in study.varying if name not in {effect.name for _, effect in effects}]
    more = f" Not drawn: {text.listed(others)}; no set of configurations differs in it alone and has all its values."
    more = more * bool(others) + f" Drawn are the first {MAX_PANELS} of {len(effects)} panels." * (
        len(effects) > len(shown)
    )
    metric, mode = study.objective
    caption = (
        f"Validation {metric} at each value of a setting, less the mean over its values: means over the sets of "
        f"configurations that differ in this setting alone and have every value, paired by seed, with 95 % intervals "
        f"over seeds. {'Lower' if mode == 'min' else 'Higher'} is better. An effect that depends on the "
        f"other settings is averaged here.{more}"
    )
    return ReportFigure("marginal_effects", "What each setting does on average", caption, figure)


def _marginal_panel(axes: Axes, effect: MarginalEffect) -> None:
    axes.axhline(0, color=drawing.BASE_COLOR, linewidth=0.9)
    axes.errorbar(
        drawing.setting_axis(axes, effect.values, drawing.TICK_CHARACTERS // 2),
        [each.mean for each in effect.effects],
        yerr=[each.half_width if each.n > 1 else 0.0 for each in effect.effects],
        color=CLEAR, marker="o", markersize=4.5, linewidth=1.1, elinewidth=1.6,
    )  # fmt: skip
    axes.margins(y=0.15)
    axes.set_xlabel(text.named(effect.name))
    sets = f"{effect.n_blocks} set{'s' * (effect.n_blocks != 1)}"
    style: dict[str, Any] = {"fontsize": 7.5, "color": drawing.QUIET, "ha": "right", "va": "top"}
    axes.text(0.98, 0.98, sets, transform=axes.transAxes, **style)


# --- parallel coordinates --------------------------------------------------------------------------------------


def parallel_coordinates(study: StudySummary) -> ReportFigure | None:
    """Each configuration as a line through its settings to its objective, which gives its colour."""
    every = drawable(study)
    groups = every[:MAX_GROUPS]
    if not groups:
        return None
    figure = Figure(figsize=(8.4, 0.3 + 3.2 * len(groups)), layout="constrained")
    for axes, group in zip(figure.subplots(len(groups), 1, squeeze=False)[:, 0], groups, strict=True):
        _coordinates(axes, study, group)
        axes.set_title(_label(study, group) if len(groups) > 1 else "")
    metric, mode = study.objective
    faint = sum(len(group) - len(complete(group)) for group in groups)
    left_out = [text.symbol(name) for name in study.varying[MAX_SETTINGS:]]
    caption = (
        f"Each line is a configuration, through the values of its settings to its validation {metric} on the right "
        f"(mean over seeds; {'lower' if mode == 'min' else 'higher'} is better); the dark lines are the best. Listed "
        "values are evenly spaced, and lines through one value lie side by side, the best lowest. Baselines are not "
        "drawn."
        + f" Grey: {faint} configuration{'s' * (faint > 1)} without a result for every seed." * bool(faint)
        + f" Not drawn: {text.listed(left_out)}." * bool(left_out)
        + _of(every)
    )
    return ReportFigure("parallel_coordinates", "All configurations at once", caption, figure)


@dataclass(frozen=True)
class Coordinates:
    """The lines of a group of configurations, the best first, and the labels of their axes; all heights from 0 to 1.

    `lines` have a height per setting and that of the objective, as `measured` does in order; `incomplete` lack it.
    """

    names: tuple[str, ...]
    measured: tuple[Configuration, ...]
    lines: tuple[tuple[float, ...], ...]
    incomplete: tuple[tuple[float, ...], ...]
    ticks: tuple[list[tuple[float, str]], ...]
    """Heights and labels of each setting, then of the objective."""
    outcomes: tuple[float, float]
    """The objective at heights 0 and 1."""


def coordinates(study: StudySummary, group: Sequence[Configuration]) -> Coordinates:
    """A group of `drawable` as parallel coordinates."""
    names, is_min = varying_in(study, group)[:MAX_SETTINGS], study.objective[1] == "min"
    measured = sorted(complete(group), key=lambda c: c.validated(), reverse=not is_min)
    scales = [_Scale(group, name) for name in names]
    norm = _outcome_scale([c.validated() for c in measured])
    lines = [
        (*(scale.at(c, rank / (len(measured) - 1)) for scale in scales), float(norm(c.validated())))
        for rank, c in enumerate(measured)
    ]
    ticks = [*(scale.ticks() for scale in scales), _outcome_ticks(norm, measured[-1].validated())]
    incomplete = [tuple(scale.at(c, 0.5) for scale in scales) for c in group if c not in measured]
    outcomes = (float(norm.inverse(0.0)), float(norm.inverse(1.0)))
    return Coordinates(tuple(names), tuple(measured), tuple(lines), tuple(incomplete), tuple(ticks), outcomes)


def drawable(study: StudySummary) -> list[list[Configuration]]:
    """Groups of configurations that parallel coordinates can show."""
    if is_population(study):
        return []
    return [g for g in varied_groups(study) if len(varying_in(study, g)) > 1 and len(complete(g)) > 1]


def _coordinates(axes: Axes, study: StudySummary, group: Sequence[Configuration]) -> None:
    found = coordinates(study, group)
    for heights in found.incomplete:
        axes.plot(heights, color=INCOMPLETE, linewidth=0.8, zorder=1)
    colors = ScalarMappable(Normalize(0, 1), COLORS if study.objective[1] == "min" else f"{COLORS}_r")
    for rank, heights in enumerate(found.lines):
        color, on_top = colors.to_rgba(np.array(heights[-1])), 3 - rank / len(found.lines)
        axes.plot(heights, color=color, linewidth=1.5, zorder=on_top)
    for x, labels in enumerate(found.ticks):
        axes.axvline(x, color=drawing.INK, linewidth=0.9, zorder=4)
        for height, label in labels:
            _value_label(axes, x, height, label, right=x == len(found.names))
    titles = [text.named(name).replace(" (", "\n(") for name in found.names]
    axes.set_xticks(range(len(found.names) + 1), [*titles, f"validation\n{study.objective[0]}"])
    axes.set(xlim=(-0.5, len(found.names) + 0.35), ylim=(-0.05, 1.05), yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _value_label(axes: Axes, x: int, height: float, label: str, *, right: bool) -> None:
    shortened = label if len(label) <= MAX_VALUE_CHARACTERS else label[: MAX_VALUE_CHARACTERS - 1] + "…"
    axes.annotate(
        shortened, (x, height), xytext=(5 if right else -5, 0), textcoords="offset points", fontsize=7.5, zorder=5,
        ha="left" if right else "right", va="center", bbox={"fc": "white", "ec": "none", "pad": 0.8, "alpha": 0.85},
    )  # fmt: skip


def _outcome_scale(values: Sequence[float]) -> Normalize:
    """From the best to the worst value; one that lies far off does not flatten the others (values: the best first)."""
    best, distances = values[0], np.abs(np.array(values) - values[0])
    limit = DIVERGENCE * float(np.median(distances[1:]))
    furthest = min(distances.max(), limit or math.inf) or 1.0
    low, high = sorted((best, best + math.copysign(furthest, values[-1] - best)))
    return Normalize(low, high, clip=True)


def _outcome_ticks(norm: Normalize, worst: float) -> list[tuple[float, str]]:
    """Heights and labels of the objective, whose worst value may lie beyond the scale."""
    labels = [text.number(float(norm.inverse(height))) for height in (0.0, 0.5, 1.0)]
    if float(norm(worst, clip=False)) > 1:
        labels[2] = f"≥ {labels[2]}"
    elif float(norm(worst, clip=False)) < 0:
        labels[0] = f"≤ {labels[0]}"
    return list(zip((0.0, 0.5, 1.0), labels, strict=True))


class _Scale:
    """Heights between 0 and 1 for the values of one setting: evenly spaced ones of a list, and those of a range."""

    def __init__(self, group: Sequence[Configuration], name: str) -> None:
        self.name = name
        self.values = values_of(group, name)
        self.is_range = len(self.values) > MAX_VALUES and all(map(is_number, self.values))
        self.is_log = self.is_range and self.values[0] > 0 and self.values[-1] >= drawing.LOG_RATIO * self.values[0]
        self.rows = PARTS if self.is_range else len(self.values)
        self.has_unread = any(name in c.unread for c in group)

    def at(self, configuration: Configuration, rank: float) -> float:
        """The height of a configuration, whose `rank` between 0 and 1 keeps lines through one value apart."""
        if self.name in configuration.unread:
            return self._row(self.rows) + SPREAD * rank
        value = configuration.settings[self.name]
        return self._along(value) if self.is_range else self._row(self.values.index(value)) + SPREAD * rank

    def ticks(self) -> list[tuple[float, str]]:
        """Heights and labels."""
        low, high = self.values[0], self.values[-1]
        if self.is_range:
            middle = math.sqrt(low * high) if self.is_log else (low + high) / 2
            marks = [(self._along(value), text.setting(float(f"{value:.2g}"))) for value in (low, middle, high)]
        else:
            marks = [(self._row(row) + SPREAD / 2, text.setting(value)) for row, value in enumerate(self.values)]
        return marks + [(self._row(self.rows) + SPREAD / 2, NOT_READ)] * self.has_unread

    def _row(self, index: int) -> float:
        """The lower end of an evenly spaced value; the last row is that of configurations without one."""
        return index / max(self.rows - (not self.has_unread), 1) * (1 - SPREAD)

    def _along(self, value: float) -> float:
        scaled = math.log if self.is_log else float
        low, high = scaled(self.values[0]), scaled(self.values[-1])
        part = (scaled(value) - low) / (high - low)
        return part * (self._row(self.rows - 1) if self.has_unread else 1.0)
