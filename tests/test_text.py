"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from ebft_study import text
from ebft_study.analysis.statistics import Interval


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.0, "1"),
        (0.03, "0.03"),
        (1e-4, "1e-4"),
        (2.5e-5, "2.5e-5"),
        (8, "8"),
        (True, "yes"),
        ((0.25, 0.5), "0.25, 0.5"),
        (None, "–"),
        (math.nan, "–"),
        ("none", "none"),
    ],
)
def test_settings_are_short(value: object, expected: str) -> None:
    assert text.setting(value) == expected


def test_differences_carry_sign_interval_and_enough_digits() -> None:
    assert text.difference(Interval(-0.031, -0.041, -0.021, 3)) == "−0.031 ± 0.010"
    assert text.difference(Interval(0.0021, -0.0006, 0.0048, 3)) == "+0.0021 ± 0.0027"
    assert text.difference(Interval(0.2, math.nan, math.nan, 1)) == "+0.200"
    assert text.difference(Interval(math.nan, math.nan, math.nan, 0)) == "–"
    assert text.spoken(Interval(-0.031, -0.041, -0.021, 3)) == "−0.031 (95 % interval −0.041 to −0.021, 3 seeds)"
    assert text.spoken(Interval(0.2, math.nan, math.nan, 1)) == "+0.200 (1 seed, so no interval)"


def test_durations_sizes_and_counts() -> None:
    assert text.duration(8.41) == "8.4 s"
    assert text.duration(59.97) == "1 min 0 s"
    assert text.duration(185) == "3 min 5 s"
    assert text.duration(7_800) == "2 h 10 min"
    assert text.size(1.5 * 2**30) == "1.50 GiB"
    assert text.size(20 * 2**20) == "20 MiB"
    assert text.count(1_048_576.0) == "1\u202f048\u202f576"
    assert text.listed(["a", "b", "c"]) == "a, b and c"
    assert text.listed([]) == ""
