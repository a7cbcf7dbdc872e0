"""A Ray cluster on this machine, for one session of a study. `existing` connects to clusters of others."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

from ebft_study.study.cluster.capacity import cpu_count
from ebft_study.study.cluster.private_folder import private_folder

CLUSTER_DIED = "Ray's node process died"

ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # also how often a report is fetched
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process per trial, for machines that a cloud takes back
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a study mean the folder it was started from
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # Ray's own lines; the monitor reports on trials
    "RAY_USAGE_STATS_ENABLED": "0",  # opt-in only
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # one report without the objective would end the whole study
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
_OBJECT_STORE_BYTES = 200_000_000
"""Settings, reports, prompts and samples; features come on top."""
_MOST_MEMORY = 0.25
"""Fraction of the machine's memory that Ray's object store may take."""


def set_environment() -> None:
    """Set the variables that Ray reads when it is imported; those that the user has set stay."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def dashboard_line() -> str:
    """Line with the address of Ray's dashboard, if it runs."""
    from ray._private.worker import get_dashboard_url

    url = get_dashboard_url()
    return f"Ray's dashboard: http://{url}" if url else ""


def node_is_alive() -> bool:
    """Whether the process is there that this machine's part of the cluster cannot do without.

    Ray lets a driver wait for ever when it is not.
    """
    return any(_is_raylet(process) for process in psutil.Process().children(recursive=True))


def _is_raylet(process: psutil.Process) -> bool:
    try:
        return bool(process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


@contextlib.contextmanager
def running(*, namespace: str, slots: int, dashboard: bool, travelling_bytes: float = 0.0) -> Iterator[None]:
    """A cluster of this machine's resources, which ends afterwards with all its actors.

    Args:
        slots: trials that run concurrently, as the custom resource `slot`.
        travelling_bytes: size of the features that are sent at a time.
    """
    import ray

    with private_folder() as folder:
        with _known_to_its_processes(), _for_this_machine_only(), keeping_sigterm():
            ray.init(
                address="local",
                _temp_dir=str(folder),
                num_cpus=cpu_count(),
                resources={"slot": slots},
                namespace=namespace,
                include_dashboard=dashboard,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=object_store_bytes(travelling_bytes),
            )
        try:
            yield
        finally:
            ray.shutdown()


def kill_processes() -> None:
    """Kill all processes that this one has started, and those that they have."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()


def object_store_bytes(travelling_bytes: float = 0.0) -> int:
    """Size of Ray's object store, in /dev/shm: its pages are taken as they are needed."""
    most = _MOST_MEMORY * psutil.virtual_memory().total
    return int(min(_OBJECT_STORE_BYTES + travelling_bytes, max(most, _OBJECT_STORE_BYTES)))


@contextlib.contextmanager
def keeping_sigterm() -> Iterator[None]:
    """Keep this process's handler of SIGTERM, which Ray's start replaces with one that ends the process with code 15.

    Raises:
        KeyboardInterrupt: SIGTERM arrived during the start.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as ended:
        if ended.code != signal.SIGTERM:
            raise
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)


@contextlib.contextmanager
def _for_this_machine_only() -> Iterator[None]:
    """Start a cluster inside that listens on the loopback address, with a token that only this user can read."""
    from ray._private import ray_constants

    token = Path.home() / ".ray" / "auth_token"
    token.parent.mkdir(mode=0o700, exist_ok=True)
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    # Ray's switch between the address of a network and the loopback address; it ignores `_node_ip_address` for the
    # latter. This process has read it when it imported Ray, and its children will.
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _variables({name: "0"}):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        with contextlib.suppress(OSError):
            token.chmod(0o600)


@contextlib.contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for what is started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _known_to_its_processes() -> Iterator[None]:
    """Name the cluster that is started inside to its own processes.

    Ray frees the workers of a stopped trial only where it can query the State API of their cluster, which it does not
    find where the machine runs several.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with _variables({"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"127.0.0.1:{port}"}):
        yield
