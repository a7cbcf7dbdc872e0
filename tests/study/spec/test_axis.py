"""Axes: what a range holds, what is refused, and that draws follow their distribution."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from pydantic import ValidationError

from ebft_study.study.spec.axis import Axis, as_axis


def axis(**given: Any) -> Axis:
    return Axis.model_validate(given)


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ({"distribution": "uniform", "low": 0.0, "high": 0.3, "step": 0.1}, [0.0, 0.1, 0.2, 0.3]),
        ({"distribution": "uniform", "low": -1, "high": 1, "step": 0.5}, [-1.0, -0.5, 0.0, 0.5, 1.0]),
        ({"distribution": "integer", "low": 2, "high": 8, "step": 3}, [2, 5, 8]),
        ({"distribution": "log_integer", "low": 1, "high": 4}, [1, 2, 3, 4]),
        ({"values": [None, 1.0]}, [None, 1.0]),
        ({"choices": {"small": {"model": "a"}, "large": {"model": "b"}}}, ["small", "large"]),
        ({"choices": ["small", "large"]}, ["small", "large"]),
    ],
)
def test_finite_axes_know_their_values(given: dict[str, Any], values: list[Any]) -> None:
    finite = axis(**given).finite
    assert finite is not None
    assert list(finite) == values
    generator = random.Random(0)
    assert {axis(**given).draw(generator) for _ in range(100)} == set(values)


@pytest.mark.parametrize("distribution", ["uniform", "log_uniform"])
def test_continuous_axes_have_no_list_of_values(distribution: str) -> None:
    assert axis(distribution=distribution, low=0.1, high=1).finite is None


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"distribution": "uniform", "low": 0, "high": 1, "step": 0.3}, "end at 0.9, not at high=1. Use high=0.9"),
        ({"distribution": "integer", "low": 1, "high": 4, "step": 2}, "end at 3, not at high=4"),
        ({"distribution": "integer", "low": 1, "high": 4, "step": 0.5}, "whole steps"),
        ({"distribution": "uniform", "low": 0, "high": 1, "step": 0}, "greater than 0"),
        ({"distribution": "log_uniform", "low": 0.1, "high": 1, "step": 0.1}, "no steps on a logarithmic range"),
        ({"distribution": "log_integer", "low": 1, "high": 8, "step": 1}, "no steps on a logarithmic range"),
        ({"distribution": "log_integer", "low": 0, "high": 8}, "log_integer needs low > 0"),
        ({"distribution": "log_integer", "low": 1.5, "high": 8}, "whole numbers"),
        ({"values": [1, 2], "step": 1}, "belong to a range"),
        ({"values": [1], "choices": {"a": {}}}, "has values and choices"),
        ({"values": [[0.5], [0.5]]}, "twice"),
        ({"values": [1, 1.0]}, "twice"),
        ({"choices": ["a", "a"]}, "twice"),
        ({"choices": {"a b": {}}}, "is not a name"),
        ({}, "lists no values"),
    ],
)
def test_what_makes_no_axis_is_refused(given: dict[str, Any], part: str) -> None:
    with pytest.raises(ValidationError) as caught:
        axis(**given)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"distribution": "uniform", "low": 0.0, "high": 1.0, "step": 0.1},
        {"distribution": "log_uniform", "low": 1e-5, "high": 1e-1},
        {"distribution": "integer", "low": 1, "high": 9, "step": 4},
        {"distribution": "log_integer", "low": 1, "high": 64},
    ],
)
def test_every_draw_is_one_that_optuna_could_suggest(given: dict[str, Any]) -> None:
    """No warning either, which Optuna gives where a step does not fit its range."""
    made = axis(**given)
    low, high = given["low"], given["high"]
    distribution = (
        IntDistribution(low, high, log=made.is_log, step=given.get("step", 1))
        if made.is_integer
        else FloatDistribution(low, high, log=made.is_log, step=given.get("step"))
    )
    generator = random.Random(1)
    for value in (made.draw(generator) for _ in range(50)):
        assert distribution._contains(distribution.to_internal_repr(value))


def test_log_integers_are_drawn_by_their_logarithm() -> None:
    """P(k) is the length of [log(k - 1/2), log(k + 1/2)], here within four standard errors of 4,000 draws."""
    made, generator, draws = axis(distribution="log_integer", low=1, high=16), random.Random(3), 4000
    drawn = [made.draw(generator) for _ in range(draws)]
    whole = math.log(16.5 / 0.5)
    for k in (1, 2, 4, 16):
        p = math.log((k + 0.5) / (k - 0.5)) / whole
        assert abs(drawn.count(k) / draws - p) < 4 * math.sqrt(p * (1 - p) / draws)


@pytest.mark.parametrize(
    "given",
    [
        [1, 2],
        {"values": [1, 2], "when": {"other": ["a"]}},
        {"choices": {"small": {"max_grad_norm": None}, "large": {}}},
        {"distribution": "uniform", "low": 0.0, "high": 1.0, "step": 0.5},
    ],
)
def test_an_axis_survives_its_own_record(given: Any) -> None:
    made = axis(**as_axis("key", given))
    assert made.plain() == given
    assert axis(**as_axis("key", made.plain())) == made
