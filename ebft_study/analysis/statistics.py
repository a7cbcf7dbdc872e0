"""Statistics over seeds: means and paired differences with 95 % Student-t intervals, and how to print them.

Seeds are the units: an interval says how far the mean would move with other seeds of the same study. Trials of
one seed share data order and the random numbers of the evaluation, hence differences are paired by seed.

Where a configuration is chosen without the seed that scores it (`analysis.selection`), the scores have no bias, but
each score takes part in the choices for the other seeds: they are dependent. Their mean is then as uncertain as one
of them (`dependent=True`), which holds for every correlation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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

    @property
    def p_value(self) -> float:
        """Two-sided p-value of a mean of zero, that of the t-test which the interval inverts; NaN without interval."""
        from scipy.special import stdtr

        if self.n < 2:
            return math.nan
        if self.half_width == 0:
            return float(self.mean == 0)
        t = self.mean / self.half_width * _t_quantile(self.n)
        return float(2 * stdtr(self.n - 1, -abs(t)))

    def minus(self, amount: float) -> Interval:
        """The interval of the mean less `amount`, for a test against a margin."""
        return Interval(self.mean - amount, self.low - amount, self.high - amount, self.n)

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


def mean_interval(values: Iterable[float], *, dependent: bool = False) -> Interval:
    """Mean of `values` with its t-interval: mean ± t(0.975, n-1) * s / sqrt(n); s instead if they are `dependent`.

    The standard error of a mean of n values, each of standard deviation s, is at most s, whatever their correlation.
    """
    sample = np.array([value for value in values if math.isfinite(value)], dtype=float)
    n = len(sample)
    mean = float(sample.mean()) if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    margin = float(_t_quantile(n) * sample.std(ddof=1) / (1 if dependent else math.sqrt(n)))
    return Interval(mean, mean - margin, mean + margin, n)


def _t_quantile(n: int) -> float:
    from scipy.special import stdtrit  # the quantile of `scipy.stats.t`, whose module takes half a second to import

    return float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))


def paired_difference(
    values: Mapping[int, float], reference: Mapping[int, float], *, dependent: bool = False
) -> Interval:
    """Mean of `values - reference` over the seeds that both have, with its t-interval."""
    shared = sorted(values.keys() & reference.keys())
    return mean_interval((values[seed] - reference[seed] for seed in shared), dependent=dependent)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted by Holm for their number, which bounds the chance of one false rejection; NaN stays NaN."""
    tested = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[index] = largest
    return adjusted
