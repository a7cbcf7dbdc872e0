"""Fits of scaling laws to points, with intervals: profile likelihood, and the bootstrap over clusters.

Points are rows of a table: the variables of the form, `value`, and where known `seed`, `parameters` and `method`.

Huber's loss begins to be linear at 1.345 robust standard deviations of the residuals, which loses 5 % of the precision
of least squares where noise is Gaussian. Chinchilla's fixed 1e-3 is below the noise of seeds here: the fit would be a
median regression.

**Profile likelihood.** With Q the objective (half a sum of squares, robust), s the scale of the noise and t Student's
quantile, the interval of a quantity holds every value v with 2 (Q(v) - min Q) / s^2 <= t^2, where Q(v) is the minimum
over all other parameters. It is no symmetric interval, and may be open: a floor that may be 0, an exponent that may be
anything. The interval of a new measurement holds every value that, as one more point, raises the objective by no more.
For linear models both are the usual t-intervals.

**Clusters.** Points of one size and seed share initial weights and the order of data: they are no independent
evidence. Where some share a cluster, s^2 is multiplied by the ratio of the cluster-robust variance of the quantity to
the usual one, if that exceeds 1, and t has as many degrees of freedom as clusters, less one (or those of the points
less the parameters, if these are fewer).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from ebft_study.analysis.scaling.forms import Form
from ebft_study.analysis.scaling.identifiability import obstacle, obstacle_after
from ebft_study.analysis.scaling.projection import Problem, Solution, minimize, variables
from ebft_study.analysis.statistics import CONFIDENCE, t_quantile
from ebft_study.errors import FitError

HUBER = 1.345
NORMAL_QUARTILE = 0.6745
ROUNDS, SETTLED = 10, 0.02
"""A wild point also spreads the residuals of the others, until delta has followed them down."""
EXACT = 1e-9
"""Residuals below this are rounding errors."""


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; `low` of 0 and `high` of infinity are open ends."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Fit:
    """A form fitted to points. `scale` is the standard deviation of a point, of logs where the form is on logs."""

    form: Form
    table: pd.DataFrame = field(repr=False)
    reference: str | None
    problem: Problem = field(repr=False)
    solution: Solution = field(repr=False)
    scale: float
    clusters: np.ndarray = field(repr=False)

    @functools.cached_property
    def values(self) -> dict[str, float]:
        """Parameter -> value; a method's multiplier has the name of the method."""
        return dict(zip(self.problem.names, map(float, self.solution.parameters), strict=True))

    @property
    def degrees(self) -> int:
        """Degrees of freedom of intervals."""
        points, clusters = len(self.table), len(set(self.clusters))
        own = points - len(self.problem.names)
        return own if clusters == points else max(1, min(own, clusters - 1))

    @functools.cached_property
    def residuals(self) -> np.ndarray:
        """Predicted minus measured, of logs where the form is on logs."""
        return self.problem.residuals(self.problem.predict(self.solution.parameters))

    def predict(self, table: pd.DataFrame) -> np.ndarray:
        """Values at the points of another table, which need no `value`."""
        return self.problem.at(table, np.ones(len(table))).predict(self.solution.parameters)

    # --- profile likelihood ------------------------------------------------------------------------------------

    def deviance(self, name: str, value: float) -> float:
        """2 (Q - min Q) / s^2 with a parameter fixed at `value`: about the square of Student's t where it is true."""
        found = minimize(self.problem, {name: value}, [self.solution.parameters], grid=False)
        return 2 * max(found.objective - self.solution.objective, 0.0) / self._variance(self._gradient(name))

    def estimate(self, name: str, confidence: float = CONFIDENCE) -> Estimate:
        """A parameter with its profile likelihood interval: an exponent, a scale, the floor, or a multiplier."""
        value, gradient = self.values[name], self._gradient(name)
        error = math.sqrt(self._variance(gradient) * float(gradient @ self._bread @ gradient))
        limit = t_quantile(1 - confidence, self.degrees) ** 2
        if name in self.problem.form.linear:
            low, high = 0.0, math.inf

            def at(place: float) -> float:
                return self.deviance(name, place) - limit

            # At zero, where the objective rises from its bound, the Jacobian has no error.
            typical = self.scale * (float(np.median(self.problem.y)) if self.form.is_log else 1.0)
            return Estimate(value, *_crossings(at, value, error if value else typical, low, high))
        low, high = self.problem.log_bounds[self.problem.names.index(name)]

        def at_log(place: float) -> float:
            return self.deviance(name, math.exp(place)) - limit

        left, right = _crossings(at_log, math.log(value), max(error, EXACT), low, high)
        return Estimate(value, 0.0 if left == low else math.exp(left), math.inf if right == high else math.exp(right))

    def forecast(self, point: pd.DataFrame, *, n: int = 1, confidence: float = CONFIDENCE) -> Estimate:
        """The mean of `n` new measurements at a point (a table of one row), with its interval.

        Its width has the noise of a point over sqrt(n), and what the parameters leave open.
        """
        predicted = float(self.predict(point)[0])
        limit = t_quantile(1 - confidence, self.degrees) ** 2
        repeated = pd.concat([point] * n)
        gradient = self._forecast_gradient(point)
        variance = self._variance(gradient)
        error = math.sqrt(variance * (1 / n + float(gradient @ self._bread @ gradient)))

        def rise(residual: float) -> float:
            value = predicted * math.exp(residual) if self.form.is_log else predicted + residual
            joined = self.problem.joined(self.problem.at(repeated, np.full(n, value)))
            found = minimize(joined, starts=[self.solution.parameters], grid=False)
            return 2 * (found.objective - self.solution.objective) / variance - limit

        left, right = _crossings(rise, 0.0, max(error, EXACT), -math.inf, math.inf)
        if self.form.is_log:
            return Estimate(predicted, predicted * math.exp(left), predicted * math.exp(right))
        return Estimate(predicted, predicted + left, predicted + right)

    # --- bootstrap ---------------------------------------------------------------------------------------------

    def bootstrap(self, replicates: int = 200, seed: int = 0) -> pd.DataFrame:
        """Parameters in samples of clusters with replacement, a row each; samples that lack too many scales are none.

        Percentiles of a column are an interval of that parameter. With three to five seeds a size it is too narrow:
        `estimate` is what reports use.
        """
        random = np.random.default_rng(seed)
        names = sorted(set(self.clusters))
        rows = {name: np.flatnonzero(self.clusters == name) for name in names}
        drawn = []
        for _ in range(replicates):
            chosen = np.concatenate([rows[names[k]] for k in random.integers(0, len(names), len(names))])
            sample = self.table.iloc[chosen]
            if not obstacle(self.form, sample, multiplied=self.problem.multiplied or None):
                problem = self.problem.at(sample, sample["value"].to_numpy(float), self._delta)
                drawn.append(minimize(problem, starts=[self.solution.parameters], grid=False).parameters)
        return pd.DataFrame(drawn, columns=list(self.problem.names))

    # --- variances ---------------------------------------------------------------------------------------------

    @property
    def _delta(self) -> float:
        return float(self.problem.delta[0])

    @functools.cached_property
    def _bread(self) -> np.ndarray:
        jacobian = self.solution.jacobian
        inverse: np.ndarray = np.linalg.pinv(jacobian.T @ jacobian)
        return inverse

    @functools.cached_property
    def _cluster_covariance(self) -> np.ndarray | None:
        """Cluster-robust covariance of logs and contributions; None where every point is a cluster."""
        names, index = np.unique(self.clusters, return_inverse=True)
        if len(names) == len(index):
            return None
        scores = np.zeros((len(names), len(self.problem.names)))
        np.add.at(scores, index, self.solution.jacobian * self.solution.z[:, None])
        points, clusters = len(index), len(names)
        correction = clusters / (clusters - 1) * (points - 1) / max(points - len(self.problem.names), 1)
        covariance: np.ndarray = correction * self._bread @ scores.T @ scores @ self._bread
        return covariance

    def _variance(self, gradient: np.ndarray) -> float:
        """s^2, inflated by what clusters do to the quantity with this gradient."""
        if self._cluster_covariance is None:
            return self.scale**2
        usual = self.scale**2 * float(gradient @ self._bread @ gradient)
        robust = float(gradient @ self._cluster_covariance @ gradient)
        return self.scale**2 * max(1.0, robust / usual if usual > 0 else 1.0)

    def _gradient(self, name: str) -> np.ndarray:
        """By logs of nonlinear parameters and contributions; the floor's column is constant, a sigmoid's is not."""
        gradient = np.zeros(len(self.problem.names))
        k, n = self.problem.names.index(name), len(self.problem.nonlinear)
        if k < n:
            gradient[k] = 1.0
            return gradient

        def value(theta: np.ndarray) -> float:
            columns = self.problem.parts(theta[None])[1][0]
            return float(1 / np.sqrt((columns[:, k - n] ** 2).mean()))

        theta = self.solution.parameters[:n]
        contribution = self.solution.parameters[k] / value(theta)
        gradient[:n] = contribution * _derivatives(value, theta)
        gradient[k] = value(theta)
        return gradient

    def _forecast_gradient(self, point: pd.DataFrame) -> np.ndarray:
        """Derivatives of the residual of a point by logs of nonlinear parameters and contributions."""
        n, parameters = len(self.problem.nonlinear), self.solution.parameters
        columns = self.problem.parts(parameters[None, :n])[1][0]
        contributions = parameters[n:] * np.sqrt((columns**2).mean(axis=0))
        there = self.problem.at(point, np.ones(1))

        def residual(theta: np.ndarray, moved: np.ndarray) -> float:
            size = np.sqrt((self.problem.parts(theta[None])[1][0] ** 2).mean(axis=0))
            return float(there.residuals(there.predict(np.append(theta, moved / size)))[0])

        by_theta = _derivatives(lambda theta: residual(theta, contributions), parameters[:n])
        step = 1e-6 * float(np.abs(contributions).max())
        shifts = step * np.eye(len(contributions))
        by_contribution = [
            (residual(parameters[:n], contributions + s) - residual(parameters[:n], contributions)) / step
            for s in shifts
        ]
        return np.append(by_theta, by_contribution)


