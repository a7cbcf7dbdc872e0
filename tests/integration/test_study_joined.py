"""A study on a cluster of two machines that was there before, through the command line."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from ebft_study import results
from tests import commands

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


OWN = """
import json, os, signal, stat, sys
from pathlib import Path
import psutil, ray
from ebft_study.study.cluster import own, watchdog

def actors():
    from ray.util.state import list_actors
    return [actor.class_name for actor in list_actors()]

def listening():
    connections = [each for process in psutil.Process().children(recursive=True) for each in process.net_connections()]
    return sorted({each.laddr.ip.removeprefix("::ffff:") for each in connections if each.status == psutil.CONN_LISTEN})

def mode(path):
    return oct(stat.S_IMODE(os.stat(path).st_mode))

own.set_environment()
with own.running(namespace="own", slots=1, dashboard=True):
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    found = {
        "actors": ray.get(ray.remote(num_cpus=0)(actors).remote()),
        "listening": listening(),
        "folder": [mode(session.parents[1]), str(session.parents[1])],
        "token": mode(Path.home() / ".ray" / "auth_token"),
        "children": [process.pid for process in psutil.Process().children(recursive=True)],
    }
    print(json.dumps(found), flush=True)
    with watchdog.watching_the_cluster(lambda: print("gone"), lambda: print("last words", flush=True), is_own=True):
        next(p for p in psutil.Process().children(True) if p.name() == "gcs_server").kill()
        ray.get(ray.remote(num_cpus=0)(actors).remote())
"""


def test_a_cluster_of_its_own_is_nobody_elses_and_a_driver_that_loses_it_ends(address: str, tmp_path: Path) -> None:
    """Told from another cluster by its own processes, and reached by no other user or machine."""
    environment = {**os.environ, "HOME": str(tmp_path), "TMPDIR": "/tmp"}
    asked = subprocess.run([sys.executable, "-c", OWN], capture_output=True, text=True, timeout=1200, env=environment)
    first, *said = asked.stdout.strip().splitlines()
    found = json.loads(first)
    assert found["actors"] == []
    assert found["listening"] == ["127.0.0.1"]
    assert found["folder"][0] == "0o700"
    assert found["token"] == "0o600"
    # Ray ends such a driver too, after a minute and without a word.
    assert said == ["gone", "last words"], asked.stderr
    assert asked.returncode == 1
    left = [psutil.Process(pid) for pid in found["children"] if psutil.pid_exists(pid)]
    assert not commands.outlived(left, 20)
    shutil.rmtree(found["folder"][1])
