"""The best learning rate of each size, and the power of size that it follows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ebft_study.analysis.scaling.fits import Estimate
from ebft_study.analysis.statistics import CONFIDENCE, t_quantile
from ebft_study.errors import FitError


def best_rate(rates: Sequence[float] | pd.Series[float], losses: Sequence[float] | pd.Series[float]) -> float:
    """The rate of the least loss: the vertex of the parabola in log rate through the least loss and its neighbours.

    Raises:
        FitError: the least loss is at an end of the rates, so that the best may lie beyond it.
    """
    means = pd.Series(np.asarray(losses, float)).groupby(np.asarray(rates, float)).mean()
    least = int(np.argmin(means.to_numpy()))
    if not 0 < least < len(means) - 1:
        raise FitError(
            f"the least loss is at learning_rate={means.index[least]:g}, an end of what was tried: try rates beyond it"
        )
    near = means.iloc[least - 1 : least + 2]
    square, slope, _ = np.polyfit(np.log(near.index), near, 2)
    return math.exp(-slope / (2 * square)) if square > 0 else float(means.index[least])


def power_of_size(sizes: Sequence[float], rates: Sequence[float]) -> tuple[float, Estimate]:
    """Coefficient c and exponent p of rate = c / size^p, by least squares of logs; p with Student's 95 % interval.

    Raises:
        FitError: fewer than three sizes, which leave no error to judge the exponent by.
    """
    if len(set(sizes)) < 3:
        raise FitError(f"{len(set(sizes))} sizes: an exponent with an interval takes three")
    x, y = np.log(sizes), np.log(rates)
    slope, level = map(float, np.polyfit(x, y, 1))
    spread = math.sqrt(float(((y - level - slope * x) ** 2).sum()) / (len(x) - 2) / float(((x - x.mean()) ** 2).sum()))
    half = t_quantile(1 - CONFIDENCE, len(x) - 2) * spread
    return math.exp(level), Estimate(-slope, -slope - half, -slope + half)
