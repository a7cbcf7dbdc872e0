"""Statistics over seeds and held-out sequences: means and paired differences with 95 % intervals, and their words.

An interval says how far a mean would move with other seeds of the same study and, where values of single sequences are
known (`Score`), with other sequences. Trials of one seed share data order, and all trials share the sequences and the
random numbers of the evaluation, hence differences are paired by both. With few seeds, resampling them is far too sure
(docs/decisions.md): `bootstrap` is for comparison only, and no verdict uses it.

Where a configuration is chosen without the seed that scores it (`analysis.selection`), the scores have no bias, but
each score takes part in the choices for the other seeds: they are dependent. Their mean is then as uncertain as one
of them (`dependent=True`), which holds for every correlation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ebft_study import text

CONFIDENCE = 0.95
POWER = 0.8


class Score(float):
    """A held-out value that knows its sequences: the mean of their `values`, weighted by `counts`."""

    sequences: tuple[int, ...]
    counts: np.ndarray
    values: np.ndarray

    def __new__(cls, value: float, sequences: Iterable[int], counts: Any, values: Any) -> Score:
        score = super().__new__(cls, value)
        score.sequences = tuple(sequences)
        score.counts, score.values = np.asarray(counts), np.asarray(values, dtype=float)
        return score

    def __sub__(self, other: Any) -> float:
        difference = float(self) - float(other)
        if not is_paired([self, other]):
            return difference
        return Score(difference, self.sequences, self.counts, self.values - other.values)

    def __rmul__(self, factor: float) -> float:
        return Score(factor * float(self), self.sequences, self.counts, factor * self.values)

    @property
    def standard_error(self) -> float:
        """Standard error of the value over sequences, clustered by them."""
        return _sequence_error(self.counts, self.values)


def is_paired(values: Sequence[float]) -> bool:
    """Whether all values are known by sequence, for the same sequences and numbers of contexts in each."""
    first = values[0] if values else None
    return isinstance(first, Score) and all(
        isinstance(v, Score) and v.sequences == first.sequences and np.array_equal(v.counts, first.counts)
        for v in values
    )


def pooled(values: Sequence[float]) -> float:
    """The mean of scores of one model on several benchmarks, with the sequences of all where they are known.

    Sequences weigh as much as their benchmark's mean does. Their scatter is taken around the common mean, so the
    differences between benchmarks count as noise: an error that is too large, never too small.
    """
    mean = float(np.mean([float(value) for value in values]))
    scores = [value for value in values if isinstance(value, Score)]
    if len(scores) < len(values) or len(values) == 1:
        return values[0] if len(values) == 1 else mean
    counts = np.concatenate([score.counts / score.counts.sum() for score in scores])
    return Score(mean, range(len(counts)), counts, np.concatenate([score.values for score in scores]))


def mean_value(values: Sequence[float]) -> float:
    """The mean of values of one seed; a `Score` where all are known for the same sequences."""
    return _over_seeds(values) if is_paired(values) else float(np.mean([float(value) for value in values]))


def _sequence_error(counts: np.ndarray, values: np.ndarray) -> float:
    """Standard error of the mean of `values` weighted by `counts`, over sequences; NaN for a single one."""
    n, residuals = len(values), counts * (values - np.average(values, weights=counts))
    return float(np.linalg.norm(residuals) / counts.sum() * math.sqrt(n / (n - 1))) if n > 1 else math.nan


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds with its 95 % interval, which NaN bounds where one seed allows none.

    half-width^2 = (t(n - 1) error)^2 + (t(n_sequences - 1) sequence_error)^2, with Student's t at 0.975. The sum of the
    two variances with a common t would be narrower, and covers less than 95 % with two or three seeds.
    """

    mean: float
    error: float
    """Standard error over seeds."""
    n: int
    sequence_error: float = 0.0
    """Standard error over sequences, of the mean over seeds; 0 where single sequences are not known."""
    n_sequences: int = 0
    degrees: float | None = None
    """Degrees of freedom of `error`, where they are not n - 1."""
    sequence_degrees: float | None = None
    """Those of `sequence_error`, where they are not n_sequences - 1."""

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    @property
    def side(self) -> Literal["below", "above", "unclear"]:
        """Side of zero on which the whole interval is; unclear when it contains zero or does not exist."""
        if self.high < 0:
            return "below"
        return "above" if self.low > 0 else "unclear"

    @property
    def half_width(self) -> float:
        return self.half_width_at(1 - CONFIDENCE)

    def half_width_at(self, p: float) -> float:
        """Half-width of the interval at confidence 1 - p; NaN with one seed."""
        if self.n < 2:
            return math.nan
        degrees, of_sequences = self.degrees or self.n - 1, self.sequence_degrees or self.n_sequences - 1
        over_sequences = t_quantile(p, of_sequences) * self.sequence_error if self.n_sequences else 0.0
        return math.hypot(t_quantile(p, degrees) * self.error, over_sequences)

    @property
    def p_value(self) -> float:
        """Two-sided p-value of a mean of zero, that of the test which the interval inverts; NaN without interval."""
        from scipy.optimize import brentq

        if self.n < 2:
            return math.nan
        if self.half_width == 0 or self.mean == 0:
            return float(self.mean == 0)
        smallest = math.log(1e-12)

        def excess(log_p: float) -> float:
            return self.half_width_at(math.exp(log_p)) - abs(self.mean)

        return math.exp(brentq(excess, smallest, 0.0)) if excess(smallest) > 0 else math.exp(smallest)

    def minus(self, amount: float) -> Interval:
        """The interval of the mean less `amount`, for a test against a margin."""
        return replace(self, mean=self.mean - amount)

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
        sequences = f" and {self.n_sequences} sequences" if self.n_sequences else ""
        return f"{mean} (95 % interval {low} to {high}, {self.n} seeds{sequences})"

    @property
    def _decimals(self) -> int:
        return text.decimals_of(self.mean, self.half_width)


