"""A study on a cluster of two machines that was there before, through the command line."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ebft_study import results

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

HERE = Path(__file__).parent
STUDY = """
study: guest
question: Does it run on other people's machines?
run: {steps: 2, weight_decay: 0.05, checkpoint_every_steps: 1, log_every_steps: 1, features: {backend: local}}
axes: {learning_rate: [0.5, 1.0]}
resources: {workers_per_trial: 0, by: {learning_rate: {0.5: {workers_per_trial: 2}}}}
"""
OF_RAY = {"_AutoscalingCoordinatorActor"}
"""Ray Train starts it once per cluster, without resources, and leaves it there."""


@dataclass
class Guest:
    """What a study printed, and the cluster that it ran on."""

    folder: Path
    said: str
    exit_code: int
    address: str


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    own = {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}", "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token"}
    own["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    own["EBFT_STUDY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return {**{k: v for k, v in os.environ.items() if not k.startswith("RAY_")}, **own}


@pytest.fixture(scope="module")
def address(environment: dict[str, str]) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, str(HERE / "cluster.py")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    yield process.stdout.readline().strip()
    process.stdin.close()
    process.wait(timeout=600)
    process.stdout.close()


@pytest.fixture(scope="module")
def guest(address: str, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Guest:
    cwd = tmp_path_factory.mktemp("guest")
    (cwd / "study.yaml").write_text(STUDY)
    command = [sys.executable, str(HERE / "driver.py"), "study", "study.yaml", "--address", address]
    ran = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=2500)
    return Guest(cwd / "studies" / "guest", ran.stdout + ran.stderr, ran.returncode, address)


def test_trials_without_workers_and_with_two_run_on_a_cluster_that_was_there(guest: Guest) -> None:
    trials = results.read_table(guest.folder, "trials")
    assert list(trials["status"]) == ["finished"] * 2, guest.said
    assert guest.exit_code == 0
    assert trials["host"].notna().all()
    # The first trial takes both machines, so the other one waits for its end.
    assert trials["started_at"][1] >= trials["finished_at"][0]


def test_the_cluster_outlives_the_study_and_nothing_of_it_is_left(guest: Guest, environment: dict[str, str]) -> None:
    program = (
        "import sys, json, ray\n"
        "from ray._private.worker import get_dashboard_url\n"
        "from ray.util.state import list_actors, list_placement_groups\n"
        "ray.init(address=sys.argv[1], log_to_driver=False)\n"
        "there = 'http://' + get_dashboard_url()\n"
        "actors = [a.class_name for a in list_actors(address=there) if a.state != 'DEAD']\n"
        "groups = [g.state for g in list_placement_groups(address=there) if g.state != 'REMOVED']\n"
        "print(json.dumps([actors, groups, ray.available_resources().get('CPU')]))\n"
    )
    left = None
    for _ in range(10):  # what Ray frees it frees in the background
        command = [sys.executable, "-c", program, guest.address]
        asked = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        actors, groups, cpus = json.loads(asked.stdout.strip().splitlines()[-1])
        left = (set(actors) - OF_RAY, groups, cpus)
        if left == (set(), [], 2.0):
            break
        time.sleep(1)
    assert left == (set(), [], 2.0)


def test_a_cluster_of_its_own_is_told_from_another_one_by_its_processes(address: str) -> None:
    program = (
        "import ray\n"
        "from ebft_study.study.cluster import own as cluster\n"
        "cluster.set_environment()\n"
        "def actors():\n"
        "    from ray.util.state import list_actors\n"
        "    return [actor.class_name for actor in list_actors()]\n"
        "with cluster.running(namespace='own', slots=1, dashboard=True):\n"
        "    print('actors:', ray.get(ray.remote(num_cpus=0)(actors).remote()))\n"
    )
    asked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=1200)
    assert asked.stdout.strip() == "actors: []", asked.stderr
