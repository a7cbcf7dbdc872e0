"""Methods side by side: the effective speedup of one over another.

All methods share the form, its exponents and its floor; each but the reference has one multiplier k of the data. Then k
tokens of the reference do what one token of the method does: k = 2 halves the data. In FLOPs or seconds the speedup is
k times what a token of the reference costs over what one of the method costs, at one scale. Whether one multiplier is
enough is a question of its own (`sharing_p_value`): with k alone, no method ends at another floor than the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ebft_study.analysis.scaling.fits import Estimate, Fit
from ebft_study.analysis.scaling.projection import minimize
from ebft_study.analysis.statistics import mean_interval


@dataclass(frozen=True)
class Speedup:
    """The effective speedup of a method over the reference in an amount, `tokens`, `flops` or `seconds`.

    `ratios` are the least and greatest cost of one of its tokens over that of one of the reference, over scales: where
    they differ much, no one number says what it costs.
    """

    method: str
    amount: str
    factor: Estimate
    ratios: tuple[float, float]

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 1."""
        return self.factor.low > 1 or self.factor.high < 1


def speedup(fit: Fit, method: str, amount: str) -> Speedup | None:
    """The effective speedup of a method, from a fit with multipliers; None where no scale knows the cost of both.

    The interval is the profile likelihood's of k. That of the cost ratio, over pairs of scale and seed, is added: both
    as squared half-widths of logs.
    """
    multiplied = fit.problem.multiplied
    factor = fit.estimate(method)
    if amount == multiplied:
        return Speedup(method, amount, factor, (1.0, 1.0))
    table = fit.table.assign(cost=fit.table[amount] / fit.table[multiplied]).dropna(subset=["cost"])
    keys = [*fit.form.variables, *(["seed"] if "seed" in table else [])]
    costs = table.pivot_table(index=keys, columns="method", values="cost")
    if not {method, fit.reference} <= set(costs):
        return None
    logs = np.log((costs[method] / costs[fit.reference]).dropna().to_numpy(float))
    if not len(logs):
        return None
    ratio = mean_interval(map(float, logs))
    spread = ratio.half_width if ratio.n > 1 else 0.0
    value = factor.value * math.exp(-ratio.mean)
    low, high = (
        value * math.exp(side * math.hypot(math.log(bound / factor.value), spread)) if 0 < bound < math.inf else bound
        for side, bound in ((-1, factor.low), (1, factor.high))
    )
    return Speedup(method, amount, Estimate(value, low, high), (math.exp(logs.min()), math.exp(logs.max())))


def sharing_p_value(fit: Fit) -> float:
    """P-value of "all methods share all but one multiplier each", against a law of its own for every method.

    F = (Q_shared - Q_own) / (p_own - p_shared) / (Q_own / (n - p_own)), with objectives Q and numbers of parameters p.
    Points count as independent. NaN where a method has too few points for a law of its own.
    """
    from scipy.special import fdtrc

    shared, names = fit.problem, sorted(set(fit.table["method"]))
    own = len(names) * (len(shared.names) - len(shared.methods))
    more, degrees = own - len(shared.names), len(fit.table) - own
    if more < 1 or degrees < 1:
        return math.nan
    objective = 0.0
    for name in names:
        part = fit.table[fit.table["method"] == name]
        alone = shared.at(part, part["value"].to_numpy(float), float(shared.delta[0]))
        fixed = dict.fromkeys(shared.methods, 1.0)
        objective += minimize(alone, fixed).objective
    f = max(fit.solution.objective - objective, 0.0) / more / max(objective / degrees, 1e-300)
    return float(fdtrc(more, degrees, f))
