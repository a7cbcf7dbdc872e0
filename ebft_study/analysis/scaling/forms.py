"""Formulas of scaling laws, each linear in some parameters once the others are known.

A form predicts `value = offset(theta, x) + sum_k c_k column_k(theta, x)`, with all `theta` positive and all `c` not
negative. That is what variable projection needs (`projection`): a search over `theta` alone. Variables are columns of a
table of points: `parameters`, `tokens`, `flops`, `seconds`, in their own units. Coefficients follow from these units:
A of A / N^alpha has the unit of the loss times parameters^alpha.

Losses are fitted on logs, so that an error of 1 % counts the same everywhere. Scores and gains, which may be zero, are
fitted as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

EXPONENTS = (0.01, 10.0)
"""Bounds of exponents."""
REACH = 1e4
"""A scale lies at most this factor outside of the range of its variable."""
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Nonlinear:
    """A positive parameter that enters the form nonlinearly: the exponent of `variable`, or an amount of it."""

    name: str
    variable: str
    kind: Literal["exponent", "scale"] = "exponent"

    def bounds(self, values: np.ndarray) -> tuple[float, float]:
        """Bounds of the parameter, where its variable takes `values`."""
        positive = values[values > 0]
        return EXPONENTS if self.kind == "exponent" else (positive.min() / REACH, positive.max() * REACH)

    def grid(self, values: np.ndarray) -> np.ndarray:
        """Where the search for the parameter starts."""
        if self.kind == "exponent":
            return np.geomspace(0.03, 3.0, 12)
        positive = values[values > 0]
        return np.geomspace(positive.min() / 100, positive.max() * 100, 12)


@dataclass(frozen=True)
class Form:
    """A scaling law.

    Args:
        variables: columns of a table that it reads.
        linear: names of the coefficients c.
        columns: what they multiply, from `theta` by name, [G, 1] each, and variables by name, [n] or [G, n] each.
        floor: the coefficient that is the value at infinite scale.
        is_log: whether residuals are differences of logs.
        from_start: whether it starts at the value of the table's column `start`: column_0 is then the part s of the
            way to the asymptote that is done, and the offset `start (1 - s)`.
    """

    name: str
    formula: str
    variables: tuple[str, ...]
    nonlinear: tuple[Nonlinear, ...]
    linear: tuple[str, ...]
    columns: Callable[[Arrays, Arrays], list[np.ndarray]]
    floor: str = "E"
    is_log: bool = True
    from_start: bool = False
    may_be_zero: bool = False
    """Whether the variable may be 0, as the data before fine-tuning are."""

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters: nonlinear ones, then coefficients."""
        return (*(each.name for each in self.nonlinear), *self.linear)


def power_law(variable: str) -> Form:
    """E + A / x^alpha in one variable, with the floor E (Hestness et al. 2017, arXiv 1712.00409)."""
    return Form(
        f"power law in {variable}",
        f"E + A / {variable}^alpha",
        (variable,),
        (Nonlinear("alpha", variable),),
        ("E", "A"),
        lambda theta, x: [np.ones_like(x[variable] * theta["alpha"]), x[variable] ** -theta["alpha"]],
    )


def additive(size: str = "parameters", data: str = "tokens") -> Form:
    """E + A / N^alpha + B / D^beta (Chinchilla, arXiv 2203.15556, approach 3)."""
    return Form(
        "additive",
        f"E + A / {size}^alpha + B / {data}^beta",
        (size, data),
        (Nonlinear("alpha", size), Nonlinear("beta", data)),
        ("E", "A", "B"),
        lambda theta, x: [
            np.ones_like(x[size] * x[data] * theta["alpha"]),
            x[size] ** -theta["alpha"] + 0 * x[data],
            x[data] ** -theta["beta"] + 0 * x[size],
        ],
    )


def multiplicative(size: str = "parameters", data: str = "tokens") -> Form:
    """E + A / (N^alpha D^beta), for fine-tuning on D tokens (Zhang et al. 2024, arXiv 2402.17193)."""
    return Form(
        "multiplicative",
        f"E + A / ({size}^alpha {data}^beta)",
        (size, data),
        (Nonlinear("alpha", size), Nonlinear("beta", data)),
        ("E", "A"),
        lambda theta, x: [
            np.ones_like(x[size] * x[data] * theta["alpha"]),
            x[size] ** -theta["alpha"] * x[data] ** -theta["beta"],
        ],
    )


def rectified(data: str = "tokens") -> Form:
    """E + B / (D_p^beta + D^beta), for fine-tuning one model, which begins as if it had learnt D_p tokens.

    Lin et al. 2024 (arXiv 2402.02314) write D_l for D_p^beta; here D_p is an amount of data. D may be 0, and then the
    value is the base model's.
    """
    return Form(
        "rectified",
        f"E + B / (D_p^beta + {data}^beta)",
        (data,),
        (Nonlinear("beta", data), Nonlinear("D_p", data, "scale")),
        ("E", "B"),
        lambda theta, x: [
            np.ones_like(x[data] * theta["beta"]),
            1 / (theta["D_p"] ** theta["beta"] + x[data] ** theta["beta"]),
        ],
        may_be_zero=True,
    )


def sigmoid(compute: str = "flops") -> Form:
    """R0 + (A - R0) / (1 + (C_mid / C)^B), for bounded scores and for gains, whose start is 0.

    ScaleRL's (arXiv 2510.13786). R0 is no parameter but the value at step 0, in the column `start`; A is the score at
    infinite compute, C_mid the compute at half of the way.
    """
    return Form(
        "sigmoid",
        f"R0 + (A - R0) / (1 + (C_mid / {compute})^B)",
        (compute,),
        (Nonlinear("B", compute), Nonlinear("C_mid", compute, "scale")),
        ("A",),
        lambda theta, x: [1 / (1 + (theta["C_mid"] / x[compute]) ** theta["B"])],
        floor="A",
        is_log=False,
        from_start=True,
    )
