"""Which checkpoints of a trial stay: a pure function of their steps and what was measured at them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

Values = Mapping[int, float]
"""Step of a checkpoint -> the objective then, NaN where it was not measured."""


def to_keep(
    values: Values, *, newest: int, best: int = 0, every_steps: int | None = None, mode: Literal["min", "max"] = "min"
) -> set[int]:
    """The steps of the `newest` last checkpoints, of the `best` ones, and of all multiples of `every_steps`."""
    last = sorted(values)[-max(newest, 1) :]
    regular = [step for step in values if every_steps and step % every_steps == 0]
    return {*last, *ranked(values, mode)[:best], *regular}


def ranked(values: Values, mode: Literal["min", "max"]) -> list[int]:
    """Steps with a measured objective, the best first; of equals the earlier step, which took less training."""
    sign = 1.0 if mode == "min" else -1.0
    return sorted(
        (step for step in values if math.isfinite(values[step])), key=lambda step: (sign * values[step], step)
    )
