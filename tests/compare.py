"""Compare the tables of two studies, bit for bit: `python -m tests.compare STUDY OTHER`.

Times, memory and names of studies are left out. Exit code 1 where a row differs or is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from ebft_study import results

KEYS = {
    "metrics": ["trial_id", "step"],
    "evaluations": ["trial_id", "step", "benchmark", "metric", "position"],
    "scores": ["trial_id", "step", "benchmark", "metric", "position"],
    "samples": ["trial_id", "step", "sequence", "anchor", "sample"],
}
TIMED = ("written_at", "attempt", "study", "peak_memory_bytes", "tokens_per_second", "energy_joules")
SHARED = ("evaluation_flops",)
"""Paid by the trial that happens to evaluate the base model for all."""


def different(one: Path, other: Path, table: str) -> int:
    """Number of rows that are not equal in every bit, or that only one of the studies has."""
    frames = [_rows(folder, table).set_index(KEYS[table]).sort_index() for folder in (one, other)]
    columns = [name for name in frames[0].columns if name not in (*TIMED, *SHARED) and not name.endswith("_seconds")]
    both = frames[0].index.intersection(frames[1].index)
    a, b = (frame.loc[both, columns] for frame in frames)
    equal = (a == b) | (a.isna() & b.isna())
    for name in equal.columns[~equal.all()]:
        print(f"{table}.{name} differs in {int((~equal[name]).sum())} rows", file=sys.stderr)
    return int((~equal.all(axis=1)).sum()) + len(frames[0].index.symmetric_difference(frames[1].index))


def _rows(folder: Path, table: str) -> pd.DataFrame:
    """The rows, with lists as text: pandas compares no lists."""
    rows = results.read_table(folder, table)
    return rows.map(lambda value: str(value.tolist()) if isinstance(value, np.ndarray) else value)


def main(one: str, other: str) -> int:
    counts = {table: different(Path(one), Path(other), table) for table in KEYS}
    for table, count in counts.items():
        print(f"{table}: {len(results.read_table(Path(one), table))} rows, {count} differ")
    return int(any(counts.values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
