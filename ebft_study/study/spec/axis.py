"""One axis of a study: values of a setting, a range to draw from, or named choices of several settings."""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, PositiveFloat, field_validator, model_validator

from ebft_study.config import Section

MOST_STEPS = 100_000
_DIGITS = 6  # of drawn values: enough to search, short enough to read
_STEP_DIGITS = 12  # of values on a step: enough to undo what 3 * 0.1 does to 0.3


class Axis(Section):
    """One axis. `when` names earlier axes and their values; where it does not hold, the axis has no value."""

    distribution: Literal["choice", "uniform", "log_uniform", "integer", "log_integer"] = "choice"
    values: tuple[Any, ...] | None = None
    choices: dict[str, dict[str, Any]] | None = Field(None, description="name -> settings of the choice")
    low: float | None = None
    high: float | None = None
    step: PositiveFloat | None = Field(None, description="uniform and integer: distance between values, from low")
    when: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict, description="axis -> values at which this one exists"
    )

    @field_validator("choices", mode="before")
    @classmethod
    def _names_alone(cls, choices: Any) -> Any:
        """A list names choices whose settings a profile gives."""
        if not isinstance(choices, list | tuple):
            return choices
        if len({str(name) for name in choices}) != len(choices):
            raise ValueError(f"lists a choice twice: {list(choices)}. List each once")
        return {str(name): {} for name in choices}

    @field_validator("choices")
    @classmethod
    def _choice_names(cls, choices: dict[str, dict[str, Any]] | None) -> dict[str, dict[str, Any]] | None:
        for name in choices or {}:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise ValueError(f"{name!r} is not a name. Use letters, digits, '.', '-' and '_'")
        return choices

    @field_validator("when", mode="before")
    @classmethod
    def _one_value_is_a_list(cls, when: Any) -> Any:
        if not isinstance(when, Mapping):
            return when
        return in_lists(when)

    @model_validator(mode="after")
    def _complete(self) -> Axis:
        if self.is_choice:
            self._check_choice()
        else:
            self._check_range()
            self._check_step()
        return self

    def _check_choice(self) -> None:
        if self.low is not None or self.high is not None or self.step is not None:
            raise ValueError("low, high and step belong to a range. Name its distribution: uniform, integer, ...")
        if self.values is not None and self.choices is not None:
            raise ValueError("has values and choices. Give values of one setting, or choices of several settings")
        if not self.values and not self.choices:
            raise ValueError("lists no values. List at least one")
        if self.values and len({frozen(value) for value in self.values}) != len(self.values):
            raise ValueError(f"lists a value twice: {list(self.values)}. List each value once")

    def _check_range(self) -> None:
        kind, low, high = self.distribution, self.low, self.high
        if self.values is not None or self.choices is not None or low is None or high is None:
            raise ValueError(f"a {kind} distribution has low and high. Give both, and no values")
        if not low < high:
            raise ValueError(f"low must lie below high, but got low={low:g}, high={high:g}. Swap them")
        if self.is_log and low <= 0:
            raise ValueError(f"{kind} needs low > 0, but got {low:g}. Use uniform or a positive low")
        if self.is_integer and not (low.is_integer() and high.is_integer()):
            raise ValueError("an integer distribution has whole numbers as low and high. Use uniform for fractions")

    def _check_step(self) -> None:
        low, high, step = float(self.low or 0), float(self.high or 0), self.step
        if step is None:
            return
        if self.is_log:
            raise ValueError("Optuna has no steps on a logarithmic range. List the values, or drop step")
        if self.is_integer and not step.is_integer():
            raise ValueError(f"an integer distribution has whole steps, but got step={step:g}. Use uniform")
        count = (high - low) / step
        if count > MOST_STEPS:
            raise ValueError(f"step={step:g}: makes more than {MOST_STEPS} values. Use a larger step, or none")
        if abs(count - round(count)) > 1e-9 * max(count, 1.0):
            last = _on_step(low, step, math.floor(count))
            raise ValueError(f"steps of {step:g} from {low:g} end at {last:g}, not at high={high:g}. Use high={last:g}")

    @property
    def is_choice(self) -> bool:
        return self.distribution == "choice"

    @property
    def is_integer(self) -> bool:
        return self.distribution in ("integer", "log_integer")

    @property
    def is_log(self) -> bool:
        return self.distribution in ("log_uniform", "log_integer")

    @property
    def finite(self) -> Sequence[Any] | None:
        """All values in order, choices by name; None for a continuous range."""
        if self.is_choice:
            return self.values or tuple(self.choices or ())
        low, high = float(self.low or 0), float(self.high or 0)
        if self.is_integer:
            return range(int(low), int(high) + 1, int(self.step or 1))
        if self.step is None:
            return None
        return [_on_step(low, self.step, index) for index in range(round((high - low) / self.step) + 1)]

    def extremes(self) -> Sequence[Any]:
        """All choices, or both ends of a range: where rules between settings break first."""
        if self.is_choice:
            return self.finite or ()
        ends = (float(self.low or 0), float(self.high or 0))
        return tuple(int(end) for end in ends) if self.is_integer else ends

    def draw(self, generator: random.Random) -> Any:
        """One value at random."""
        if self.is_choice:
            return generator.choice(self.finite or ())
        low, high = float(self.low or 0), float(self.high or 0)
        if self.distribution == "integer" and self.step is None:
            return generator.randint(int(low), int(high))
        if self.step is not None:
            return generator.choice(self.finite or ())
        if self.distribution == "log_integer":
            # Every whole number has the part of the logarithmic range that rounds to it.
            drawn = math.exp(generator.uniform(math.log(low - 0.5), math.log(high + 0.5)))
            return min(max(round(drawn), int(low)), int(high))
        if self.distribution == "uniform":
            return self.readable(generator.uniform(low, high))
        return self.readable(math.exp(generator.uniform(math.log(low), math.log(high))))

    def readable(self, value: float) -> float:
        """A drawn value with a readable number of digits, still within the range and on its step."""
        low, high = float(self.low or 0), float(self.high or 0)
        if self.step is not None:
            return _on_step(low, self.step, round((value - low) / self.step))
        return min(max(float(f"{value:.{_DIGITS}g}"), low), high)

    def own(self, value: Any) -> tuple[Any, ...]:
        """The value of this axis that `value` means, in a tuple; empty where it has none."""
        if self.finite is not None:
            return tuple(each for each in self.finite if _is_one(each, value))[:1]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        within = is_number and float(self.low or 0) <= value <= float(self.high or 0)
        return (self.readable(float(value)),) if within else ()

    def nearest(self, value: Any) -> Any:
        """The value of this axis that comes closest to one that it does not have."""
        finite = self.finite
        if finite is None:
            return min((float(self.low or 0), float(self.high or 0)), key=lambda end: abs(end - value))
        if isinstance(value, int | float) and all(isinstance(each, int | float) for each in finite):
            return min(finite, key=lambda each: abs(each - value))
        close = difflib.get_close_matches(str(value), [str(each) for each in finite], n=1, cutoff=0.0)
        return close[0]

    def plain(self) -> Any:
        """The axis in the form of a study file: a plain list if it has values only."""
        values = None if self.values is None else list(self.values)
        if values is not None and not self.when:
            return values
        form: dict[str, Any] = {"values": values, "choices": self.choices}
        if not self.is_choice:
            form = {key: getattr(self, key) for key in ("distribution", "low", "high", "step")}
        when = {key: list(allowed) for key, allowed in self.when.items()}
        return {key: value for key, value in {**form, "when": when or None}.items() if value is not None}


