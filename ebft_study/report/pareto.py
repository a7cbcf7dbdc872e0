"""Several objectives: which configurations no other one beats in all of them, as a table and a figure.

Values are those of the validation split that the search was told, means over the seeds of finished trials: what was
stopped early is not comparable. Baselines are shown, and are no part of the front.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ebft_study import text
from ebft_study.report import style
from ebft_study.report.pictures import Picture
from ebft_study.report.tables import Configuration, Study

Objective = tuple[str, str]
"""Metric and mode."""
MAX_LABELS = 12


@dataclass(frozen=True)
class Point:
    """A configuration with its objectives; `rank` says whether it is on the front."""

    configuration: Configuration
    values: tuple[float, ...]
    on_front: bool


def objectives(spec: Mapping[str, Any]) -> list[Objective]:
    """Metric and mode of each objective in study.yaml, which has one of them or a list."""
    given = spec.get("objective")
    each = given if isinstance(given, list) else [given]
    return [(str(one.get("metric")), str(one.get("mode"))) for one in each if isinstance(one, Mapping)]


def front(values: Sequence[Sequence[float]], modes: Sequence[str]) -> list[bool]:
    """Which rows no other row dominates: none is at least as good in every column and better in one."""
    losses = np.asarray(values, dtype=float).reshape(len(values), len(modes)) * [
        1.0 if mode == "min" else -1.0 for mode in modes
    ]
    return [not bool(np.any(np.all(losses <= row, axis=1) & np.any(losses < row, axis=1))) for row in losses]


def points(study: Study) -> list[Point]:
    """Every configuration with all objectives, the front's first, each by the first objective; baselines last."""
    asked = objectives(study.results.spec)
    measured = {c.name: _values(study, c, [name for name, _ in asked]) for c in study.configurations}
    complete = [c for c in study.configurations if all(math.isfinite(value) for value in measured[c.name])]
    on_axes = [c for c in complete if c.baseline is None]
    chosen = front([measured[c.name] for c in on_axes], [mode for _, mode in asked])
    best = {c.name for c, is_best in zip(on_axes, chosen, strict=True) if is_best}
    found = [Point(c, measured[c.name], c.name in best) for c in complete]
    sign = 1.0 if asked and asked[0][1] == "min" else -1.0
    return sorted(found, key=lambda p: (p.configuration.baseline is not None, not p.on_front, sign * p.values[0]))


def _values(study: Study, configuration: Configuration, metrics: Sequence[str]) -> tuple[float, ...]:
    done = configuration.trials.loc[configuration.trials["status"] == "finished", "trial_id"]
    rows = study.results.metrics
    rows = rows[rows["trial_id"].isin(done)].sort_values("step")
    last = rows.groupby("trial_id")[list(metrics)].last() if len(rows) else rows[list(metrics)]
    complete = len(last) == len(done) > 0
    return tuple(float(last[name].mean(skipna=False)) if complete else math.nan for name in metrics)


def rows(study: Study) -> list[dict[str, Any]]:
    """The table of the front; nothing for a study with one objective."""
    if len(objectives(study.results.spec)) < 2:
        return []
    return [
        {
            "label": point.configuration.label,
            "values": [text.number(value) for value in point.values],
            "heldout": [text.level(point.configuration.level(name)) for name in ("ce_loss", "cfm_loss")],
        }
        for point in points(study)
        if point.on_front
    ]


def picture(study: Study) -> Picture | None:
    """The first two objectives of every configuration, with the front marked."""
    asked = objectives(study.results.spec)
    shown = points(study) if len(asked) > 1 else []
    if not any(point.on_front for point in shown):
        return None
    looks = style.looks(study)
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    best = sorted(point.values[:2] for point in shown if point.on_front)
    if len(asked) == 2:
        axes.step(*zip(*best, strict=True), where=_corner(asked), color=style.INK, linewidth=1.0, zorder=1)
    for point in shown:
        baseline, color = point.configuration.baseline is not None, looks[point.configuration.name].color
        face = color if point.on_front or baseline else "none"
        axes.scatter(point.values[0], point.values[1], s=46 if point.on_front else 26, facecolor=face, edgecolor=color,
                     marker="s" if baseline else "o", zorder=2)  # fmt: skip
    labelled = [point for point in shown if point.on_front or point.configuration.baseline is not None]
    for point in labelled if len(labelled) <= MAX_LABELS else ():
        x, y = point.values[:2]
        axes.annotate(point.configuration.label, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7)
    axes.margins(x=0.12, y=0.08)
    axes.set_xlabel(_axis_label(asked[0]))
    axes.set_ylabel(_axis_label(asked[1]))
    more = "" if len(asked) == 2 else f" The front is that of all {len(asked)} objectives, of which two are drawn."
    caption = (
        "Validation values after training, means over seeds. Filled circles: no other configuration is at least as "
        f"good in every objective and better in one. Squares are baselines.{more}"
    )
    return Picture("pareto_front", "The Pareto front", caption, figure)


def _corner(asked: Sequence[Objective]) -> Any:
    """Where the region that the front beats lies: steps turn away from it."""
    return "post" if asked[0][1] == "min" else "pre"


def _axis_label(objective: Objective) -> str:
    metric, mode = objective
    return f"{metric} ({'lower' if mode == 'min' else 'higher'} is better)"
