"""Asking the driver of a study to stop, from any machine that sees the study's folder.

The request is a file of the study. Its driver looks for one every few seconds, and takes it for Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

from ebft_study.errors import StorageError
from ebft_study.storage import StoragePath
from ebft_study.study.folder.background import in_background

NAME = ".stop"
LOOK_SECONDS, STORE_LOOK_SECONDS = 1.0, 5.0


def ask(folder: StoragePath) -> None:
    """Ask the driver that holds the study's lock to stop."""
    (folder / NAME).write_bytes(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())


@contextlib.contextmanager
def heeded(folder: StoragePath, tell: Callable[[str], None]) -> Iterator[None]:
    """Context in which a request to stop interrupts the main thread as Ctrl-C does.

    Only for the driver that holds the study's lock: requests to those before it do not count.

    Args:
        tell: called with a line that says who has asked.
    """
    path, seconds = folder / NAME, LOOK_SECONDS if folder.local else STORE_LOOK_SECONDS

    def look(over: threading.Event) -> None:
        while not over.wait(seconds):
            if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's background job, until it runs trials
                continue
            with contextlib.suppress(StorageError, FileNotFoundError):
                tell(f"stopping, as 'ebft-study stop' asked on {_host(path.read_bytes())}")
                _interrupt()
                return

    path.delete()
    try:
        with in_background(look, name="stop request"):
            yield
    finally:
        with contextlib.suppress(StorageError):
            path.delete()


def _host(content: bytes) -> str:
    try:
        return str(json.loads(content)["host"])
    except (ValueError, KeyError, TypeError):
        return "another machine"


def _interrupt() -> None:
    """A real signal ends what the main thread waits for."""
    identifier = threading.main_thread().ident
    assert identifier is not None
    signal.pthread_kill(identifier, signal.SIGINT)
