"""The lock of a study: who holds it; in a store: claims, heartbeats, and taking a stale lock over."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest

from ebft_study.errors import LockLostError, ResultsError, StorageError
from ebft_study.results import StudyRecorder, fence
from ebft_study.storage import StoragePath, storage_path
from ebft_study.study.folder import lock

RECORD = "study.yaml"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_folder_that_is_gone_is_a_lost_lock_and_does_not_come_back(tmp_path: Path) -> None:
    """A deleted study, or one whose disk is unmounted, began anew in an empty folder."""
    folder = storage_path(tmp_path / "studies" / "s")
    with lock.hold(folder, record=RECORD) as handle:
        folder.local.rename(tmp_path / "elsewhere")
        wait_for_loss(handle)
        assert "is gone" in handle.lost
    assert list((tmp_path / "studies").iterdir()) == []


def test_a_lock_file_that_is_gone_is_a_lost_lock(tmp_path: Path) -> None:
    """Another driver would lock the file that it makes."""
    folder = storage_path(tmp_path)
    with lock.hold(folder, record=RECORD) as handle:
        (tmp_path / lock.NAME).unlink()
        wait_for_loss(handle)
        assert "the lock of this study is gone" in handle.lost


def test_a_disk_that_is_full_for_a_while_is_no_lost_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[StoragePath] = []

    def write(path: StoragePath, token: str) -> None:
        tried.append(path)
        raise StorageError("No space left on device")

    with lock.hold(storage_path(tmp_path), record=RECORD) as handle:
        monkeypatch.setattr(lock, "_write", write)
        while len(tried) < 3:
            time.sleep(0.02)
        assert not handle.lost


# --- in a store ------------------------------------------------------------------------------------------------


def claim(folder: StoragePath, generation: int = 1, token: str = "00000000000000aa", **changes: object) -> StoragePath:
    """The claim of another driver."""
    path = folder / fence.CLAIMS / fence.claim_name(generation, token)
    path.write_bytes(owner(token=token, **changes))
    return path


def wait_for_loss(handle: lock.LockHandle) -> None:
    deadline = time.monotonic() + 100
    while not handle.lost:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_driver_is_refused_with_the_name_of_the_first(folder: StoragePath) -> None:
    claim(folder)
    with pytest.raises(ResultsError, match=r"another process is running this study .process 1 on far"):
        lock.hold(folder, record=RECORD).__enter__()
    assert list(fence.generations(folder)) == [1]


def test_the_lock_is_released(folder: StoragePath) -> None:
    with lock.hold(folder, record=RECORD):
        assert lock.is_held(folder)
        with pytest.raises(ResultsError), lock.hold(folder, record=RECORD):
            pass
    assert not lock.is_held(folder)
    assert folder.names() == []


def test_the_claim_of_a_study_stays_and_the_next_driver_has_a_higher_number(folder: StoragePath) -> None:
    (folder / RECORD).write_bytes(b"x")
    for generation in (1, 2, 3):
        with lock.hold(folder, record=RECORD) as handle:
            assert handle.fence.generation == generation
            assert lock.is_held(folder)
        assert not lock.is_held(folder)
        assert {number: len(names) for number, names in fence.generations(folder).items()} == {generation: 1}


def test_numbers_rise_even_if_someone_removes_the_claims(folder: StoragePath) -> None:
    (folder / RECORD).write_bytes(b"x")
    with lock.hold(folder, record=RECORD) as handle:
        handle.fence.generation = 7
        handle.fence._seen = fence.now()
        StudyRecorder(folder, study="s", fence=handle.fence).trial(
            {"trial_id": "t0", "status": "running", "attempt": 0}
        )
        (folder / fence.CLAIMS).delete()
    with lock.hold(folder, record=RECORD) as handle:
        assert handle.fence.generation == 8


def test_a_stale_lock_is_taken_over(folder: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(folder, 4)
    time.sleep(2.1)  # the store counts whole seconds
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.0)
    with lock.hold(folder, record=RECORD) as handle:
        assert not handle.lost
        assert list(fence.generations(folder)) == [handle.fence.generation] == [5]


def test_the_lock_of_a_process_of_this_machine_that_has_ended_is_taken_over_immediately(folder: StoragePath) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    claim(folder, pid=gone.pid, machine=lock._machine())
    assert not lock.is_held(folder)
    with lock.hold(folder, record=RECORD):
        pass


def test_the_lock_of_an_earlier_version_counts(folder: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / lock.NAME).write_bytes(owner())
    with pytest.raises(ResultsError, match="another process"):
        lock.hold(folder, record=RECORD).__enter__()
    time.sleep(2.1)
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.0)
    with lock.hold(folder, record=RECORD):
        assert not (folder / lock.NAME).exists()


def test_heartbeats_are_measured_by_the_clock_of_the_store_alone(folder: StoragePath) -> None:
    """The owner's clock is years behind, and so is what it wrote."""
    claim(folder, time="1990-01-01T00:00:00+00:00")
    with pytest.raises(ResultsError, match="another process"):
        lock.hold(folder, record=RECORD).__enter__()


def test_an_owner_that_lost_the_lock_is_notified_and_does_not_touch_it(folder: StoragePath) -> None:
    (folder / RECORD).write_bytes(b"x")
    with lock.hold(folder, record=RECORD) as handle:
        other = claim(folder, 2)
        wait_for_loss(handle)
        reasons: list[str] = []
        handle.on_lost(reasons.append)
        assert "another process has taken this study over" in reasons[0]
        with pytest.raises(LockLostError):
            handle.fence.check()
    assert json.loads(other.read_bytes()) == json.loads(owner(token="00000000000000aa"))


def test_a_vanished_claim_is_not_written_again(folder: StoragePath) -> None:
    """A driver that slept took the lock that was gone as its own, and overwrote a finished study."""
    (folder / RECORD).write_bytes(b"x")
    with lock.hold(folder, record=RECORD) as handle:
        (folder / fence.CLAIMS).delete()
        wait_for_loss(handle)
        assert "the lock of this study is gone" in handle.lost
    assert fence.generations(folder) == {}


def test_of_two_that_begin_simultaneously_the_second_withdraws(
    folder: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = lock._write

    def overtaken(path: StoragePath, token: str, **options: bool) -> None:
        other.append(claim(folder))
        real(path, token, **options)

    other: list[StoragePath] = []
    monkeypatch.setattr(lock, "_write", overtaken)
    with pytest.raises(ResultsError, match="began at the same moment"):
        lock.hold(folder, record=RECORD).__enter__()
    assert fence.generations(folder) == {1: [other[0].name]}


def test_drivers_that_begin_simultaneously_never_both_run(folder: StoragePath) -> None:
    """Each waits, once it has the lock, for the others to have tried."""
    barrier, over = threading.Barrier(4), threading.Barrier(4)
    held: list[int] = []

    def drive() -> None:
        barrier.wait()
        try:
            with lock.hold(folder, record=RECORD) as handle:
                held.append(handle.fence.generation)
                over.wait()
        except ResultsError:
            over.wait()

    threads = [threading.Thread(target=drive) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) <= 1


def test_a_lock_that_cannot_be_read_is_held(folder: StoragePath) -> None:
    claim(folder).write_bytes(b"garbage")
    with pytest.raises(ResultsError, match="another process"):
        lock.hold(folder, record=RECORD).__enter__()
