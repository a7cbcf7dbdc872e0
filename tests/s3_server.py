"""A real S3-compatible server for tests: moto's, as a process of its own on a free port. It fails as it is told to."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from typing import Any

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = "studies"
FAULTS = "/-/faults"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def s3_server(*, bucket: str = BUCKET) -> Iterator[str]:
    """Yield the query that makes `s3://` URLs name the server, which has one bucket and is empty again at the end."""
    os.environ.update(CREDENTIALS)
    port = free_port()
    command = [sys.executable, "-m", "tests.s3_server", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, server)
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{bucket}", method="PUT")
        request.add_header("Authorization", "AWS testing:x")
        urllib.request.urlopen(request, timeout=20).close()
        yield f"endpoint_override=127.0.0.1:{port}&scheme=http"
    finally:
        server.kill()
        server.wait()


def _wait_for(port: int, server: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        assert server.poll() is None, "the S3 server ended; are moto and flask installed?"
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2):
            return
        assert time.monotonic() < deadline, "the S3 server does not answer"
        time.sleep(0.1)


def tell(query: str, prefix: str, **fault: Any) -> dict[str, int]:
    """Tell the server what to do with requests of objects below `prefix`, and forget what it was told of them before.

    `do`: `error` (500), `slow_down` (503), `lost` (the request is carried out, and its answer a 500), `reset` (the
    connection ends before), `reset_after`, `wait` (`seconds`), or ``. `at`: the first of these requests, from 1;
    `times`: how many. Returns how many were counted, and how many met the fault, until now.
    """
    address = dict(part.split("=", 1) for part in query.split("&"))["endpoint_override"]
    body = json.dumps({"prefix": prefix, **fault}).encode()
    with urllib.request.urlopen(f"http://{address}{FAULTS}", data=body, timeout=20) as answer:
        counts: dict[str, int] = json.load(answer)
    return counts


class FailingServer:
    """A WSGI application in front of moto's."""

    def __init__(self, application: Any) -> None:
        self._application, self._lock = application, threading.Lock()
        self._faults: dict[str, dict[str, Any]] = {}

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == FAULTS:
            told = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
            before = self._faults.pop(told["prefix"], {})
            self._faults[told["prefix"]] = {"do": "", "at": 1, "times": 1, "counted": 0, "fired": 0, **told}
            return _answer(start_response, "200 OK", {"counted": 0, "fired": 0, **before})
        fault = self._due(environ)
        do = fault["do"] if fault else ""
        if do == "wait":
            time.sleep(fault["seconds"])  # type: ignore[index]
        if do in ("lost", "reset_after"):
            b"".join(self._application(environ, lambda *_, **__: None))
        if do in ("reset", "reset_after"):
            connection: socket.socket = environ["werkzeug.socket"]
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.shutdown(socket.SHUT_RDWR)
            connection.close()
            raise ConnectionError
        if do in ("error", "lost"):
            return _answer(start_response, "500 Internal Server Error", {})
        if do == "slow_down":
            return _answer(start_response, "503 Slow Down", {})
        return self._application(environ, start_response)  # type: ignore[no-any-return]

    def _due(self, environ: dict[str, Any]) -> dict[str, Any] | None:
        """The fault that this request meets."""
        with self._lock:
            for prefix, fault in self._faults.items():
                below = environ["PATH_INFO"].startswith(f"/{BUCKET}/{prefix}/") or prefix in environ["QUERY_STRING"]
                if below:
                    fault["counted"] += 1
                    if fault["do"] and 0 <= fault["counted"] - fault["at"] < fault["times"]:
                        fault["fired"] += 1
                        return fault
        return None


def _answer(start_response: Any, status: str, content: dict[str, Any]) -> list[bytes]:
    body = json.dumps(content).encode()
    start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


def main(port: int) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    application = FailingServer(DomainDispatcherApplication(create_backend_app))
    run_simple("127.0.0.1", port, application, threaded=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
