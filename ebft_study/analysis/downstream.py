"""Scores of a study's configurations on benchmarks, with intervals over seeds and problems."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from ebft_study import text
from ebft_study.analysis.statistics import Interval, mean_interval
from ebft_study.analysis.summary import StudySummary
from ebft_study.results import METRICS

CONTAMINATED = "contaminated_fraction"
Key = tuple[str, int | None]
"""Metric, and k of the best of k."""


@dataclass(frozen=True)
class BenchmarkScores:
    """All scores on one benchmark.

    `rows` are base models, then configurations: label, number of seeds, score by metric. `contaminated` is the fraction
    of problems that the training data repeat, over all trials; None where it was not measured.
    """

    name: str
    columns: tuple[Key, ...]
    rows: tuple[tuple[str, int, dict[Key, Interval]], ...]
    contaminated: tuple[float, float] | None
    """Smallest and largest fraction, of trials with different data."""


def benchmark_scores(study: StudySummary) -> list[BenchmarkScores]:
    """A table per benchmark: of base models, and of finished trials at the end (`benchmark_rows`)."""
    return [_of_benchmark(study, str(name), of_one) for name, of_one in study.benchmark_rows.groupby("benchmark")]


def _of_benchmark(study: StudySummary, name: str, rows: pd.DataFrame) -> BenchmarkScores:
    overlap = rows[rows["metric"] == CONTAMINATED].sort_values("step").groupby("trial_id")["value"].last().map(float)
    rows = rows[rows["metric"] != CONTAMINATED]
    end = rows[rows["moment"] == "end"]
    lines = [*_base_lines(study, rows[rows["moment"] == "base"])]
    for c in study.configurations:
        scores = _scores(end[end["trial_id"].isin(c.finished["trial_id"])])
        if scores:
            lines.append((c.label, max(interval.n for interval in scores.values()), scores))
    order = {metric: position for position, metric in enumerate(METRICS)}
    keys = {key for _, _, scores in lines for key in scores}
    columns = tuple(sorted(keys, key=lambda key: (order[key[0]], key[1] or 0)))
    contaminated = (overlap.min(), overlap.max()) if len(overlap) else None
    return BenchmarkScores(name, columns, tuple(lines), contaminated)


def _base_lines(study: StudySummary, rows: pd.DataFrame) -> list[tuple[str, int, dict[Key, Interval]]]:
    """A line for each base model: all trials that start from it have its scores."""
    models = study.results.trials.set_index("trial_id")["model"]
    groups = list(rows.groupby(rows["trial_id"].map(models)))
    lines = []
    for model, of_model in groups:
        one = _scores(of_model[of_model["trial_id"] == of_model["trial_id"].min()])
        lines.append((f"base model, {model}" if len(groups) > 1 else "base model", 0, one))
    return lines


def _scores(rows: pd.DataFrame) -> dict[Key, Interval]:
    """Mean over trials of each metric."""
    values: dict[Key, list[float]] = {}
    for metric, position, value in zip(rows["metric"], rows["position"], rows["value"], strict=True):
        values.setdefault((metric, None if text.is_missing(position) else int(position)), []).append(value)
    return {key: mean_interval(of_key) for key, of_key in values.items()}
