"""Figures of a study: every configuration against the base model, and learning curves; `draw_all` for all of them.

Each function returns None where the study has nothing to draw. Lower is better for CE and CFM everywhere. Differences
are to the base model of the same trial: below zero is a gain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ebft_study.report import pareto, style
from ebft_study.report.grids import axis_plots, heat_maps
from ebft_study.report.pictures import DIVERGENCE, TITLES, Picture, most_relevant, panel_title, unit_of
from ebft_study.report.profiles import entropy_by_position, length_profile
from ebft_study.report.tables import Configuration, Study

# More lines or rows than this cannot be told apart: the best by validation are drawn, and the caption says so.
MAX_LINES = 12
MAX_ROWS = 30


def draw_all(study: Study) -> list[Picture]:
    """Every figure that the study's data allow."""
    drawers: tuple[Callable[[Study], Picture | None], ...] = (
        differences,
        learning_curves,
        heat_maps,
        axis_plots,
        length_profile,
        entropy_by_position,
        pareto.picture,
    )
    with matplotlib.rc_context(style.RC):
        return [picture for draw in drawers if (picture := draw(study)) is not None]


# --- configurations against the base model ---------------------------------------------------------------------


def differences(study: Study) -> Picture | None:
    """Every configuration's held-out CE and CFM minus the base model's, with intervals and single seeds."""
    rows = [c for c in study.configurations if c.change("ce_loss").n or c.change("cfm_loss").n]
    if not rows:
        return None
    shown, omitted = most_relevant(rows, MAX_ROWS)
    looks = style.looks(study)
    figure = Figure(figsize=(8.4, 1.3 + 0.3 * len(shown)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, metric in zip(panels, TITLES, strict=True):
        axes.axvline(0, color=style.BASE_COLOR, linestyle="--", linewidth=1.2)
        for y, configuration in enumerate(shown):
            _difference_row(axes, y, configuration, metric, looks[configuration.name])
        axes.set_title(panel_title(study, metric))
        axes.set_xlabel(f"difference to base model ({unit_of(metric)})")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(shown)), [c.label for c in shown])
    panels[0].set_ylim(len(shown) - 0.4, -0.6)
    caption = (
        "Mean over seeds of the held-out value after training minus the base model's, with the 95 % interval over "
        "seeds; the small dots below it are single seeds. Left of the dashed line is better than the base model."
        f"{omitted}"
    )
    return Picture("differences", "Every configuration against the base model", caption, figure)


def _difference_row(axes: Axes, y: int, configuration: Configuration, metric: str, look: style.Look) -> None:
    final, base = (values.get((metric, None), {}) for values in (configuration.final, configuration.base))
    singles = [final[seed] - base[seed] for seed in final if seed in base]
    axes.plot(singles, [y + 0.26] * len(singles), ".", color=look.color, alpha=0.6, markersize=4, markeredgewidth=0)
    change = configuration.change(metric)
    if change.n > 1:
        axes.plot([change.low, change.high], [y, y], color=look.color, linewidth=2)
    if change.n:
        axes.plot(change.mean, y, look.marker, color=look.color, markersize=5.5)


# --- learning curves -------------------------------------------------------------------------------------------


def learning_curves(study: Study) -> Picture | None:
    """CE, CFM (validation) and reward (training batch) over steps."""
    panels = [
        ("ce_loss", "Validation CE", "nats/token"),
        ("cfm_loss", "Validation CFM loss", "squared feature norm"),
        ("reward", "Reward of the training rollouts", "reward"),
    ]
    metrics = study.results.metrics
    panels = [panel for panel in panels if metrics[panel[0]].notna().any()]
    if not panels:
        return None
    shown, omitted = most_relevant(study.configurations, MAX_LINES)
    figure = Figure(figsize=(8.4, 0.5 + 2.55 * len(panels)))
    figure.subplots_adjust(left=0.09, right=0.78, top=1 - 0.3 / figure.get_figheight(), hspace=0.34, bottom=0.07)
    for axes, (metric, title, unit) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        _curves(axes, study, shown, metric)
        axes.set_title(title)
        axes.set_ylabel(unit)
    axes.set_xlabel("optimizer step")
    caption = (
        "Lines are means over the seeds of a configuration, bands span its lowest to highest seed; the dashed line is "
        "the base model (step 0). Thin lines ending in × are trials that did not finish; they are not in the means. "
        "A line that rises far above the rest leaves the frame; its label stays at the edge. "
        "The reward's scale depends on α, so compare its course, not its height, across α."
        f"{omitted}"
    )
    return Picture("learning_curves", "Learning curves", caption, figure)


def _curves(axes: Axes, study: Study, shown: Sequence[Configuration], metric: str) -> None:
    looks, ends, means = style.looks(study), [], list[pd.Series]()
    for configuration in shown:
        look = looks[configuration.name]
        finished, others = _series(study, configuration, metric)
        for one in others:
            axes.plot(one.index, one, color=look.color, linewidth=0.8, alpha=0.7)
            axes.plot(one.index[-1:], one[-1:], "x", color=look.color, markersize=5)
        if finished.empty:
            ends += [(one.index[-1], one.iloc[-1], f"{configuration.label} ×", look.color) for one in others[:1]]
            continue
        mean = finished.mean(axis=1)
        axes.fill_between(mean.index, finished.min(axis=1), finished.max(axis=1), color=look.color, alpha=0.15, lw=0)
        axes.plot(mean.index, mean, color=look.color, linestyle=look.linestyle)
        ends.append((mean.index[-1], mean.iloc[-1], configuration.label, look.color))
        means.append(mean)
    at_start = study.results.metrics.loc[study.results.metrics["step"] == 0, metric].dropna()
    axes.set_xlim(0, max(study.results.metrics["step"].max(), 1))
    if len(at_start):
        _leave_out_divergence(axes, at_start.mean(), means)
        axes.axhline(at_start.mean(), color=style.BASE_COLOR, linestyle="--", linewidth=1.2, zorder=1)
        ends.append((axes.get_xlim()[1], at_start.mean(), style.BASE_LABEL, style.BASE_COLOR))
    style.label_line_ends(axes, ends)


def _leave_out_divergence(axes: Axes, base: float, means: Sequence[pd.Series]) -> None:
    """Let lines that rise far above the base model leave the frame, or they would flatten all the others."""
    far = [float((mean - base).abs().max()) for mean in means if len(mean)]
    if not far:
        return
    limit = base + DIVERGENCE * float(np.median(far))
    values = np.concatenate([*means, [base]])
    if values.max() > limit:
        inside = values[values <= limit]
        margin = 0.06 * (inside.max() - inside.min())
        axes.set_ylim(inside.min() - margin, inside.max() + margin)


def _series(study: Study, configuration: Configuration, metric: str) -> tuple[pd.DataFrame, list[pd.Series]]:
    """Steps x finished trials at the steps that all of them reported, and the other trials one by one."""
    rows = study.results.metrics[study.results.metrics["trial_id"].isin(configuration.trials["trial_id"])]
    table = rows[np.isfinite(rows[metric])].pivot(index="step", columns="trial_id", values=metric)
    finished = configuration.trials.loc[configuration.trials["status"] == "finished", "trial_id"]
    done = table[[name for name in table.columns if name in set(finished)]]
    others = [table[name].dropna() for name in table.columns if name not in set(finished)]
    return (done.dropna() if done.shape[1] else pd.DataFrame()), [one for one in others if len(one)]
