"""How well searches decide with early stopping and seeds, at equal cost: `tests/decisions.py` with few searches."""

from __future__ import annotations

import statistics

import pytest

from tests.decisions import Spreads, search_regret


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_search_with_early_stopping_finds_no_worse_at_equal_cost(sampler: str) -> None:
    spreads, searches = Spreads(seeds=1.0), range(5)
    without, asha = (
        statistics.mean(search_regret(sampler, kind, each, spreads, configurations=16) for each in searches)
        for kind in ("none", "asha")
    )
    assert asha < without
