"""Least squares for a form by variable projection: a search over its nonlinear parameters alone.

For given nonlinear parameters the coefficients follow from non-negative least squares, so the search space of the five
parameters of the additive form has two dimensions. A grid over it gives the starts; Levenberg and Marquardt's method
refines the best of them. The refinement moves coefficients, too, as contributions (coefficient times the root mean
square of its column), which nonlinear parameters hardly change: A and alpha alone would be correlated by more than
0.999. arXiv 2603.22339 compares such fits with the usual ones from thousands of random starts.

The objective is the sum of Huber's loss of the residuals, of logs where the form says so.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from ebft_study.analysis.scaling.forms import Form

MULTIPLIERS = (1e-4, 1e4)
"""Bounds of a method's multiplier."""
STARTS = 3
"""Points of the grid that are refined."""
SWEEPS = 3
TOLERANCE = 1e-13
TINY = 1e-300


@dataclass(frozen=True, eq=False)
class Problem:
    """A form and its points. `methods` have a multiplier of the variable `multiplied` each, [n] indices, -1 for none.

    Args:
        delta: [n], the absolute residual up to which a point's loss is quadratic.
    """

    form: Form
    x: Mapping[str, np.ndarray]
    y: np.ndarray
    delta: np.ndarray
    methods: tuple[str, ...] = ()
    method_of: np.ndarray | None = None
    multiplied: str = ""

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Nonlinear parameters, multipliers by the name of their method, coefficients."""
        return (*self.nonlinear, *self.form.linear)

    @functools.cached_property
    def nonlinear(self) -> tuple[str, ...]:
        return (*(each.name for each in self.form.nonlinear), *self.methods)

    @functools.cached_property
    def log_bounds(self) -> np.ndarray:
        """[nonlinear, 2]"""
        bounds = [each.bounds(self.x[each.variable]) for each in self.form.nonlinear]
        return np.log([*bounds, *[MULTIPLIERS] * len(self.methods)])

    def parts(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Offset [G, n] and columns [G, n, linear] at nonlinear parameters [G, nonlinear]."""
        n_own = len(self.form.nonlinear)
        named = {name: theta[:, [k]] for k, name in enumerate(self.nonlinear[:n_own])}
        x = dict(self.x)
        if self.methods:
            # The multiplier of no method is the column of ones at the end, which index -1 finds.
            factors = np.append(theta[:, n_own:], np.ones((len(theta), 1)), axis=1)
            x[self.multiplied] = x[self.multiplied] * factors[:, self.method_of]
        with np.errstate(over="ignore", divide="ignore", under="ignore"):
            columns = np.stack(self.form.columns(named, x), axis=-1)
        done = columns[..., 0]
        return (x["start"] * (1 - done) if self.form.from_start else np.zeros_like(done)), columns

    def predict(self, parameters: np.ndarray) -> np.ndarray:
        """[n] values at parameters in the order of `names`."""
        k = len(self.nonlinear)
        offset, columns = self.parts(parameters[None, :k])
        values: np.ndarray = offset[0] + columns[0] @ parameters[k:]
        return values

    def at(self, table: pd.DataFrame, y: Sequence[float] | np.ndarray, delta: float = math.inf) -> Problem:
        """The same form and methods at the points of another table."""
        method_of = None
        if self.methods:
            method_of = np.array([self.methods.index(m) if m in self.methods else -1 for m in table["method"]])
        y = np.asarray(y, float)
        return replace(self, x=variables(self.form, table), y=y, delta=np.full(len(y), delta), method_of=method_of)

    def joined(self, other: Problem) -> Problem:
        """Both problems' points."""
        method_of = None
        if self.method_of is not None and other.method_of is not None:
            method_of = np.append(self.method_of, other.method_of)
        return replace(
            self,
            x={name: np.append(values, other.x[name]) for name, values in self.x.items()},
            y=np.append(self.y, other.y),
            delta=np.append(self.delta, other.delta),
            method_of=method_of,
        )

    def residuals(self, predicted: np.ndarray) -> np.ndarray:
        """Predicted minus measured, of logs where the form says so."""
        if not self.form.is_log:
            return np.asarray(predicted - self.y)
        return np.asarray(np.log(np.maximum(predicted, TINY)) - np.log(self.y))


def variables(form: Form, table: pd.DataFrame) -> dict[str, np.ndarray]:
    """The columns of a table that a form reads."""
    names = (*form.variables, *(["start"] if form.from_start else []))
    return {name: table[name].to_numpy(float) for name in names}


@dataclass(frozen=True)
class Solution:
    """A minimum: `parameters` in the order of `Problem.names`, and `objective`, half the sum of squares of `z`.

    `z` are the residuals, beyond `delta` such that half their square is Huber's loss. `jacobian` has their derivatives
    by logs of nonlinear parameters and by contributions of coefficients, zero for those that are fixed or at zero.
    """

    parameters: np.ndarray
    z: np.ndarray
    jacobian: np.ndarray

    @property
    def objective(self) -> float:
        return 0.5 * float(self.z @ self.z)


def minimize(
    problem: Problem, fixed: Mapping[str, float] | None = None, starts: Sequence[np.ndarray] = (), *, grid: bool = True
) -> Solution:
    """The best solution from the grid and from `starts`, with some parameters `fixed`."""
    fixed = fixed or {}
    nonlinear = [
        *(_grid_starts(problem, fixed) if grid else []),
        *(start[: len(problem.nonlinear)] for start in starts),
    ]
    given = np.array([fixed.get(name, math.nan) for name in problem.nonlinear])
    solutions = [_refine(problem, fixed, np.where(np.isnan(given), theta, given)) for theta in nonlinear]
    return min(solutions, key=lambda solution: solution.objective)


