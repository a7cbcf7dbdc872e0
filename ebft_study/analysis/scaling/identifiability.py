"""The reasons why points cannot tell the parameters of a form: a fit of these is refused, with the first reason.

A law with an exponent, a coefficient and a floor passes through any three points of a falling convex curve, so three
sizes give no law of size and three points no asymptote. As many parameters as scales leave nothing to check the law
by, however many seeds each scale has. Where data grow in proportion to parameters, as along Chinchilla's optimum, only
the sum of both terms is seen.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from ebft_study import text
from ebft_study.analysis.scaling.forms import Form
from ebft_study.analysis.scaling.levels import levels
from ebft_study.analysis.scaling.projection import Problem, Solution

MIN_VALUES = 4
"""Distinct values of a variable that its exponent takes."""
MIN_SPREAD = 0.1
"""Part of the spread of log D that log N must leave unexplained (as a standard deviation)."""
MAX_CONDITION = 1e3
"""Of the Jacobian with columns of one length: errors of a point by 0.1 % may then move a contribution by 100 %."""


def obstacle(form: Form, table: pd.DataFrame, *, multiplied: str | None = None) -> str:
    """The reason why these points cannot be fitted, known before; '' without one.

    Args:
        multiplied: the variable that has a multiplier for each value of the column `method` but one.
    """
    missing = [name for name in (*form.variables, "value") if name not in table or table[name].isna().any()]
    if form.from_start and ("start" not in table or table["start"].isna().any()):
        missing.append("start")
    if missing:
        return f"{text.listed(missing)}: not known of every point"
    if form.is_log and (table["value"] <= 0).any():
        return "values that are not positive have no logarithm: fit a gain or a score by the sigmoid"
    for name in form.variables:
        if (table[name] < 0).any() or ((table[name] == 0).any() and not form.may_be_zero):
            return f"{name} is not positive at every point"
    return _too_few(form, table, multiplied) or _proportional(form, table)


def _too_few(form: Form, table: pd.DataFrame, multiplied: str | None) -> str:
    for name in form.variables:
        values = len(set(levels(table[name])))
        if values < MIN_VALUES:
            return (
                f"{values} value{'s' * (values != 1)} of {name}: a law with an exponent and a floor passes through any "
                f"three, so it takes {MIN_VALUES}"
            )
    keys = [levels(table[name]) for name in form.variables] + ([table["method"]] if multiplied else [])
    scales = len(set(zip(*keys, strict=True)))
    parameters = len(form.names) + (table["method"].nunique() - 1 if multiplied else 0)
    if scales <= parameters:
        return f"{parameters} parameters and {scales} scales: seeds of one scale do not help, so it takes more scales"
    return ""


def _proportional(form: Form, table: pd.DataFrame) -> str:
    if len(form.variables) < 2:
        return ""
    size, data = (np.log(table[name].to_numpy(float)) for name in form.variables)
    slope, level = np.polyfit(size, data, 1)
    if slope > 0 and np.std(data - slope * size - level) < MIN_SPREAD * np.std(data):
        names = form.variables
        return f"{names[1]} follow {names[0]} (about as its power {slope:.2g}): what each does cannot be told apart"
    return ""


def obstacle_after(problem: Problem, solution: Solution) -> str:
    """The reason why a solution says little, known only after it; '' without one."""
    n = len(problem.nonlinear)
    for name, value in zip(problem.form.linear, solution.parameters[n:], strict=True):
        if value == 0 and name != problem.form.floor:
            return f"no effect of scale: {name} is 0, and its exponent is any"
    used = solution.parameters != 0
    lengths = np.linalg.norm(solution.jacobian[:, used], axis=0)
    for name, length in zip(np.array(problem.names)[used], lengths, strict=True):
        if length == 0:
            return f"{name} has no effect at its best value: a simpler form says the same"
    condition = np.linalg.cond(solution.jacobian[:, used] / lengths)
    if condition > MAX_CONDITION:
        return f"ill-conditioned (condition number {condition:.0f}): it takes scales further apart"
    return ""
