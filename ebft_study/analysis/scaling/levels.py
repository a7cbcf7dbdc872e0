"""Which measured amounts count as one scale.

Seeds of one scale differ in tokens where texts do, and in seconds.
"""

from __future__ import annotations

import pandas as pd

SAME = 1.2
"""Amounts that differ by less than this factor are one scale."""


def levels(values: pd.Series[float]) -> list[int]:
    """The scale of each value, from 0 for the least. A scale ends at `SAME` times its least value; -1 for NaN."""
    scales: dict[float, int] = {}
    least, level = -1.0, -1
    for value in sorted(set(values.dropna())):
        if least < 0 or value >= max(SAME * least, 5e-324):
            least, level = value, level + 1
        scales[value] = level
    return [scales.get(value, -1) for value in values]
