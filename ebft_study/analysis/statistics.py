"""Statistics over seeds: means and paired differences with 95 % Student-t intervals, and how to print them.

Seeds are the units: an interval says how far the mean would move with other seeds of the same study. Trials of
one seed share data order and the random numbers of the evaluation, hence differences are paired by seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ebft_study import text

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
        """Side of zero on which the whole interval is; unclear when it contains zero or does not exist."""
        if self.high < 0:
            return "below"
        return "above" if self.low > 0 else "unclear"

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def as_level(self) -> str:
        """2.613 ± 0.004, a mean with the half-width of its interval; alone where one seed allows none."""
        if self.n == 0:
            return text.NOTHING
        return text.number(self.mean) + (f" ± {text.number(self.half_width)}" if self.n > 1 else "")

    def as_difference(self) -> str:
        """−0.031 ± 0.007, with its sign and as many digits as small differences need."""
        if self.n == 0:
            return text.NOTHING
        margin = f" ± {text.number(self.half_width, self._decimals)}" if self.n > 1 else ""
        return text.signed(self.mean, self._decimals) + margin

    def in_words(self) -> str:
        """The difference for a sentence: −0.031 (95 % interval −0.038 to −0.024, 3 seeds)."""
        if self.n < 2:
            return f"{text.signed(self.mean)} ({self.n} seed, so no interval)"
        mean, low, high = (text.signed(value, self._decimals) for value in (self.mean, self.low, self.high))
        return f"{mean} (95 % interval {low} to {high}, {self.n} seeds)"

    @property
    def _decimals(self) -> int:
        return text.decimals_of(self.mean, self.half_width)


def mean_interval(values: Iterable[float]) -> Interval:
    """Mean of independent `values` with its t-interval: mean ± t(0.975, n-1) * s / sqrt(n)."""
    from scipy.special import stdtrit  # the quantile of `scipy.stats.t`, whose module takes half a second to import

    sample = np.array([value for value in values if math.isfinite(value)], dtype=float)
    n = len(sample)
    mean = float(sample.mean()) if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    margin = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2) * sample.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - margin, mean + margin, n)


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Interval:
    """Mean of `values - reference` over the seeds that both have, with its t-interval."""
    return mean_interval(values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys()))