def fit(form: Form, table: pd.DataFrame, *, multiplied: str | None = None, reference: str | None = None) -> Fit:
    """Fit a form to points; raises `FitError` with the reason where these cannot tell its parameters.

    Args:
        multiplied: a variable of the form. Each method of the column `method` but the `reference` has a multiplier k of
            it, and all share the other parameters: with `tokens`, one token of the method is worth k of the reference.
    """
    why = obstacle(form, table, multiplied=multiplied)
    if why:
        raise FitError(f"{form.name}: {why}")
    methods = tuple(sorted(set(table["method"]) - {reference})) if multiplied else ()
    y = table["value"].to_numpy(float)
    problem = Problem(form, variables(form, table), y, np.full(len(y), math.inf), methods, None, multiplied or "")
    problem = problem.at(table, y)
    solution = minimize(problem)
    degrees = max(len(y) - len(problem.names), 1)
    for _ in range(ROUNDS):
        residuals = problem.residuals(problem.predict(solution.parameters))
        spread = float(np.median(np.abs(residuals))) / NORMAL_QUARTILE * math.sqrt(len(y) / degrees)
        if spread <= EXACT or abs(spread * HUBER / problem.delta[0] - 1) < SETTLED:
            break
        problem = problem.at(table, y, HUBER * spread)
        solution = minimize(problem, starts=[solution.parameters], grid=False)
    why = obstacle_after(problem, solution)
    if why:
        raise FitError(f"{form.name}: {why}")
    return Fit(form, table, reference, problem, solution, _scale(problem, solution, degrees), clusters_of(table))


