"""Precision of a study's held-out comparisons: how sure a level is, a difference, and what could have been seen.

All models of a study see the same sequences, contexts and random numbers, so the difference of two is far surer than
the level of one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ebft_study.analysis.configuration import Configuration
from ebft_study.analysis.selection import comparable
from ebft_study.analysis.statistics import Interval, Score, detectable, paired_difference

MAX_PAIRS = 500
"""Pairs of configurations that are looked at, evenly spread over all."""


@dataclass(frozen=True)
class Precision:
    """Medians over the configurations of a study, and over their pairs, for one metric."""

    level_error: float
    """Standard error over sequences of the value of one model."""
    difference_error: float
    """That of the difference of two models of one seed."""
    seed_deviation: float
    """Standard deviation of the difference of two configurations from seed to seed; NaN with one seed."""
    sequence_deviation: float
    """That from sequence to sequence, of the mean over seeds."""
    n_sequences: int

    def detectable(self, *, seeds: int, sequences: int | None = None) -> float:
        """The difference of two configurations that a study of this size sees in 80 of 100 cases; NaN for one seed."""
        return detectable(
            self.seed_deviation, self.sequence_deviation, seeds=seeds, sequences=sequences or self.n_sequences
        )


def precision(configurations: Iterable[Configuration], metric: str, position: int | None = None) -> Precision | None:
    """The precision of held-out comparisons by `metric`; None without values of single sequences or without rivals.

    Only pairs of configurations whose values compare count, over the seeds that both have.
    """
    levels: list[float] = []
    differences: list[Score] = []
    intervals: list[Interval] = []
    for group in comparable(configurations, metric, at_one_length=True):
        values = [c.final.get((metric, position), {}) for c in group]
        levels += [v.standard_error for of_seed in values for v in of_seed.values() if isinstance(v, Score)]
        pairs, step = itertools.combinations(values, 2), max(1, math.ceil(math.comb(len(values), 2) / MAX_PAIRS))
        for left, right in itertools.islice(pairs, 0, None, step):
            paired = (left[seed] - right[seed] for seed in left.keys() & right.keys())
            differences += [difference for difference in paired if isinstance(difference, Score)]
            intervals.append(paired_difference(left, right))
    if not differences:
        return None
    over_both = [interval for interval in intervals if interval.n_sequences]
    return Precision(
        level_error=_median(levels),
        difference_error=_median([difference.standard_error for difference in differences]),
        seed_deviation=_median([each.error * math.sqrt(each.n) for each in over_both]),
        sequence_deviation=_median([each.sequence_error * math.sqrt(each.n_sequences) for each in over_both]),
        n_sequences=max(len(difference.sequences) for difference in differences),
    )


def _median(values: Sequence[float]) -> float:
    """Without missing values: those of pairs that share one seed."""
    measured = [value for value in values if not math.isnan(value)]
    return float(np.median(measured)) if measured else math.nan
