"""Figures of values along the completion: CFM over its length, entropy over its positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from ebft_study.analysis.statistics import mean_interval
from ebft_study.report import style
from ebft_study.report.pictures import Picture, protagonists
from ebft_study.report.tables import Configuration, Study


def length_profile(study: Study) -> Picture | None:
    """CFM over completion length for the base model, SFT and the best EBFT, and the differences to the base model."""
    models = [c for c in protagonists(study) if any(c.level("cfm_loss", length).n for length in study.lengths)]
    base = [study.base("cfm_loss", length) for length in study.lengths]
    if len(study.lengths) < 2 or (not models and all(map(math.isnan, base))):
        return None
    figure = Figure(figsize=(8.4, 3.3))
    figure.subplots_adjust(left=0.08, right=0.83, bottom=0.15, top=0.9, wspace=0.24)
    levels, gains = figure.subplots(1, 2)
    levels.plot(study.lengths, base, "--", color=style.BASE_COLOR, linewidth=1.4, marker=".")
    gains.axhline(0, color=style.BASE_COLOR, linestyle="--", linewidth=1.4)
    looks, ends = style.looks(study), []
    for model in models:
        ends.append(_profile_of(levels, gains, model, study.lengths, looks[model.name]))
    for axes, title, label in (
        (levels, "Held-out CFM", "squared feature norm"),
        (gains, "Difference to the base model", ""),
    ):
        _length_axis(axes, study)
        axes.set_title(title)
        axes.set_ylabel(label)
    style.label_line_ends(gains, [*ends, (study.lengths[-1], 0.0, style.BASE_LABEL, style.BASE_COLOR)])
    caption = (
        "Left: held-out CFM against the length of the completion (mean over seeds). Right: the same minus the base "
        "model, with 95 % intervals over seeds; below zero is better. The dotted line marks the length of the "
        "rollouts in training. The EBFT configuration is the one with the lowest validation CFM."
    )
    return Picture("cfm_over_length", "CFM over completion length", caption, figure)


def _profile_of(
    levels: Axes, gains: Axes, model: Configuration, lengths: Sequence[int], look: style.Look
) -> tuple[float, float, str, str]:
    values = [model.level("cfm_loss", length).mean for length in lengths]
    changes = [model.change("cfm_loss", length) for length in lengths]
    levels.plot(lengths, values, color=look.color, linestyle=look.linestyle, marker=look.marker, markersize=3.5)
    gains.fill_between(lengths, [c.low for c in changes], [c.high for c in changes], color=look.color, alpha=0.13, lw=0)
    means = [c.mean for c in changes]
    gains.plot(lengths, means, color=look.color, linestyle=look.linestyle, marker=look.marker, markersize=3.5)
    return lengths[-1], means[-1], _named(model), look.color


def _length_axis(axes: Axes, study: Study) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(study.lengths, [str(length) for length in study.lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("completion length (tokens)")
    if study.length is not None:
        axes.axvline(study.length, color=style.QUIET, linestyle=":", linewidth=1)
        axes.text(
            study.length,
            0.02,
            f" G={study.length}",
            transform=axes.get_xaxis_transform(),
            fontsize=8,
            color=style.QUIET,
        )


def entropy_by_position(study: Study) -> Picture | None:
    """Entropy of the k-th generated token: flat for a calibrated model."""
    models = protagonists(study)
    positions = sorted({p for c in models for m, p in (*c.final, *c.base) if m == "entropy" and p is not None})
    if not positions:
        return None
    figure = Figure(figsize=(8.4, 3.1))
    figure.subplots_adjust(left=0.09, right=0.78, bottom=0.16, top=0.9)
    axes = figure.subplots()
    base = [study.base("entropy", k) for k in positions]
    axes.plot(positions, base, "--", color=style.BASE_COLOR, linewidth=1.4)
    looks, ends = style.looks(study), [(positions[-1], base[-1], style.BASE_LABEL, style.BASE_COLOR)]
    for model in models:
        look = looks[model.name]
        by_position = [list(model.final.get(("entropy", k), {}).values()) for k in positions]
        if not all(by_position):
            continue
        lowest, highest = [min(values) for values in by_position], [max(values) for values in by_position]
        means = [mean_interval(values).mean for values in by_position]
        axes.fill_between(positions, lowest, highest, color=look.color, alpha=0.13, lw=0)
        axes.plot(positions, means, color=look.color, linestyle=look.linestyle)
        ends.append((positions[-1], means[-1], _named(model), look.color))
    axes.set_title("Entropy of the next token during generation, held-out contexts")
    axes.set_xlabel("position in the completion (tokens)")
    axes.set_ylabel("nats/token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.01)
    style.label_line_ends(axes, [end for end in ends if math.isfinite(end[1])])
    caption = (
        "A calibrated model's entropy does not drift with the position of the generated token. Lines are means "
        "over seeds, bands span the lowest to the highest. The EBFT configuration is the one with the lowest "
        "validation CFM."
    )
    return Picture("entropy", "Entropy by position", caption, figure)


def _named(model: Configuration) -> str:
    return model.label if model.baseline else f"EBFT {model.label}"