def clusters_of(table: pd.DataFrame) -> np.ndarray:
    """The cluster of each point: its size and seed; each is its own where seeds are not known."""
    if "seed" not in table:
        return np.arange(len(table))
    return table.groupby([name for name in ("parameters", "seed") if name in table], dropna=False).ngroup().to_numpy()


def _scale(problem: Problem, solution: Solution, degrees: int) -> float:
    """Standard deviation of a point, such that rises of the objective are about chi-squared (Huber's psi).

    s^2 = (sum psi^2 / degrees) / mean psi'. Without points beyond delta it is the residual variance.
    """
    residuals = problem.residuals(problem.predict(solution.parameters))
    inside = np.abs(residuals) <= problem.delta
    squares = np.where(inside, residuals, problem.delta) ** 2 if not inside.all() else residuals**2
    return max(math.sqrt(float(squares.sum()) / degrees / max(float(inside.mean()), 1e-9)), TINY_SCALE)


TINY_SCALE = 1e-12
"""Of points without noise, so that their intervals are points."""


def _derivatives(function: Callable[[np.ndarray], float], theta: np.ndarray) -> np.ndarray:
    """By logs of `theta`, central differences."""
    step = 1e-5
    rows = np.exp(step * np.eye(len(theta)))
    return np.array([(function(theta * row) - function(theta / row)) / (2 * step) for row in rows])


def _crossings(
    excess: Callable[[float], float], center: float, error: float, low: float, high: float
) -> tuple[float, float]:
    """Where a function that is negative at `center` crosses zero on either side; `low` or `high` where it does not."""
    from scipy.optimize import brentq

    ends, error = [], max(error, 1e-12 * abs(center), 1e-300)
    for direction, bound in ((-1.0, low), (1.0, high)):
        inner, step = center, 2 * error
        while True:
            outer = center + direction * step
            if (outer - bound) * direction >= 0:
                outer = bound
            if math.isinf(outer) or abs(outer) > 1e12 * max(1.0, abs(center)):
                ends.append(direction * math.inf)
                break
            if excess(outer) > 0:
                tolerance = max(1e-3 * error, 1e-14 * max(abs(center), 1e-300))
                ends.append(float(brentq(excess, *sorted((inner, outer)), xtol=tolerance)))
                break
            if outer == bound:
                ends.append(bound)
                break
            inner, step = outer, 2 * step
    return ends[0], ends[1]
