"""What a benchmark says: one row per number, with its target where one is stated."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """A number, or a word about the machine."""

    name: str
    value: float | str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    target: float | None = None
    at_most: bool = False
    """The target is an upper bound; else a lower one."""
    failed: bool = False
    """What makes the whole benchmark fail; slowness does not."""
    cell: bool = False
    """Shown in a grid: the last part of the name is its column, the rest its line."""

    @property
    def holds(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None or isinstance(self.value, str):
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    def as_json(self) -> dict[str, Any]:
        """name, value, unit, target, holds, and the spread (low, high) of a number that was measured repeatedly."""
        row = {"name": self.name, "value": self.value, "unit": self.unit, "target": self.target, "holds": self.holds}
        return row if self.low is None else {**row, "low": self.low, "high": self.high}


def measured(
    name: str,
    values: Sequence[float],
    unit: str = "",
    *,
    target: float | None = None,
    at_most: bool = False,
    cell: bool = False,
) -> Row:
    """The median of repeated measurements, with their spread."""
    return Row(name, statistics.median(values), unit, min(values), max(values), target, at_most, cell=cell)


def compared(name: str, times: Mapping[str, Sequence[float]], *, target: float | None = None) -> list[Row]:
    """Seconds of `ours` and `naive`, and how many times faster ours is in a round (`measure.in_turn`)."""
    speedups = [naive / ours for naive, ours in zip(times["naive"], times["ours"], strict=True)]
    return [
        measured(f"{name}/ours", times["ours"], "s"),
        measured(f"{name}/naive", times["naive"], "s"),
        measured(f"{name}/speedup", speedups, "x", target=target),
    ]


def judged(name: str, difference: float, tolerance: float) -> Row:
    """A difference that makes the benchmark fail when it exceeds its tolerance, or is no number."""
    row = Row(name, difference, target=tolerance, at_most=True)
    return Row(name, difference, target=tolerance, at_most=True, failed=not row.holds)
