"""Stop requests: they interrupt the driver that holds the lock, and only that one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ebft_study.storage import StoragePath, storage_path
from ebft_study.study.folder import stop_request
from tests.test_interruption import PREPARING, STUDY

DRIVER = """
import sys, threading
from ebft_study.storage import storage_path
from ebft_study.study.folder import lock, stop_request
folder = storage_path(sys.argv[1])
try:
    with lock.hold(folder, record="study.yaml"), stop_request.heeded(folder, print):
        print("held", flush=True)
        threading.Event().wait()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_request, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(stop_request, "STORE_LOOK_SECONDS", 0.02)


@pytest.fixture(params=["disk", "store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> StoragePath:
    if request.param == "disk":
        return storage_path(tmp_path)
    query = request.getfixturevalue("s3_query")
    return storage_path(f"s3://studies/{request.node.originalname}?{query}")


def interrupted_main(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when the main thread, which is the tests' own, would be interrupted."""
    interrupted = threading.Event()
    monkeypatch.setattr(stop_request, "_interrupt", interrupted.set)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)
    return interrupted


def test_a_request_interrupts_and_is_told(folder: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted, said = interrupted_main(monkeypatch), list[str]()
    with stop_request.heeded(folder, said.append):
        stop_request.ask(folder)
        assert interrupted.wait(60)
    assert len(said) == 1
    assert os.uname().nodename in said[0]
    assert not (folder / stop_request.NAME).exists()


def test_a_request_to_an_earlier_driver_does_not_count(folder: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted = interrupted_main(monkeypatch)
    stop_request.ask(folder)
    with stop_request.heeded(folder, print):
        assert not (folder / stop_request.NAME).exists()
    assert not interrupted.is_set()


def test_a_request_waits_for_a_process_that_ignores_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As jobs do that a shell runs in the background, until their study has begun."""
    interrupted, looked = interrupted_main(monkeypatch), threading.Semaphore(0)

    def ignores(number: int) -> object:
        looked.release()
        return handler[0]

    handler: list[object] = [signal.SIG_IGN]
    monkeypatch.setattr(signal, "getsignal", ignores)
    with stop_request.heeded(storage_path(tmp_path), print):
        stop_request.ask(storage_path(tmp_path))
        for _ in range(3):
            assert looked.acquire(timeout=60)
        assert not interrupted.is_set()
        handler[0] = signal.default_int_handler
        assert interrupted.wait(60)


def test_a_driver_in_another_process_is_interrupted_while_it_waits(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "held\n"
        stop_request.ask(storage_path(tmp_path))
        assert "ebft-study stop" in driver.stdout.readline()
        assert driver.stdout.readline() == "interrupted\n"


def test_the_command_stops_a_study_and_shows_its_end(tmp_path: Path) -> None:
    """While its data and models are prepared; a session has Ctrl-C's own handler."""
    (tmp_path / "s.yaml").write_text(STUDY)
    from ebft_study.study.folder import study_yaml
    from ebft_study.study.resolving.study_file import load_study

    study = load_study(tmp_path / "s.yaml", None, [])
    (tmp_path / "studies" / "s").mkdir(parents=True)
    study_yaml.write(tmp_path / "studies" / "s", study.spec, study.source, provenance={})
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, "-c", PREPARING, "resume", "s"],
        cwd=tmp_path,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **streams,
    ) as driver:
        assert driver.stdout is not None
        while (line := driver.stdout.readline()).strip() != "BLOCKED":
            assert line, driver.communicate()[1]
        command = [sys.executable, "-m", "ebft_study", "stop", "s"]
        stopped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        out, errors = driver.communicate(timeout=300)
    assert driver.returncode == 130, errors
    assert "as 'ebft-study stop' asked" in out
    assert stopped.returncode == 0, stopped.stderr
    assert "waiting for its end" in stopped.stdout
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert again.returncode == 2
    assert "nobody is running this study" in again.stderr
