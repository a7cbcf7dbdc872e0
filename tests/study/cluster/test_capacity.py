"""Counting the trials that fit: against enumeration, and by what Ray can give out."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import pytest
from ray._private import utils

from ebft_study.study.cluster import capacity as capacities
from ebft_study.study.cluster.capacity import ClusterCapacity, Node
from ebft_study.study.cluster.requests import ResourceRequest, shared_gpus
from tests.studies import resolved


def capacity(*nodes: tuple[float, float]) -> ClusterCapacity:
    return ClusterCapacity(tuple(Node(cpus, gpus) for cpus, gpus in nodes))


@pytest.mark.parametrize(
    ("need", "nodes", "expected"),
    [
        (ResourceRequest(1, 1), [(2, 0)], 2),
        (ResourceRequest(2, 2), [(4, 0)], 1),
        (ResourceRequest(1, 4), [(6, 0), (6, 0)], 2),  # 12 cores hold three in sum, but no process is on two machines
        (ResourceRequest(4, 1, 1.0), [(64, 8), (64, 8)], 4),
        (ResourceRequest(16, 1, 1.0), [(64, 8), (64, 8)], 1),  # one trial over both machines
        (ResourceRequest(1, 1, 0.6), [(64, 8)], 8),  # two halves of different GPUs are no GPU
        (ResourceRequest(1, 1, 0.25), [(64, 2)], 8),
        (ResourceRequest(1, 1, 2.0), [(64, 3)], 1),
        (ResourceRequest(1, 16, 1.0), [(64, 8)], 4),  # cores are what is short
        (ResourceRequest(1, 1, 1.0, engine_gpus=1.0), [(64, 8)], 4),
        (ResourceRequest(1, 1, 1.0), [(64, 0)], 0),
    ],
)
def test_trials_side_by_side(need: ResourceRequest, nodes: list[tuple[float, float]], expected: int) -> None:
    assert need.fit(capacity(*nodes)) == expected
    assert need.share(capacity(*nodes)) == Fraction(1, max(1, expected))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1),
        ({"cpu.max": "300000 100000\n"}, 3),
        ({"cpu.max": "6400000 100000\n"}, 4),  # no more than the process is bound to
        ({"cpu.max": "max 100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu.max": "50000 100000\n"}, 1),  # Ray rounds it to none
        ({}, 4),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # Ray's
def test_the_quota_of_a_container_counts_as_ray_counts_it(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)))
    monkeypatch.setattr(capacities, "_CGROUP", tmp_path)
    assert capacities.cpu_count() == expected
    paths = [str(tmp_path / name) for name in ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us", "cpuset", "cpu.max")]
    rays = utils._get_docker_cpus(*paths)
    assert expected == max(1, min(4, int(rays if rays is not None else 4)))


def test_services_take_whole_gpus_of_the_largest_machines() -> None:
    left = capacity((8, 2), (8, 4)).without_gpus(1.5)
    assert sorted(node.gpus for node in left.nodes) == [2, 2]
    assert left.cpus == 16
    assert capacity((8, 1)).without_gpus(3).gpus == 0


def test_trials_that_can_share_an_engine_need_one_set_of_gpus() -> None:
    """Engines differ by model and by what they reserve; how long a trial waits and its longest request are its own."""
    content = {
        "study": "s",
        "question": "?",
        "run": {"rollout_backend": "vllm", "engine_scope": "study", "tensor_parallel_size": 2},
        "resources": {"gpus_per_worker": 1},
    }
    for axis, values, expected in (
        ("longest_request_tokens", [200, 300], 2),
        ("engine_timeout_seconds", [100, 200], 2),
        ("gpu_memory_utilization", [0.2, 0.3], 4),
    ):
        trials = resolved({**content, "axes": {axis: values}}, capacity((64, 8))).trials
        assert shared_gpus(trials[0].resources, trials) == expected, axis


def test_the_smallest_kind_decides_how_many_run_at_most() -> None:
    content = {
        "study": "s",
        "question": "?",
        "axes": {"alpha": [0.0, 1.0]},
        "resources": {"gpus_per_worker": 1, "by": {"alpha": {"1.0": {"workers_per_trial": 4}}}},
    }
    assert resolved(content, capacity((64, 8))).concurrency == 8
    assert resolved(content, capacity((64, 0))).concurrency == 1
    assert resolved({**content, "budget": {"max_concurrent_trials": 3}}, capacity((64, 8))).concurrency == 3
