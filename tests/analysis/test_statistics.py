"""Intervals against closed forms, and the degenerate cases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ebft_study.analysis.statistics import Interval, mean_interval, paired_difference

# Quantiles of Student's t at 0.975 from printed tables.
T_QUANTILE = {2: 12.706, 3: 4.303, 5: 2.776, 10: 2.262}


@pytest.mark.parametrize("n", sorted(T_QUANTILE))
def test_interval_is_the_textbook_one(n: int) -> None:
    values = np.random.default_rng(n).normal(3.0, 2.0, n)
    interval = mean_interval(values)
    mean = sum(values) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    margin = T_QUANTILE[n] * deviation / math.sqrt(n)
    assert interval.mean == pytest.approx(mean)
    assert (interval.low, interval.high) == pytest.approx((mean - margin, mean + margin), abs=1e-3 * margin)
    assert interval.half_width == pytest.approx(margin, rel=1e-3)


def test_two_seeds_by_hand() -> None:
    interval = mean_interval([1.0, 3.0])
    # s = sqrt(2), s / sqrt(2) = 1
    assert (interval.mean, interval.high) == pytest.approx((2.0, 2.0 + 12.7062), abs=1e-4)


def test_intervals_cover_the_true_mean_about_95_times_in_100() -> None:
    random = np.random.default_rng(0)
    intervals = [mean_interval(random.normal(1.0, 1.0, 4)) for _ in range(1000)]
    assert 0.93 < np.mean([i.low < 1.0 < i.high for i in intervals]) < 0.97


def test_pairing_removes_what_seeds_share() -> None:
    shared = np.random.default_rng(1).normal(0, 10, 5)
    left = {seed: shared[seed] + 1.0 + 0.01 * seed for seed in range(5)}
    right = {seed: shared[seed] for seed in range(5)}
    difference = paired_difference(left, right)
    assert difference.mean == pytest.approx(1.02)
    assert difference.half_width < 0.03
    assert difference.side == "above"


def test_only_seeds_that_both_have_are_compared() -> None:
    difference = paired_difference({0: 5.0, 1: 6.0, 2: 100.0}, {1: 4.0, 0: 4.0, 3: 9.0})
    assert (difference.mean, difference.n) == (1.5, 2)


def test_one_seed_has_no_interval_and_no_side() -> None:
    interval = mean_interval([-3.0])
    assert (interval.mean, interval.n, interval.side) == (-3.0, 1, "unclear")
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_no_common_seed_is_no_number() -> None:
    interval = paired_difference({0: 1.0}, {1: 1.0})
    assert interval.n == 0
    assert math.isnan(interval.mean)
    assert interval.side == "unclear"


def test_equal_values_give_an_interval_of_no_width() -> None:
    interval = mean_interval([0.5, 0.5, 0.5])
    assert interval.low == interval.high == 0.5
    assert interval.side == "above"
    assert mean_interval([0.0, 0.0]).side == "unclear"


def test_non_finite_values_are_left_out() -> None:
    assert mean_interval([1.0, math.nan, 2.0, math.inf]).n == 2


def test_differences_carry_sign_interval_and_enough_digits() -> None:
    assert Interval(-0.031, -0.041, -0.021, 3).as_difference() == "−0.031 ± 0.010"
    assert Interval(0.0021, -0.0006, 0.0048, 3).as_difference() == "+0.0021 ± 0.0027"
    assert Interval(0.2, math.nan, math.nan, 1).as_difference() == "+0.200"
    assert Interval(math.nan, math.nan, math.nan, 0).as_difference() == "–"
    assert Interval(-0.031, -0.041, -0.021, 3).in_words() == "−0.031 (95 % interval −0.041 to −0.021, 3 seeds)"
    assert Interval(0.2, math.nan, math.nan, 1).in_words() == "+0.200 (1 seed, so no interval)"
