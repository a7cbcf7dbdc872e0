"""Points of known laws for the tests of scaling fits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

CHINCHILLA = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}
SIZES, DATA = np.geomspace(1e7, 1e10, 6), np.geomspace(1e9, 1e12, 5)
SMALL = np.geomspace(1e5, 1e7, 6)
"""Tokens of a study on a laptop."""


def grid(
    sizes: Sequence[float] | np.ndarray = SIZES,
    data: Sequence[float] | np.ndarray = DATA,
    *,
    seeds: int = 1,
    methods: Sequence[str] = ("sft",),
) -> pd.DataFrame:
    rows = itertools.product(sizes, data, range(seeds), methods)
    return pd.DataFrame(rows, columns=["parameters", "tokens", "seed", "method"])


def chinchilla(table: pd.DataFrame, speedup: float = 1.0) -> np.ndarray:
    """Losses by Chinchilla's law, where EBFT makes `speedup` tokens of one."""
    tokens = table["tokens"] * np.where(table["method"] == "ebft", speedup, 1.0)
    law = 1.69 + 406.4 / table["parameters"] ** 0.34 + 410.7 / tokens**0.28
    return law.to_numpy()


def floored(tokens: np.ndarray | pd.Series[float], floor: float = 2.0, exponent: float = 0.4) -> np.ndarray:
    """A power law with a floor that falls by 1 from 100,000 tokens on."""
    return np.asarray(floor + (tokens / 1e5) ** -exponent)


def noisy(values: np.ndarray, deviation: float, seed: int | Sequence[int]) -> np.ndarray:
    """Values with errors of this relative standard deviation."""
    return values * np.exp(np.random.default_rng(seed).normal(0, deviation, len(values)))
