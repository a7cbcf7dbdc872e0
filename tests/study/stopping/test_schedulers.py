"""Early stopping, without a cluster: each scheduler against its definition, written the slow and obvious way."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from ebft_study.study.stopping.schedulers import bracket_of, bracket_shares, rungs
from tests.contracts.schedulers import (
    STEPS,
    Curves,
    SchedulerContract,
    ends,
    random_curves,
    reports,
    scheduler_of,
    tell,
    tune_trial,
)

ASHA = {"kind": "asha", "grace_period_steps": 4, "reduction_factor": 2}
BRACKETS = {**ASHA, "brackets": 2}
HYPERBAND = {**ASHA, "kind": "hyperband"}
MEDIAN = {"kind": "median", "grace_period_steps": 4, "min_samples_required": 3}


class TestSchedulers(SchedulerContract):
    @pytest.fixture(params=[ASHA, BRACKETS, HYPERBAND, MEDIAN], ids=["asha", "brackets", "hyperband", "median"])
    def section(self, request: pytest.FixtureRequest) -> dict[str, Any]:
        return dict(request.param)


# --- definitions -----------------------------------------------------------------------------------------------


def halved(curves: Curves, seed: int, *, grace: int, factor: int) -> dict[str, int]:
    """Where trials end by successive halving: at a rung, sort who was there before, and see who is good enough."""
    at_rung: dict[int, list[float]] = {step: [] for step in range(grace, STEPS) if log_is_whole(step / grace, factor)}
    passed: dict[str, int] = {}

    def stops(trial_id: str, step: int, value: float) -> bool:
        due = [rung for rung in at_rung if passed.get(trial_id, 0) < rung <= step]
        if not due or step >= STEPS:
            return False
        passed[trial_id] = max(due)
        before = sorted(at_rung[max(due)])
        at_rung[max(due)].append(value)
        if not before:
            return False
        # The loss that a part 1/factor of them is below, between two of them where it falls between.
        low, rest = divmod((len(before) - 1) / factor, 1)
        nearest, next_one = before[int(low)], before[min(int(low) + 1, len(before) - 1)]
        return value > nearest + rest * (next_one - nearest) + 1e-12

    return followed(curves, seed, stops)


def log_is_whole(ratio: float, base: int) -> bool:
    return any(ratio == base**k for k in range(10))


def by_median(curves: Curves, seed: int, *, grace: int, samples: int) -> dict[str, int]:
    """Where trials end by the median rule."""
    seen: dict[str, dict[int, float]] = {}

    def stops(trial_id: str, step: int, value: float) -> bool:
        if step >= STEPS:
            return False
        seen.setdefault(trial_id, {})[step] = value
        others = [points for name, points in seen.items() if name != trial_id and max(points) >= step]
        means = [np.mean([v for s, v in points.items() if grace <= s <= step]) for points in others if step >= grace]
        return len(means) >= samples and min(seen[trial_id].values()) > np.median(means)

    return followed(curves, seed, stops)


def followed(curves: Curves, seed: int, stops: Any) -> dict[str, int]:
    last: dict[str, int] = {}
    source: Any = reports(curves, seed)
    report = next(source)
    while True:
        last[report[0]] = report[1]
        try:
            report = source.send(stops(*report))
        except StopIteration:
            return last


@pytest.mark.parametrize(("seed", "grace", "factor"), [(s, *c) for s in range(6) for c in ((4, 2), (2, 3), (3, 4))])
def test_asha_is_successive_halving_by_sorting(seed: int, grace: int, factor: int) -> None:
    curves = random_curves(seed)
    section = {"kind": "asha", "grace_period_steps": grace, "reduction_factor": factor}
    assert ends(scheduler_of(section), curves, seed) == halved(curves, seed, grace=grace, factor=factor)


@pytest.mark.parametrize(("seed", "grace", "samples"), [(s, *c) for s in range(6) for c in ((4, 3), (2, 1), (9, 5))])
def test_the_median_rule_is_its_definition(seed: int, grace: int, samples: int) -> None:
    curves = random_curves(seed)
    section = {"kind": "median", "grace_period_steps": grace, "min_samples_required": samples}
    assert ends(scheduler_of(section), curves, seed) == by_median(curves, seed, grace=grace, samples=samples)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("section", [BRACKETS, HYPERBAND], ids=["asha", "hyperband"])
def test_brackets_are_halved_apart_from_each_other(section: dict[str, Any], seed: int) -> None:
    """Bracket b is ASHA with its grace period multiplied b times; Hyperband's last one stops nobody."""
    curves = random_curves(seed, trials=40)
    brackets = 2 if section is BRACKETS else len(rungs(4, 2, STEPS)) + 1
    shares = bracket_shares(len(rungs(4, 2, STEPS)), brackets, 2)
    found = serial_ends(section, curves)
    for bracket in range(brackets):
        own = {name: values for name, values in curves.items() if bracket_of(name, shares) == bracket}
        grace = 4 * 2**bracket
        alone = serial_ends({**ASHA, "grace_period_steps": grace}, own) if grace < STEPS else dict.fromkeys(own, STEPS)
        assert own
        assert {name: found[name] for name in own} == alone


def serial_ends(section: dict[str, Any], curves: Curves) -> dict[str, int]:
    """Where trials end that run one after the other."""
    scheduler, last = scheduler_of(section), dict[str, int]()
    for name, values in curves.items():
        for point, value in enumerate(values):
            last[name] = 2 * point
            if tell(scheduler, tune_trial(name), 2 * point, value):
                break
    return last


def test_shares_are_hyperbands() -> None:
    """The table of Li et al. 2018 for R = 81, eta = 3: n = 81, 34, 15, 8, 5 with 4, 3, 2, 1, 0 rungs below the end."""
    assert rungs(1, 3, 81) == [1, 3, 9, 27]
    assert [round(143 * share) for share in bracket_shares(4, 5, 3)] == [81, 34, 15, 8, 5]


@pytest.mark.parametrize("first", [0, 5, 120])
def test_trials_in_a_row_are_spread_over_brackets_by_their_shares(first: int) -> None:
    shares = bracket_shares(3, 4, 3)
    for count in (10, 30, 200):
        found = Counter(bracket_of(f"t{first + number:04d}", shares) for number in range(count))
        for bracket, share in enumerate(shares):
            assert math.isclose(found[bracket], share * count, abs_tol=2.0)


def test_spreading_over_brackets_does_not_follow_the_axes() -> None:
    """Every bracket meets every value of axes of 2, 3, 4 and 5 values."""
    shares = bracket_shares(2, 3, 3)
    for period in (2, 3, 4, 5):
        met = {(bracket_of(f"t{number:04d}", shares), number % period) for number in range(120)}
        assert met == set(itertools.product(range(3), range(period)))


def test_worse_trials_are_stopped_at_a_rung() -> None:
    flat = {f"t{i:04d}": [value] * 17 for i, value in enumerate((1.0, 2.0, 0.5))}
    assert list(serial_ends(ASHA, flat).values()) == [STEPS, 4, STEPS]