def _grid_starts(problem: Problem, fixed: Mapping[str, float]) -> list[np.ndarray]:
    """The best nonlinear parameters of the grid; multipliers are searched in turn with all others."""
    own, n_own = problem.form.nonlinear, len(problem.form.nonlinear)
    axes = [np.array([fixed[p.name]]) if p.name in fixed else p.grid(problem.x[p.variable]) for p in own]
    product = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
    factors = np.array([fixed.get(name, 1.0) for name in problem.methods])
    for _ in range(SWEEPS if problem.methods else 1):
        grid = np.hstack([product, np.tile(factors, (len(product), 1))])
        order = np.argsort(coefficients(problem, grid, fixed)[1], kind="stable")
        for k, name in enumerate(problem.methods):
            if name not in fixed:
                scan = np.tile(np.append(product[order[0]], factors), (33, 1))
                scan[:, n_own + k] = np.geomspace(1 / 64, 64, 33)
                factors[k] = scan[np.argmin(coefficients(problem, scan, fixed)[1]), n_own + k]
    return [np.append(product[k], factors) for k in order[:STARTS]]


def coefficients(
    problem: Problem, theta: np.ndarray, fixed: Mapping[str, float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative coefficients [G, linear] at nonlinear parameters [G, nonlinear], and sums of squares [G].

    Squares are of relative residuals where the form is on logs, which they equal to first order. The optimum is the
    best among the least squares solutions of all subsets of coefficients, without any below zero.
    """
    fixed, linear = fixed or {}, problem.form.linear
    weights = 1 / problem.y if problem.form.is_log else np.ones(len(problem.y))
    offset, columns = problem.parts(theta)
    columns = columns * weights[:, None]
    scale = np.maximum(np.sqrt((columns**2).mean(axis=1)), TINY)
    columns = columns / scale[:, None]
    target = (problem.y - offset) * weights
    values = np.zeros((len(theta), len(linear)))
    for k, name in enumerate(linear):
        if name in fixed:
            values[:, k] = fixed[name] * scale[:, k]
            target = target - columns[..., k] * values[:, [k]]
    free = [k for k, name in enumerate(linear) if name not in fixed]
    gram = np.einsum("gni,gnj->gij", columns, columns)
    products = np.einsum("gni,gn->gi", columns, target)
    best, squares = values.copy(), (target**2).sum(axis=1)
    for size in range(1, len(free) + 1):
        for subset in itertools.combinations(free, size):
            chosen = list(subset)
            inner = gram[:, chosen][:, :, chosen] + 1e-12 * len(problem.y) * np.eye(size)
            solved = np.linalg.solve(inner, products[:, chosen, None])[..., 0]
            residual = target - np.einsum("gni,gi->gn", columns[..., chosen], solved)
            sums = (residual**2).sum(axis=1)
            is_better = (solved >= 0).all(axis=1) & (sums < squares)
            squares = np.where(is_better, sums, squares)
            candidate = values.copy()
            candidate[:, chosen] = solved
            best = np.where(is_better[:, None], candidate, best)
    return best / scale, squares


def _refine(problem: Problem, fixed: Mapping[str, float], theta: np.ndarray) -> Solution:
    """A local minimum from nonlinear parameters; coefficients that would fall below zero are zero."""
    zero: dict[str, float] = {}
    while True:
        solution = _local(problem, {**fixed, **zero}, theta)
        negative = [k for k in range(len(problem.nonlinear), len(problem.names)) if solution.parameters[k] < 0]
        if not negative:
            return solution
        zero[problem.names[min(negative, key=lambda k: solution.parameters[k])]] = 0.0


def _local(problem: Problem, fixed: Mapping[str, float], theta: np.ndarray) -> Solution:
    from scipy.optimize import least_squares

    n, low, high = len(problem.nonlinear), *problem.log_bounds.T
    start = coefficients(problem, theta[None], fixed)[0][0]
    is_free = np.array([name not in fixed for name in problem.names])
    given = np.array([fixed.get(name, 0.0) for name in problem.names])

    def unpack(free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All parameters, and predicted values."""
        moved = np.zeros(len(problem.names))
        moved[is_free] = free
        nonlinear = np.exp(np.clip(moved[:n], low, high))
        nonlinear = np.where(is_free[:n], nonlinear, given[:n])
        offset, columns = problem.parts(nonlinear[None])
        size = _size(columns[0])
        linear = np.where(is_free[n:], moved[n:] / size, given[n:])
        return np.append(nonlinear, linear), offset[0] + columns[0] @ linear

    def z(free: np.ndarray) -> np.ndarray:
        r = problem.residuals(unpack(free)[1])
        beyond = np.abs(r) > problem.delta
        reach = np.where(beyond, problem.delta, 0.0)
        return np.where(beyond, np.sign(r) * np.sqrt(np.maximum(2 * reach * np.abs(r) - reach**2, 0)), r)

    packed = np.append(np.log(theta), start * _size(problem.parts(theta[None])[1][0]))[is_free]
    if not len(packed):
        return Solution(given, z(packed), np.zeros((len(problem.y), len(problem.names))))
    method = "lm" if len(problem.y) >= len(packed) else "trf"
    found = least_squares(
        z, packed, method=method, x_scale="jac", xtol=TOLERANCE, ftol=TOLERANCE, gtol=TOLERANCE, max_nfev=2000
    )
    jacobian = np.zeros((len(problem.y), len(problem.names)))
    jacobian[:, is_free] = found.jac
    return Solution(unpack(found.x)[0], found.fun, jacobian)


def _size(columns: np.ndarray) -> np.ndarray:
    """Root mean square of each column [linear]."""
    size: np.ndarray = np.maximum(np.sqrt((columns**2).mean(axis=0)), TINY)
    return size
