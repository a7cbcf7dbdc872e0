"""Pareto front of a study with several objectives: the configurations that no other one dominates.

Values are those that the search received (of the validation split; `reward` of the training batches), means over the
seeds of finished trials: trials that were stopped early are not comparable. Baselines are drawn, and are no part of the
front.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ebft_study import text
from ebft_study.analysis.summary import COMPARED, Configuration, StudySummary

Objective = tuple[str, str]
"""Metric and mode."""


@dataclass(frozen=True)
class Point:
    """A configuration with the values of its objectives, and whether it is on the front."""

    configuration: Configuration
    values: tuple[float, ...]
    on_front: bool


def objectives(spec: Mapping[str, Any]) -> list[Objective]:
    """Metric and mode of each objective in study.yaml, which has one of them or a list."""
    entry = spec.get("objective")
    entries = entry if isinstance(entry, list) else [entry]
    return [(str(each.get("metric")), str(each.get("mode"))) for each in entries if isinstance(each, Mapping)]


def front(values: Sequence[Sequence[float]], modes: Sequence[str]) -> list[bool]:
    """Whether each row is on the front: no other row is at least as good in every column and better in one."""
    signs = [1.0 if mode == "min" else -1.0 for mode in modes]
    losses = np.asarray(values, dtype=float).reshape(len(values), len(modes)) * signs
    return [not bool(np.any(np.all(losses <= row, axis=1) & np.any(losses < row, axis=1))) for row in losses]


def points(study: StudySummary) -> list[Point]:
    """Every configuration with all objectives, the front's first, each by the first objective; baselines last."""
    goals = objectives(study.results.spec)
    measured = {c.name: _last_values(study, c, [metric for metric, _ in goals]) for c in study.configurations}
    complete = [c for c in study.configurations if all(map(math.isfinite, measured[c.name]))]
    on_axes = [c.name for c in complete if c.baseline is None]
    chosen = front([measured[name] for name in on_axes], [mode for _, mode in goals])
    on_front = {name for name, is_best in zip(on_axes, chosen, strict=True) if is_best}
    sign = 1.0 if goals and goals[0][1] == "min" else -1.0
    return sorted(
        (Point(c, measured[c.name], c.name in on_front) for c in complete),
        key=lambda p: (p.configuration.baseline is not None, not p.on_front, sign * p.values[0]),
    )


def _last_values(study: StudySummary, configuration: Configuration, metrics: Sequence[str]) -> tuple[float, ...]:
    finished, rows = configuration.finished["trial_id"], study.results.metrics
    rows = rows[rows["trial_id"].isin(finished)].sort_values("step")
    last = rows.groupby("trial_id")[list(metrics)].last() if len(rows) else rows[list(metrics)]
    complete = len(last) == len(finished) > 0
    return tuple(float(last[name].mean(skipna=False)) if complete else math.nan for name in metrics)


def rows(study: StudySummary) -> list[dict[str, Any]]:
    """The table of the front; empty for a study with one objective."""
    if len(objectives(study.results.spec)) < 2:
        return []
    return [
        {
            "label": point.configuration.label,
            "values": [text.number(value) for value in point.values],
            "heldout": [point.configuration.level(name).as_level() for name in COMPARED],
        }
        for point in points(study)
        if point.on_front
    ]
