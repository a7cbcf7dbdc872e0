"""Settings that move together stand as one: an axis of choices under its own name, linked settings under the first.

A report that showed each of them would draw one question several times, and find no two configurations that differ in
one thing alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ebft_study import config


class Choice(str):
    """The name of a choice, which sorts as the study file lists it."""

    rank: int

    def __new__(cls, name: str, rank: int) -> Choice:
        made = super().__new__(cls, name)
        made.rank = rank
        return made


def choices_of(spec: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Axis -> choice -> what it stands for, as short name -> value; from study.yaml."""
    axes = spec.get("axes")
    listed = axes.items() if isinstance(axes, Mapping) else ()
    return {
        axis: {
            name: {config.short_name(path): value for path, value in settings.items()}
            for name, settings in given["choices"].items()
        }
        for axis, given in listed
        if isinstance(given, Mapping) and isinstance(given.get("choices"), Mapping)
    }


def with_choices(trials: pd.DataFrame, spec: Mapping[str, Any]) -> pd.DataFrame:
    """Trials with a column per axis of choices, by the name of their configuration; None where it does not exist."""
    named = {}
    for axis, choices in choices_of(spec).items():
        ranks = {name: rank for rank, name in enumerate(choices)}
        found = [_value(configuration, axis) for configuration in trials["configuration"]]
        on_axes = trials["named_baseline"].isna()
        named[axis] = pd.Series(
            [
                Choice(value, ranks[value]) if value in ranks and own else None
                for value, own in zip(found, on_axes, strict=True)
            ],
            index=trials.index,
            dtype=object,
        )
    return trials.assign(**named)


def stand_ins(spec: Mapping[str, Any], varying: Sequence[str]) -> dict[str, str]:
    """Varying setting -> what it is shown as; itself where nothing else determines it."""
    setters: dict[str, list[str]] = {name: [] for name in varying}
    for axis, choices in choices_of(spec).items():
        for name in dict.fromkeys(name for settings in choices.values() for name in settings if name in setters):
            setters[name].append(axis)
    # What several axes set, each under its own condition, is told by its value alone.
    shown = {name: axes[0] if len(axes) == 1 else name for name, axes in setters.items()}
    linked = spec.get("linked")
    for path, link in linked.items() if isinstance(linked, Mapping) else ():
        operands = next(iter(link.values()), ())
        origins = [operands] if isinstance(operands, str) else [each for each in operands if isinstance(each, str)]
        leaders = [shown[name] for name in map(config.short_name, origins) if name in shown]
        if config.short_name(path) in shown and leaders:
            shown[config.short_name(path)] = leaders[0]
    return shown


def _value(configuration: Any, axis: str) -> str | None:
    """The value of an axis in a configuration's name, `size=small alpha=1`."""
    parts = configuration.split(" ") if isinstance(configuration, str) else ()
    return next((part.partition("=")[2] for part in parts if part.startswith(f"{axis}=")), None)
