"""An existing Ray cluster that a study uses, and that outlives it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ebft_study.errors import ConfigError, rule_broken
from ebft_study.paths import cache_folder
from ebft_study.study.cluster.capacity import ClusterCapacity, Node
from ebft_study.study.cluster.own import ENVIRONMENT, dashboard_line, keeping_sigterm, set_environment

OPTION = "--address"
TRIAL_PROCESS_BYTES = 512 * 2**20
"""Memory of a trial's own process and its Train controller, which Ray reserves on a machine."""
_MOST_MEMORY = 0.5
"""Fraction of the machines' memory that may be reserved: trials on small machines, and other users, need some."""
_TRAVELS = ("PYTHONPATH", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "TOKENIZERS_PARALLELISM", "EBFT_STUDY_CACHE", "HF_HOME")
"""Variables that workers get from the driver. No tokens: Ray shows a job's environment to all; nodes have their own."""
_OFFLINE_TRAVELS = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_MODE", "WANDB_DIR")
_START_SECONDS = 1800  # until a group of workers has its machines: other people's jobs, machines that have yet to boot
_PROBE_SECONDS, _PATIENCE_SECONDS = 120.0, 10.0


def address_of(given: str | None) -> str | None:
    """The cluster to use: the given one, else the one that `ray job submit` and RAY_ADDRESS name; None for none.

    Raises:
        ConfigError: an address of Ray Client, through which Tune would not run in this process.
    """
    address = given or os.environ.get("RAY_ADDRESS") or None
    if address in (None, "local"):
        return None
    if "://" in address:
        raise rule_broken(
            source="command line" if given else "environment",
            key=OPTION if given else "RAY_ADDRESS",
            given=address,
            rule="a study's driver must run on a machine of the cluster",
            remedy="Run it there with --address auto, or send it: ray job submit --address http://<head>:8265 -- "
            "ebft-study study ...",
        )
    return address


@contextlib.contextmanager
def connection(address: str | None, *, study: str) -> Iterator[ClusterCapacity | None]:
    """Connect to the cluster at `address`, if there is one to use; yields its machines, or None.

    Afterwards nothing of the study is left on the cluster, which continues to run.
    """
    address = address_of(address)
    if address is None:
        yield None
        return
    import ray

    set_environment()
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")  # the job's own environment stays, with ours added
    try:
        with keeping_sigterm():
            ray.init(
                address=address,
                # Two studies of one name may run on one cluster.
                namespace=f"ebft-{study}-{secrets.token_hex(3)}",
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": _environment()},
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise rule_broken(
            source="command line",
            key=OPTION,
            given=address,
            rule=f"no Ray cluster that this machine belongs to ({reason})",
            remedy="Start one here (ray start --head), add this machine to one (ray start --address=...), or use "
            "ray job submit. A cluster that requires a token accepts --address auto, or with RAY_AUTH_MODE=token",
        ) from None
    try:
        yield _capacity()
    finally:
        ray.shutdown()


def _environment() -> dict[str, str]:
    """Variables of the driver that its trials need too, and those of Ray with our defaults."""
    defaults = {name: value for name, value in ENVIRONMENT.items() if "TRAIN" in name or "CHDIR" in name}
    defaults["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(_START_SECONDS)
    names = (*_TRAVELS, *_OFFLINE_TRAVELS, *defaults)
    return defaults | {name: os.environ[name] for name in names if name in os.environ}


def _capacity() -> ClusterCapacity:
    """Resources of the alive nodes of the cluster, those in use included."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = (Node(r.get("CPU", 0.0), r.get("GPU", 0.0), r.get("memory", 0.0)) for r in alive)
    return ClusterCapacity(tuple(nodes), is_existing=True)


def trial_request(capacity: ClusterCapacity, concurrency: int) -> dict[str, float]:
    """The resources that Tune reserves for a trial's process, whose workers reserve their own CPUs and GPUs.

    Memory, which every Ray node declares by itself: Ray chooses the machine with the most of it left, so that
    trials' processes spread out; and a reservation binds nothing, so that it takes nothing from the workers.
    """
    room = _MOST_MEMORY * sum(node.memory_bytes for node in capacity.nodes) / concurrency
    smallest = min(node.memory_bytes for node in capacity.nodes)
    return {"memory": float(max(1, int(min(TRIAL_PROCESS_BYTES, room, smallest))))}


# --- checks --------------------------------------------------------------------------------------------------


def check(folder: Path | None, *, needs_dashboard: bool) -> None:
    """Find out before anything starts whether every machine has this package and sees the study and the cache.

    Args:
        folder: of the study; None where it is in a store.
        needs_dashboard: Ray frees the workers of stopped trials only after asking the dashboard about them.

    Raises:
        ConfigError: one has not, in one line that says which and what to do.
    """
    if needs_dashboard and not dashboard_line():
        raise ConfigError(
            f"{OPTION}: the cluster has no dashboard, without which Ray does not free the workers of stopped trials. "
            "Start its head without --include-dashboard=false, or use resources.workers_per_trial: 0"
        )
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    folders = [path for path in (folder, cache_folder()) if path]
    with contextlib.ExitStack() as probes:
        files = [str(probes.enter_context(_probe(path))) for path in folders]
        nodes = [node for node in ray.nodes() if node["Alive"]]
        look = ray.remote(num_cpus=0, max_retries=1)(_look)
        strategies = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
        asked = [look.options(scheduling_strategy=strategy).remote(files) for strategy in strategies]
        for node, reference in zip(nodes, asked, strict=True):
            _check_answer(node["NodeManagerAddress"], _answer(reference), folders)


@contextlib.contextmanager
def _probe(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".probe-{secrets.token_hex(6)}"
    path.write_text(socket.gethostname())
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _look(files: Sequence[str]) -> dict[str, Any]:
    """Check one machine; runs as a task on each."""
    # Folders on a network show what others wrote only after a moment; listing the folder makes most of them look.
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (missing := [file for file in files if not os.path.exists(file)]) and time.monotonic() < deadline:
        for file in missing:
            with contextlib.suppress(OSError):
                os.listdir(os.path.dirname(file))
        time.sleep(0.5)
    return {"host": socket.gethostname(), "version": importlib.metadata.version("ebft-study"), "missing": missing}


def _answer(reference: Any) -> dict[str, Any] | str:
    import ray

    try:
        return dict(ray.get(reference, timeout=_PROBE_SECONDS))
    except (ray.exceptions.RayError, ImportError) as error:
        return next((line for line in reversed(str(error).strip().splitlines()) if line.strip()), type(error).__name__)


def _check_answer(address: str, answer: dict[str, Any] | str, folders: Sequence[Path]) -> None:
    here = importlib.metadata.version("ebft-study")
    if isinstance(answer, str) or answer["version"] != here:
        difference = answer.strip() if isinstance(answer, str) else f"it has {answer['version']}"
        raise ConfigError(
            f"{OPTION}: machine {address} of the cluster cannot run ebft-study {here} ({difference}). Install the same "
            "environment on every machine, or put the package on a shared folder that PYTHONPATH names"
        )
    for folder in folders:
        if any(Path(missing).parent == folder for missing in answer["missing"]):
            what = "the cache" if folder == cache_folder() else "the study's folder"
            remedy = "EBFT_STUDY_CACHE" if folder == cache_folder() else "--storage"
            raise ConfigError(
                f"{folder}: {what} is not visible on machine {answer['host']} ({address}) of the cluster. "
                f"Use a folder that all machines share (NFS, or s3:// for studies): {remedy}"
            )
