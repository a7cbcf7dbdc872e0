"""A driver's end when its cluster is gone, with a plain server in the place of the cluster."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

from ebft_study.study.cluster.watchdog import Watchdog, is_there


@contextlib.contextmanager
def listening(port: int = 0) -> Iterator[tuple[str, int]]:
    with socket.create_server(("127.0.0.1", port)) as server:
        host, port = server.getsockname()
        yield host, port


def watchdog(address: tuple[str, int], said: list[str], ended: threading.Event) -> Watchdog:
    def end() -> None:
        said.append("end")
        ended.set()

    return Watchdog(
        [address],
        gone=lambda: said.append("gone"),
        end=end,
        gone_seconds=0.2,
        every_seconds=0.05,
        grace_seconds=0.05,
    )


def test_an_address_is_there_while_someone_listens() -> None:
    with listening() as address:
        assert is_there(address)
    assert not is_there(address)


def test_a_driver_that_waits_for_a_cluster_that_is_gone_is_ended() -> None:
    said, ended = [], threading.Event()
    with listening() as address:
        dog = watchdog(address, said, ended).__enter__()
        assert not ended.wait(0.4)
    assert ended.wait(5)
    assert said == ["gone", "end"]
    dog.__exit__()


def test_a_short_absence_is_forgiven() -> None:
    said: list[str] = []
    ended = threading.Event()
    with listening() as address:
        dog = watchdog(address, said, ended).__enter__()
    time.sleep(0.1)
    with listening(address[1]):
        assert not ended.wait(0.5)
        dog.__exit__()
    assert said == []


def test_a_driver_that_ends_by_itself_is_left_alone() -> None:
    said: list[str] = []
    ended = threading.Event()
    with listening() as address, watchdog(address, said, ended):
        pass
    assert not ended.wait(0.6)
    assert said == []