def in_lists(values: Mapping[Any, Any]) -> dict[str, Any]:
    """The same with every single value as a list of one, under text keys."""
    return {str(key): value if isinstance(value, list | tuple) else (value,) for key, value in values.items()}


def as_axis(key: str, axis: Any) -> dict[str, Any]:
    """An axis as a study file may write it, as the fields of an `Axis`."""
    if isinstance(axis, Axis):
        return axis.plain() if isinstance(axis.plain(), dict) else {"values": axis.plain()}
    if isinstance(axis, list | tuple):
        return {"distribution": "choice", "values": axis}
    if isinstance(axis, Mapping):
        if axis.get("distribution") == "grid" or "grid" in axis or "grid_search" in axis:
            raise ValueError(f"{key}: a grid is a plain list. Write {key}: [first, second], with algorithm: grid")
        return dict(axis)
    raise ValueError(f"{key}={axis!r}: is one value. Fix it under 'run', or list several")


def frozen(value: Any) -> Any:
    """A value that can be a key: lists and mappings become tuples."""
    if isinstance(value, Mapping):
        return tuple((key, frozen(inner)) for key, inner in value.items())
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value


def _is_one(value: Any, other: Any) -> bool:
    """Whether two values are one, numbers up to the digits of drawn ones."""
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    if isinstance(value, int | float) and isinstance(other, int | float):
        return math.isclose(value, other, rel_tol=10.0 ** (1 - _DIGITS))
    return bool(frozen(value) == frozen(other))


def _on_step(low: float, step: float, index: int) -> float:
    return float(f"{low + index * step:.{_STEP_DIGITS}g}")
