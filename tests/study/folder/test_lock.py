"""The lock of a study: who holds it; in a store: owners, heartbeats, and taking a stale lock over."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest

from ebft_study.errors import ResultsError
from ebft_study.storage import StoragePath, storage_path
from ebft_study.study.folder import lock

RECORD = "study.yaml"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)


@pytest.fixture
def folder(s3_query: str, request: pytest.FixtureRequest) -> StoragePath:
    return storage_path(f"s3://studies/{request.node.name}?{s3_query}")


def owner(**changes: object) -> bytes:
    content = {"token": "other", "pid": 1, "host": "far", "machine": "another", "time": "2020-01-01T00:00:00+00:00"}
    return json.dumps({**content, **changes}).encode()


# --- on a disk -------------------------------------------------------------------------------------------------


def test_looking_at_a_lock_does_not_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of drivers that started while `status` looked, some were refused."""
    folder = storage_path(tmp_path)

    def take(*_: object, **__: object) -> None:
        raise AssertionError("the lock was taken")

    with lock.hold(folder, record=RECORD):
        monkeypatch.setattr(filelock.FileLock, "acquire", take)
        assert lock.is_held(folder)
    before = sorted(tmp_path.iterdir())
    assert not lock.is_held(folder)
    assert not lock.is_held(folder / "nothing")
    assert sorted(tmp_path.iterdir()) == before


def test_a_killed_driver_holds_nothing(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom ebft_study.storage import storage_path\nfrom ebft_study.study.folder import lock\n"
        "with lock.hold(storage_path(sys.argv[1]), record='study.yaml'):\n    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "held\n"
        assert lock.is_held(storage_path(tmp_path))
        driver.kill()
    assert not lock.is_held(storage_path(tmp_path))
    with lock.hold(storage_path(tmp_path), record=RECORD):
        assert lock.is_held(storage_path(tmp_path))


def test_a_driver_on_another_machine_is_known_by_its_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines see one folder, and no process of the other's."""
    folder = storage_path(tmp_path)
    with lock.hold(folder, record=RECORD):
        first = (tmp_path / lock.OWNER).read_bytes()
        here, elsewhere = lock._machine(), "another"
        monkeypatch.setattr(lock, "_machine", lambda: elsewhere)
        assert lock.is_held(folder)
        deadline = time.monotonic() + 100
        while (tmp_path / lock.OWNER).read_bytes() == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        monkeypatch.setattr(lock, "_machine", lambda: here)
    (tmp_path / lock.OWNER).write_bytes(owner(machine="another", time="2020-01-01T00:00:00+00:00"))
    assert not lock.is_held(folder)


# --- in a store ------------------------------------------------------------------------------------------------


def test_a_second_driver_is_refused_with_the_name_of_the_first(folder: StoragePath) -> None:
    (folder / lock.NAME).write_bytes(owner())
    with pytest.raises(ResultsError, match=r"another process is running this study .process 1 on far"):
        lock.hold(folder, record=RECORD).__enter__()


def test_the_lock_is_released(folder: StoragePath) -> None:
    with lock.hold(folder, record=RECORD):
        assert lock.is_held(folder)
        with pytest.raises(ResultsError), lock.hold(folder, record=RECORD):
            pass
    assert not lock.is_held(folder)
    assert folder.names() == []


def test_a_stale_lock_is_taken_over(folder: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / lock.NAME).write_bytes(owner())
    time.sleep(2.1)  # the store counts whole seconds
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.0)
    with lock.hold(folder, record=RECORD) as handle:
        assert not handle.lost


def test_the_lock_of_a_process_of_this_machine_that_has_ended_is_taken_over_immediately(folder: StoragePath) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (folder / lock.NAME).write_bytes(owner(pid=gone.pid, machine=lock._machine()))
    assert not lock.is_held(folder)
    with lock.hold(folder, record=RECORD):
        pass


def test_heartbeats_are_measured_by_the_clock_of_the_store_alone(
    folder: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner's clock is years behind, and so is what it wrote."""
    (folder / lock.NAME).write_bytes(owner(time="1990-01-01T00:00:00+00:00"))
    with pytest.raises(ResultsError, match="another process"):
        lock.hold(folder, record=RECORD).__enter__()


def test_an_owner_that_lost_the_lock_is_notified_and_does_not_touch_it(folder: StoragePath) -> None:
    with lock.hold(folder, record=RECORD) as handle:
        (folder / lock.NAME).write_bytes(owner())
        deadline = time.monotonic() + 100
        while not handle.lost:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        reasons: list[str] = []
        handle.on_lost(reasons.append)
        assert reasons == ["process 1 on far has taken this study over"]
    assert json.loads((folder / lock.NAME).read_bytes())["token"] == "other"


def test_of_two_that_begin_simultaneously_the_one_that_wrote_last_wins(
    folder: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.sleep

    def overtaken(seconds: float) -> None:
        (folder / lock.NAME).write_bytes(owner())
        real(seconds)

    monkeypatch.setattr(lock.time, "sleep", overtaken)
    with pytest.raises(ResultsError, match="began at the same moment"):
        lock.hold(folder, record=RECORD).__enter__()
    assert json.loads((folder / lock.NAME).read_bytes())["token"] == "other"


def test_a_lock_that_cannot_be_read_is_held(folder: StoragePath) -> None:
    (folder / lock.NAME).write_bytes(b"garbage")
    with pytest.raises(ResultsError, match="another process"):
        lock.hold(folder, record=RECORD).__enter__()
