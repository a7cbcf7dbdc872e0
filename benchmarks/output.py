"""Rows on a terminal and in a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import Row

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
SCALED_UNITS = ("B", "FLOP", "FLOP/s")

Lineage = tuple[str, ...]


def show(title: str, rows: Sequence[Row]) -> None:
    """Print rows as a table, cells as another one; as plain lines where rich is not installed."""
    lines = [_line(row) for row in rows if not row.cell]
    _print((title, "median", "spread", "target", ""), lines)
    cells = [row for row in rows if row.cell]
    if cells:
        _print(*_grid(title, cells))


def _line(row: Row) -> Lineage:
    spread = "" if row.low is None or row.high is None else f"{_number(row.low, '')} to {_number(row.high, '')}"
    target = "" if row.target is None else f"{'<=' if row.at_most else '>='} {_number(row.target, '')}"
    verdict = "FAILED" if row.failed else "missed" if row.holds is False else ""
    return row.name, _value(row), "" if row.low == row.high else spread, target, verdict


def _grid(title: str, cells: Sequence[Row]) -> tuple[Lineage, list[Lineage]]:
    values = {tuple(row.name.removeprefix(f"{title}/").rsplit("/", 1)): _value(row) for row in cells}
    names, columns = (list(dict.fromkeys(parts)) for parts in zip(*values, strict=True))
    lines = [(name, *(values.get((name, column), "") for column in columns)) for name in names]
    return (title, *(column.replace("_", " ") for column in columns)), lines


def _value(row: Row) -> str:
    return row.value if isinstance(row.value, str) else _number(row.value, row.unit)


def _number(value: float, unit: str) -> str:
    """Three digits, with a prefix where the unit takes one."""
    for size, prefix in PREFIXES if unit in SCALED_UNITS else ():
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    if isinstance(value, int) or value >= 1000:
        return f"{value:,.0f} {unit}".strip()
    return f"{value:.3g} {unit}".strip()


def _print(header: Lineage, lines: Sequence[Lineage]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for line in (header, *lines):
            print("  ".join(cell for cell in line if cell), flush=True)
        return
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, overflow="fold", justify="right" if index else "left")
    for line in lines:
        table.add_row(*line, style="bold red" if line[-1] in ("FAILED", "missed") else None)
    # Where nobody's window limits it, a line is as wide as the code's.
    Console(width=None if sys.stdout.isatty() else 120).print(table, "")


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Rows as a JSON list, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([row.as_json() for row in rows], indent=1) + "\n")
