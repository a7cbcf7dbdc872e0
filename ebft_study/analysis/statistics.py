"""Statistics over seeds: means and paired differences with 95 % Student-t intervals.

Seeds are the units: an interval says how far the mean would move with other seeds of the same study. Trials of
one seed share data order and the random numbers of the evaluation, hence differences are paired by seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds with its interval; `low` and `high` are NaN where one seed allows none."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def side(self) -> Literal["below", "above", "unclear"]:
        """Where the whole interval lies relative to zero; unclear when it contains zero or does not exist."""
        if self.high < 0:
            return "below"
        return "above" if self.low > 0 else "unclear"

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def mean_interval(values: Iterable[float]) -> Interval:
    """Mean of independent `values` with its t-interval: mean ± t(0.975, n-1) * s / sqrt(n)."""
    sample = np.array([value for value in values if math.isfinite(value)], dtype=float)
    n = len(sample)
    mean = float(sample.mean()) if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * sample.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - margin, mean + margin, n)


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Interval:
    """Mean of `values - reference` over the seeds that both have, with its t-interval."""
    return mean_interval(values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys()))
