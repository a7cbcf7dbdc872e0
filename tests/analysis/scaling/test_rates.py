"""The best learning rate of each size, from losses whose minimum is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import linregress, t

from ebft_study.analysis.scaling.rates import best_rate, power_of_size
from ebft_study.errors import FitError


def test_the_best_rate_is_the_vertex_of_the_parabola() -> None:
    rates = [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]
    for vertex in (6e-4, 1e-3, 1.9e-3):
        losses = [3.0 + 0.2 * np.log(rate / vertex) ** 2 for rate in rates]
        assert best_rate(rates, losses) == pytest.approx(vertex)
    steep = [*losses[:-1], losses[-1] + 50]
    assert best_rate(rates[::-1], steep[::-1]) == pytest.approx(best_rate(rates, steep))
    assert best_rate([*rates, 8e-3], [*losses, 1e3]) == pytest.approx(1.9e-3), "far rates are no part of the parabola"
    twice = pd.DataFrame({"rate": rates * 2, "loss": [x + d for d in (-0.5, 0.5) for x in losses]}, index=range(7, 17))
    assert best_rate(twice["rate"], twice["loss"]) == pytest.approx(1.9e-3), "seeds count by their mean"


def test_a_best_rate_at_an_end_is_refused() -> None:
    for losses in ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]):
        with pytest.raises(FitError, match="an end of what was tried"):
            best_rate([1e-4, 1e-3, 1e-2], losses)


def test_the_exponent_is_that_of_least_squares_of_logs_with_its_interval() -> None:
    sizes = np.array([2.8e5, 5.2e5, 1.05e6, 2.2e6])
    coefficient, exact = power_of_size(sizes, 7.0 * sizes**-0.4)
    assert coefficient == pytest.approx(7.0)
    assert (exact.value, exact.low, exact.high) == pytest.approx((0.4, 0.4, 0.4))
    rates = 7.0 * sizes**-0.4 * [1.1, 0.8, 1.2, 0.95]
    line = linregress(np.log(sizes), np.log(rates))
    _, found = power_of_size(sizes, rates)
    half = t.ppf(0.975, 2) * line.stderr
    assert (found.value, found.low, found.high) == pytest.approx((-line.slope, -line.slope - half, -line.slope + half))
    with pytest.raises(FitError, match="2 sizes"):
        power_of_size(sizes[:2], rates[:2])