def mean_interval(values: Iterable[float], *, dependent: bool = False) -> Interval:
    """Mean of `values`, one for each seed, with its interval; of finite values only.

    The standard error over n seeds is s / sqrt(n), or s if the values are `dependent`: that of a mean of n values, each
    of standard deviation s, is at most s, whatever their correlation.
    """
    finite = [value for value in values if math.isfinite(value)]
    sample, n = np.array(finite, dtype=float), len(finite)
    mean = float(sample.mean()) if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, n)
    error = float(sample.std(ddof=1) / (1 if dependent else math.sqrt(n)))
    if not is_paired(finite):
        return Interval(mean, error, n)
    over_seeds = _over_seeds(finite)
    sequences = len(over_seeds.counts)
    return Interval(mean, error, n, over_seeds.standard_error, sequences if sequences > 1 else 0)


def t_quantile(p: float, degrees: float) -> float:
    """Student's t that is exceeded in absolute value with probability `p`."""
    from scipy.special import stdtrit  # the quantile of `scipy.stats.t`, whose module takes half a second to import

    return float(stdtrit(degrees, 1 - p / 2))


def bootstrap(values: Sequence[Score], *, replicates: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of a mean over seeds and sequences: seeds are drawn, then the sequences that all share.

    Args:
        values: one for each seed, paired.
    """
    random, n, counts = np.random.default_rng(seed), len(values), values[0].counts
    table = np.array([score.values for score in values])
    seeds = random.multinomial(n, np.full(n, 1 / n), replicates) / n
    weights = random.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), replicates) * counts
    means = np.einsum("rs,sq,rq->r", seeds, table, weights) / weights.sum(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def detectable(seed_deviation: float, sequence_deviation: float, *, seeds: int, sequences: int) -> float:
    """The smallest true difference that an interval over these numbers sees in 80 of 100 studies; NaN for one seed.

    Args:
        seed_deviation: standard deviation of a paired difference from seed to seed.
        sequence_deviation: that from sequence to sequence, of the mean over seeds.
    """
    error, sequence_error = seed_deviation / math.sqrt(seeds), sequence_deviation / math.sqrt(sequences)
    interval = Interval(0.0, error, seeds, sequence_error, sequences)
    # The estimate exceeds its expectation by this much in one study of five.
    return interval.half_width + t_quantile(2 * (1 - POWER), math.inf) * math.hypot(error, sequence_error)


def paired_difference(
    values: Mapping[int, float], reference: Mapping[int, float], *, dependent: bool = False
) -> Interval:
    """Mean of `values - reference` over the seeds that both have, with its t-interval."""
    shared = sorted(values.keys() & reference.keys())
    return mean_interval((values[seed] - reference[seed] for seed in shared), dependent=dependent)


def pairs_seeds(values: Mapping[int, float], reference: Mapping[int, float]) -> bool:
    """Whether two configurations are compared seed by seed: two seeds or more, half of the smaller's at least."""
    shared = len(values.keys() & reference.keys())
    return shared >= 2 and 2 * shared >= min(len(values), len(reference))


def difference(
    values: Mapping[int, float], reference: Mapping[int, float], *, same_sequences: bool = False
) -> Interval:
    """Mean of `values` minus that of `reference`, paired by as much as both share: seeds, held-out sequences.

    Over seeds that they do not share (`pairs_seeds`), and over sequences that they do not, the two are independent: the
    squared errors add up, with Welch's degrees of freedom.

    Args:
        same_sequences: both were measured on the same sequences, which values that do not know theirs cannot tell. The
            interval is then over seeds alone; else there is none.
    """
    left, right = ({seed: value for seed, value in of.items() if math.isfinite(value)} for of in (values, reference))
    if pairs_seeds(left, right):
        shared = sorted(left.keys() & right.keys())
        minuends, subtrahends = [left[seed] for seed in shared], [right[seed] for seed in shared]
        over_seeds = mean_interval(float(a) - float(b) for a, b in zip(minuends, subtrahends, strict=True))
    else:
        minuends, subtrahends = list(left.values()), list(right.values())
        over_seeds = _unpaired(minuends, subtrahends)
    if is_paired([*minuends, *subtrahends]):
        ours, theirs = _over_seeds(minuends), _over_seeds(subtrahends)
        error, n = _sequence_error(ours.counts, ours.values - theirs.values), len(ours.counts)
        return replace(over_seeds, sequence_error=error, n_sequences=n) if n > 1 else over_seeds
    if is_paired(minuends) and is_paired(subtrahends):
        ours, theirs = _over_seeds(minuends), _over_seeds(subtrahends)
        error, degrees = _welch(ours.standard_error, len(ours.counts), theirs.standard_error, len(theirs.counts))
        n = len(ours.counts) + len(theirs.counts)
        return replace(over_seeds, sequence_error=error, n_sequences=n, sequence_degrees=degrees)
    return over_seeds if same_sequences else replace(over_seeds, n=min(over_seeds.n, 1))


def _unpaired(values: Sequence[float], reference: Sequence[float]) -> Interval:
    """Difference of the means of two independent samples, without an interval where one has less than two values."""
    ours, theirs = mean_interval(map(float, values)), mean_interval(map(float, reference))
    if ours.n < 2 or theirs.n < 2:
        return Interval(ours.mean - theirs.mean, math.nan, min(ours.n, theirs.n))
    error, degrees = _welch(ours.error, ours.n, theirs.error, theirs.n)
    return Interval(ours.mean - theirs.mean, error, ours.n + theirs.n, degrees=degrees)


def _welch(error: float, n: int, other_error: float, other_n: int) -> tuple[float, float]:
    """Standard error of a difference of two independent means, and its degrees of freedom."""
    square, other = error**2, other_error**2
    if not square + other > 0:
        return square + other, float(min(n, other_n) - 1)
    return math.sqrt(square + other), (square + other) ** 2 / (square**2 / (n - 1) + other**2 / (other_n - 1))


def _over_seeds(values: Sequence[float]) -> Score:
    """The mean of values that are known by the same sequences."""
    scores = [value for value in values if isinstance(value, Score)]
    over_seeds = np.mean([score.values for score in scores], axis=0)
    return Score(float(np.mean(scores)), scores[0].sequences, scores[0].counts, over_seeds)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted by Holm for their number, which bounds the chance of one false rejection; NaN stays NaN."""
    tested = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[index] = largest
    return adjusted
