"""A hub that does not answer costs seconds, and one line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from ebft_study import hub


@pytest.fixture
def silent() -> Iterator[tuple[str, list[object]]]:
    """The address of a server that takes connections and says nothing, and the connections that it took."""
    taken: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def take() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", taken
        server.shutdown(socket.SHUT_RDWR)
    for connection in taken:
        connection.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "words"),
    [("model: some/model\ndataset: DATA\n", "model 'some/model'"), ("dataset: some/data\n", "data set 'some/data'")],
    ids=["model", "data"],
)
def test_a_silent_hub_is_asked_once_and_told_in_one_line(
    tmp_path: Path, silent: tuple[str, list[object]], settings: str, words: str
) -> None:
    address, taken = silent
    (tmp_path / "data.jsonl").write_text('{"text": "one two three"}\n')
    (tmp_path / "run.yaml").write_text(settings.replace("DATA", str(tmp_path / "data.jsonl")) + "steps: 1\n")
    environment = {key: value for key, value in os.environ.items() if key != hub.OFFLINE}
    environment |= {
        "HF_ENDPOINT": address,
        "EBFT_STUDY_CACHE": str(tmp_path / "cache"),
        "HF_HOME": str(tmp_path / "hf"),
    }
    ran = subprocess.run(
        [sys.executable, "-m", "ebft_study", "train", "run.yaml"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 2
    assert words in ran.stderr
    assert len(ran.stderr.splitlines()) == 1, ran.stderr
    assert len(taken) == 1


def test_a_hub_that_refuses_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forbidden(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(403)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.delenv(hub.OFFLINE, raising=False)
    with HTTPServer(("127.0.0.1", 0), Forbidden) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        hub.settle()
        server.shutdown()
    assert hub.OFFLINE not in os.environ


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch, silent: tuple[str, list[object]]) -> None:
    monkeypatch.setenv("HF_ENDPOINT", silent[0])
    monkeypatch.setenv(hub.OFFLINE, "0")
    hub.settle()
    assert os.environ[hub.OFFLINE] == "0"
    assert not silent[1]
