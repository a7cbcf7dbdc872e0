"""Counting places: against enumeration, and by what Ray can give out."""

from __future__ import annotations

from fractions import Fraction

import pytest

from ebft_study.study.cluster.capacity import Machines, Node
from ebft_study.study.cluster.requests import Need, most


def machines(*nodes: tuple[float, float]) -> Machines:
    return Machines(tuple(Node(cpus, gpus) for cpus, gpus in nodes))


@pytest.mark.parametrize(
    ("need", "nodes", "expected"),
    [
        (Need(1, 1), [(2, 0)], 2),
        (Need(2, 2), [(4, 0)], 1),
        (Need(1, 4), [(6, 0), (6, 0)], 2),  # 12 cores hold three in sum, but no process is on two machines
        (Need(4, 1, 1.0), [(64, 8), (64, 8)], 4),
        (Need(16, 1, 1.0), [(64, 8), (64, 8)], 1),  # one trial over both machines
        (Need(1, 1, 0.6), [(64, 8)], 8),  # two halves of different GPUs are no GPU
        (Need(1, 1, 0.25), [(64, 2)], 8),
        (Need(1, 1, 2.0), [(64, 3)], 1),
        (Need(1, 16, 1.0), [(64, 8)], 4),  # cores are what is short
        (Need(1, 1, 1.0, engine_gpus=1.0), [(64, 8)], 4),
        (Need(1, 1, 1.0), [(64, 0)], 0),
    ],
)
def test_trials_side_by_side(need: Need, nodes: list[tuple[float, float]], expected: int) -> None:
    assert need.fit(machines(*nodes)) == expected
    assert need.share(machines(*nodes)) == Fraction(1, max(1, expected))


def test_services_take_whole_gpus_of_the_largest_machines() -> None:
    left = machines((8, 2), (8, 4)).without_gpus(1.5)
    assert sorted(node.gpus for node in left.nodes) == [2, 2]
    assert left.cpus == 16
    assert machines((8, 1)).without_gpus(3).gpus == 0


def test_the_smallest_kind_decides_how_many_run_at_most() -> None:
    assert most([Need(1, 1, 1.0), Need(4, 1, 1.0)], machines((64, 8))) == 8
    assert most([], machines((64, 8))) == 1
    assert most([Need(1, 1, 1.0)], machines((64, 0))) == 1
