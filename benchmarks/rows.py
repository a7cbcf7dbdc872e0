"""Results: one row per number, with its target where one is stated; how rows are shown and written."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ebft_study.errors import ServiceError

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
SCALED_UNITS = ("B", "FLOP", "FLOP/s")


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
    """The whole benchmark fails; a missed target alone does not do that."""
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


Titled = tuple[str, list[Row]]
"""A table: its title and its rows."""


def measured(name: str, values: Sequence[float], unit: str = "", **more: Any) -> Row:
    """The median of repeated measurements, with their spread; `more` sets further fields of the row."""
    return Row(name, statistics.median(values), unit, min(values), max(values), **more)


def compared(name: str, times: Mapping[str, Sequence[float]], *, target: float | None = None) -> list[Row]:
    """Seconds of two contenders, and how many times faster the first one is in a round (`measure.in_turn`)."""
    first, second = times.values()
    speedups = [other / own for own, other in zip(first, second, strict=True)]
    seconds = [measured(f"{name}/{contender}", taken, "s") for contender, taken in times.items()]
    return [*seconds, measured(f"{name}/speedup", speedups, "x", target=target)]


def judged(name: str, difference: float, tolerance: float) -> Row:
    """A difference that makes the benchmark fail when it exceeds its tolerance, or is NaN."""
    return Row(name, difference, target=tolerance, at_most=True, failed=not difference <= tolerance)


def failure(name: str, error: BaseException) -> Row:
    """The row of a part that could not be measured."""
    return Row(f"{name}/failed", " ".join(str(error).split())[:300], failed=True)


def report(name: str, tables: Iterable[Titled], json_file: Path | None) -> list[Row]:
    """Show tables, and write all rows so far, as soon as each of them is there.

    Returns:
        All rows. If an engine or a service is lost on the way, the last one is `<name>/failed`.
    """
    rows: list[Row] = []
    for title, new in _until_lost(name, tables):
        rows += new
        show(title, new)
        if json_file:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps([row.as_json() for row in rows], indent=1) + "\n")
    return rows


def _until_lost(name: str, tables: Iterable[Titled]) -> Iterable[Titled]:
    try:
        yield from tables
    except ServiceError as error:
        yield name, [failure(name, error)]


def show(title: str, rows: Sequence[Row]) -> None:
    """Print rows as a table, cells as another one."""
    _print((title, "median", "spread", "target", ""), [line(row) for row in rows if not row.cell])
    cells = {tuple(r.name.removeprefix(f"{title}/").rsplit("/", 1)): _value(r) for r in rows if r.cell}
    if cells:
        names, columns = (list(dict.fromkeys(parts)) for parts in zip(*cells, strict=True))
        lines = [(name, *(cells.get((name, column), "") for column in columns)) for name in names]
        _print((title, *(column.replace("_", " ") for column in columns)), lines)


def line(row: Row) -> tuple[str, ...]:
    """Name, value, spread, target and verdict of a row, as text."""
    spread = "" if row.low is None or row.high is None else f"{_number(row.low)} to {_number(row.high)}"
    target = "" if row.target is None else f"{'<=' if row.at_most else '>='} {_number(row.target)}"
    verdict = "FAILED" if row.failed else "missed" if row.holds is False else ""
    return row.name, _value(row), "" if row.low == row.high else spread, target, verdict


def _value(row: Row) -> str:
    return row.value if isinstance(row.value, str) else _number(row.value, row.unit)


def _number(value: float, unit: str = "") -> str:
    """Three digits, with a prefix where the unit takes one."""
    for size, prefix in PREFIXES if unit in SCALED_UNITS else ():
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    digits = ",.0f" if isinstance(value, int) or value >= 1000 else ".3g"
    return f"{value:{digits}} {unit}".strip()


def _print(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, overflow="fold", justify="right" if index else "left")
    for cells in lines:
        table.add_row(*cells, style="bold red" if cells[-1] in ("FAILED", "missed") else None)
    # A file has no width; 120 is that of the code.
    Console(width=None if sys.stdout.isatty() else 120).print(table, "")
