"""Ends a driver whose cluster has ended: its calls to Ray block until Ray ends the process without a message.

driver thread   Tuner.fit() ... waits for an answer of the cluster that never comes
watchdog        connects to the cluster's processes now and then; when they are gone: asks the driver to stop,
                gives it a moment, then does what has to be done before the end, and ends the process
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

from ebft_study.study.cluster.own import kill_processes

CLUSTER_GONE = "the Ray cluster cannot be reached"
Address = tuple[str, int]

_EVERY_SECONDS, _CONNECT_SECONDS = 3.0, 2.0
_GONE_SECONDS, _OWN_GONE_SECONDS = 20.0, 6.0
"""A head that is restarted needs some time; that of our own is not. Ray itself gives up after 60 seconds."""
_GRACE_SECONDS = 10.0


class Watchdog:
    """Watches the addresses of processes that a driver cannot do without."""

    def __init__(
        self,
        addresses: Sequence[Address],
        *,
        gone: Callable[[], None],
        end: Callable[[], None],
        gone_seconds: float = _GONE_SECONDS,
        every_seconds: float = _EVERY_SECONDS,
        grace_seconds: float = _GRACE_SECONDS,
    ) -> None:
        """
        Args:
            gone: called when one of them has not been there for `gone_seconds`.
            end: called when the driver has not ended `grace_seconds` later; does not return.
        """
        self._addresses, self._gone, self._end = addresses, gone, end
        self._tries = max(1, round(gone_seconds / every_seconds))
        self._every, self._grace = every_seconds, grace_seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        missed = 0
        while missed < self._tries:
            if self._over.wait(self._every):
                return
            missed = 0 if all(map(is_there, self._addresses)) else missed + 1
        self._gone()
        if not self._over.wait(self._grace):
            self._end()


def is_there(address: Address) -> bool:
    """Whether anyone listens."""
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=_CONNECT_SECONDS):
        return True
    return False


@contextlib.contextmanager
def watching_the_cluster(gone: Callable[[], None], last_words: Callable[[], None], *, is_own: bool) -> Iterator[None]:
    """Context in which the process ends with exit code 1 soon after the connected Ray cluster has ended.

    Args:
        is_own: the cluster was started by this process, which ends what is left of it.
    """
    import ray

    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    addresses = [(host.strip("[]"), int(port))]
    if not is_own:  # `own.node_is_alive` looks at the process instead
        here = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
        addresses.append((here["NodeManagerAddress"], here["NodeManagerPort"]))

    def end() -> None:
        try:
            last_words()
            if is_own:
                kill_processes()
        finally:
            os._exit(1)  # other threads of this process wait for the cluster

    with Watchdog(addresses, gone=gone, end=end, gone_seconds=_OWN_GONE_SECONDS if is_own else _GONE_SECONDS):
        yield
