"""Values over steps: of a configuration's finished trials, of those that did not finish, and of benchmarks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from ebft_study.analysis.configuration import Configuration
from ebft_study.analysis.summary import StudySummary

# A value further from the base model than so many times the median one would flatten all the others.
DIVERGENCE = 4.0


def series(study: StudySummary, configuration: Configuration, metric: str) -> tuple[pd.DataFrame, list[pd.Series]]:
    """Steps x finished trials at the steps that all of them reported, and each of the other trials."""
    rows = study.results.metrics[study.results.metrics["trial_id"].isin(configuration.trials["trial_id"])]
    return _split(configuration, rows[np.isfinite(rows[metric])].rename(columns={metric: "value"}))


def score_series(
    study: StudySummary, configuration: Configuration, benchmark: str, metric: str, position: int | None
) -> tuple[pd.DataFrame, list[pd.Series]]:
    """The same of a score on a benchmark."""
    rows = study.benchmark_rows
    is_at = rows["position"].isna() if position is None else rows["position"] == position
    rows = rows[is_at & (rows["benchmark"] == benchmark) & (rows["metric"] == metric)]
    rows = rows[rows["trial_id"].isin(configuration.trials["trial_id"])]
    return _split(configuration, rows.assign(value=rows["value"].astype(float)))


def spread(finished: pd.DataFrame) -> pd.DataFrame:
    """By step, the mean over seeds with the lowest and the highest: columns step, mean, low, high and n."""
    columns = {"mean": finished.mean(axis=1), "low": finished.min(axis=1), "high": finished.max(axis=1)}
    return pd.DataFrame(columns).assign(n=finished.shape[1]).rename_axis("step").reset_index()


def frame_of(base: float, lines: Iterable[ArrayLike]) -> tuple[float, float] | None:
    """The range of values to draw where some lines rise far above the base model; None where none does."""
    values = [values for line in lines if len(values := np.asarray(line, dtype=float))]
    if not values:
        return None
    limit = base + DIVERGENCE * float(np.median([np.abs(line - base).max() for line in values]))
    together = np.concatenate([*values, [base]])
    if together.max() <= limit:
        return None
    inside = together[together <= limit]
    margin = 0.06 * float(inside.max() - inside.min())
    return float(inside.min()) - margin, float(inside.max()) + margin


def _split(configuration: Configuration, rows: pd.DataFrame) -> tuple[pd.DataFrame, list[pd.Series]]:
    table = rows.pivot(index="step", columns="trial_id", values="value")
    is_finished = table.columns.isin(configuration.finished["trial_id"])
    finished = table.loc[:, is_finished]
    unfinished = [table[name].dropna() for name in table.columns[~is_finished]]
    complete = finished.dropna() if finished.shape[1] else pd.DataFrame()
    return complete, [each for each in unfinished if len(each)]
