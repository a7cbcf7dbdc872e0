"""Large trials among small ones, by simulating the clock: who waits how long."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest

from ebft_study.study.folder.trial_states import TrialResult
from ebft_study.study.search.listed import Admission, ListedSearch, Search

GPUS = 8


def trial(number: int, gpus: int, seconds: float) -> Any:
    return SimpleNamespace(trial_id=f"t{number:04d}", gpus=gpus, seconds=seconds)


class WhateverFits:
    """What Ray does: any trial that waits may take what is free."""

    def __init__(self, waiting: Sequence[Any]) -> None:
        self._waiting, self._free, self._gpus = list(waiting), GPUS, {}

    def next(self) -> Any:
        found = next((trial for trial in self._waiting if trial.gpus <= self._free), None)
        if found is not None:
            self._waiting.remove(found)
            self._free -= found.gpus
            self._gpus[found.trial_id] = found.gpus
        return found

    def ended(self, trial_id: str, trial_result: TrialResult) -> None:
        self._free += self._gpus.pop(trial_id)

    @property
    def exhausted(self) -> bool:
        return not self._waiting


def starts(search: Search) -> tuple[dict[str, float], float]:
    """When each trial starts, and when the last one ends; never more than `GPUS` are in use."""
    now, running, begun = 0.0, [], {}
    while running or not search.exhausted:
        while (found := search.next()) is not None:
            begun[found.trial_id] = now
            heapq.heappush(running, (now + found.seconds, found.trial_id, found.gpus))
        assert sum(gpus for _, _, gpus in running) <= GPUS
        now, trial_id, _ = heapq.heappop(running)
        search.ended(trial_id, TrialResult("finished"))
    return begun, now


def study(large_at: int) -> list[Any]:
    """100 trials of one GPU and of lengths that never end together, with one of four GPUs among them."""
    small = [trial(number, 1, 10 + number * 0.37 % 1.0) for number in range(100)]
    return [*small[:large_at], trial(999, 4, 40.0), *small[large_at:]]


@pytest.mark.parametrize("large_at", [1, 8, 50, 100])
def test_a_large_trial_waits_for_no_more_than_the_trials_that_run(large_at: int) -> None:
    trials = study(large_at)
    begun, end = starts(Admission(ListedSearch(trials), lambda trial: Fraction(trial.gpus, GPUS)))
    assert len(begun) == 101
    # Its turn comes when the trial before it has started; no trial that runs then takes longer than 11 s.
    turn = max(begun[trial.trial_id] for trial in trials[:large_at])
    assert begun["t0999"] <= turn + 11
    assert end < 1.3 * sum(trial.gpus * trial.seconds for trial in trials) / GPUS


def test_what_ray_would_do_lets_it_wait_for_all_small_ones() -> None:
    begun, _ = starts(WhateverFits(study(8)))
    assert begun["t0999"] > 110  # after the last of the hundred has started


def test_trials_of_one_size_fill_all_places() -> None:
    trials = [trial(number, 2, 10.0) for number in range(8)]
    begun, end = starts(Admission(ListedSearch(trials), lambda trial: Fraction(trial.gpus, GPUS)))
    assert sorted(begun.values()) == [0.0] * 4 + [10.0] * 4
    assert end == 20.0


def test_a_trial_of_all_machines_is_alone() -> None:
    trials = [trial(0, 1, 5.0), trial(1, 8, 5.0), trial(2, 1, 5.0)]
    begun, _ = starts(Admission(ListedSearch(trials), lambda trial: Fraction(trial.gpus, GPUS)))
    assert begun == {"t0000": 0.0, "t0001": 5.0, "t0002": 10.0}
