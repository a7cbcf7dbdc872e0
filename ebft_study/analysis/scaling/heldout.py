"""The judgement of scaling fits by points that they have not seen, against forecasts that need no law.

Forms are chosen by this error, never by R^2, which is near 1 for each of them. The error of the chosen form is the
smallest of several, and a little too good for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ebft_study.analysis.scaling.fits import clusters_of, fit
from ebft_study.analysis.scaling.forms import Form
from ebft_study.analysis.scaling.levels import levels
from ebft_study.errors import FitError

FORECAST_CONFIDENCE = 0.9


def largest(table: pd.DataFrame, variable: str) -> pd.Series[bool]:
    """Which points are held out: those at the largest value of a variable."""
    level = pd.Series(levels(table[variable]), index=table.index)
    return level == level.max()


def last_half(table: pd.DataFrame, cost: str) -> pd.Series[bool]:
    """Which points are held out: those that cost more than half of the dearest."""
    return table[cost].gt(table[cost].max() / 2)


@dataclass(frozen=True)
class Extrapolation:
    """Forecasts of the held-out scales, each of the mean over its seeds.

    Errors are relative: the mean absolute error over the mean absolute value. `last_value_error` is that of the
    nearest scale that was seen, whose value is repeated.
    """

    n_scales: int
    error: float
    covered: int
    """Scales whose measured mean lies in its 90 % interval."""
    last_value_error: float
    n_pairs: int = 0
    """Pairs of methods at held-out scales, where the fit has several methods."""
    ranked: int = 0
    """Pairs whose order the fit foresees."""
    ranked_before: int = 0
    """Pairs that have the order of the nearest scale that was seen."""


@dataclass(frozen=True)
class Choice:
    """A form with its held-out score, or the reason why it has none."""

    form: Form
    score: Extrapolation | None
    reason: str = ""


def extrapolate(
    form: Form,
    table: pd.DataFrame,
    held_out: pd.Series[bool],
    *,
    multiplied: str | None = None,
    reference: str | None = None,
) -> Extrapolation:
    """Fit the points that are not held out and forecast the others; raises `FitError` as `fit` does.

    Args:
        multiplied, reference: as of `fit`.
    """
    if held_out.all() or not held_out.any():
        raise FitError(f"{form.name}: {int(held_out.sum())} of {len(table)} points are held out, so nothing is tested")
    seen = table[~held_out]
    law = fit(form, seen, multiplied=multiplied, reference=reference)
    points = _means(form, table[held_out], multiplied)
    measured = points["value"].to_numpy()
    forecasts = [
        law.forecast(points.iloc[[k]], n=n, confidence=FORECAST_CONFIDENCE) for k, n in enumerate(points["n_clusters"])
    ]
    predicted = np.array([each.value for each in forecasts])
    before = np.array([_nearest(form, seen, point, multiplied) for point in points.to_dict("records")])
    pairs = list(_pairs(points)) if multiplied else []
    orders = [
        sum(np.sign(values[i] - values[j]) == np.sign(measured[i] - measured[j]) for i, j in pairs)
        for values in (predicted, before)
    ]
    return Extrapolation(
        len(points),
        _relative(predicted, measured),
        sum(bool(each.low <= value <= each.high) for each, value in zip(forecasts, measured, strict=True)),
        _relative(before, measured),
        len(pairs),
        *(int(each) for each in orders),
    )


def choose(forms: Sequence[Form], table: pd.DataFrame, held_out: pd.Series[bool]) -> list[Choice]:
    """The forms by their held-out error, the smallest first; those that cannot be fitted come last, with the reason."""
    choices = []
    for form in forms:
        try:
            choices.append(Choice(form, extrapolate(form, table, held_out)))
        except FitError as error:
            choices.append(Choice(form, None, str(error)))
    return sorted(choices, key=lambda choice: choice.score.error if choice.score else math.inf)


def _relative(predicted: np.ndarray, measured: np.ndarray) -> float:
    return float(np.abs(predicted - measured).mean() / np.abs(measured).mean())


def _nearest(form: Form, seen: pd.DataFrame, point: dict, multiplied: str | None) -> float:
    """The mean value at the scale nearest to a point in logs of all variables, among those of its method."""
    of_method = seen[seen["method"] == point["method"]] if multiplied else seen
    here = np.log1p(of_method[list(form.variables)].to_numpy(float))
    distances = np.abs(here - np.log1p([float(point[name]) for name in form.variables])).sum(axis=1)
    return float(of_method.loc[distances <= distances.min() * (1 + 1e-9), "value"].mean())


def _means(form: Form, points: pd.DataFrame, multiplied: str | None) -> pd.DataFrame:
    """The means over the points of each scale, and how many clusters they are from; in order of scales, then methods.

    Scales are those of size and data where the table has them, for all forms alike.
    """
    names = [name for name in ("parameters", "tokens") if name in points] or list(form.variables)
    scale = pd.Series(list(zip(*(levels(points[name]) for name in names), strict=True)), index=points.index)
    points = points.assign(scale=scale, cluster=clusters_of(points))
    averaged = dict.fromkeys((*form.variables, "value", *(["start"] if form.from_start else [])), "mean")
    grouped = points.groupby(["scale", *(["method"] if multiplied else [])])
    return grouped.agg(averaged | {"cluster": "nunique"}).rename(columns={"cluster": "n_clusters"}).reset_index()


def _pairs(points: pd.DataFrame) -> Iterator[tuple[int, int]]:
    """Places of two methods at one scale."""
    for _, group in points.groupby("scale"):
        yield from itertools.combinations(group.index, 2)
