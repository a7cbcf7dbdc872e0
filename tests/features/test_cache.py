"""Feature caches: the contract, what happens to files that are damaged, deleted or shared, and full disks."""

from __future__ import annotations

import multiprocessing
import os
import resource
import secrets
import signal
import sqlite3
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Iterator
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest

from ebft_study.errors import ConfigError
from ebft_study.features.cache import Cache, DiskCache, Hits, MemoryCache, TieredCache
from tests.contracts.caches import CacheContract, key, row, rows, same

CAPACITY = 2**20
SPAWN = multiprocessing.get_context("spawn")


class Problems(list[str]):
    """Collects the problems that a cache reports."""

    def __call__(self, problem: str) -> None:
        assert "\n" not in problem
        self.append(problem)


@pytest.fixture
def problems() -> Problems:
    return Problems()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "features"


@pytest.fixture
def disk(folder: Path, problems: Problems) -> Callable[..., DiskCache]:
    """Opens the folder; each call is another user of it."""

    def opened(capacity: int = CAPACITY) -> DiskCache:
        return DiskCache(folder, capacity, on_problem=problems)

    return opened


def database(folder: Path) -> Path:
    return folder / "features.sqlite"


def set_last_use(folder: Path, number: int, age: float) -> None:
    """Make row `number` one that was used last `age` seconds ago."""
    with sqlite3.connect(database(folder)) as connection:
        connection.execute("UPDATE rows SET used = ? WHERE key = ?", (time.time() - age, key(number)))
    connection.close()


def flip(path: Path, position: int) -> None:
    """Invert one byte of the file, in place."""
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 0xFF]))


class TestMemoryCache(CacheContract):
    @pytest.fixture
    def make(self) -> Callable[[int], Cache]:
        return MemoryCache

    def test_the_row_used_longest_ago_goes_first(self) -> None:
        cache = MemoryCache(3 * self.bytes_of_one_row())
        cache.put(rows(1, 2, 3))
        cache.get([key(1)])
        cache.put(rows(4))
        assert same(cache.get([key(i) for i in (4, 3, 2, 1)]), rows(1, 3, 4))
        cache.put(rows(4))
        cache.put(rows(5))
        assert same(cache.get([key(i) for i in range(6)]), rows(1, 4, 5))

    def test_a_row_that_just_fits_is_kept_and_one_byte_less_keeps_nothing(self) -> None:
        for missing, expected in ((0, rows(1)), (1, {})):
            cache = MemoryCache(self.bytes_of_one_row() - missing)
            cache.put(rows(1))
            assert same(cache.get([key(1)]), expected)

    @pytest.mark.parametrize("d", [1, 384])
    def test_bytes_counted_are_no_fewer_than_bytes_taken(self, d: int) -> None:
        content = row(0, d)
        tracemalloc.start()
        try:
            cache = MemoryCache(2_000 * (self.bytes_of_one_row() + 4 * d))
            for _ in range(6_000):
                cache.put({secrets.token_bytes(32): content})
            taken = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert 0.4 * cache.used_bytes < taken < cache.used_bytes

    def bytes_of_one_row(self) -> int:
        cache = MemoryCache(CAPACITY)
        cache.put(rows(1))
        return cache.used_bytes


class TestDiskCache(CacheContract):
    @pytest.fixture
    def make(self, disk: Callable[..., DiskCache]) -> Callable[[int], Cache]:
        return disk

    @pytest.fixture(autouse=True)
    def no_problems(self, problems: Problems) -> Iterator[None]:
        yield
        assert problems == []


class TestTieredCache(CacheContract):
    @pytest.fixture
    def make(self, disk: Callable[..., DiskCache]) -> Callable[[int], Cache]:
        return lambda capacity: TieredCache(MemoryCache(capacity // 2), disk(capacity // 2))

    def test_hits_are_counted_by_tier(self, disk: Callable[..., DiskCache]) -> None:
        before = disk()
        before.put(rows(1, 2, 3))
        cache = TieredCache(MemoryCache(CAPACITY), disk())
        cache.put(rows(4))
        found, hits = cache.get_with_tiers([key(i) for i in (1, 4, 9, 2, 1, 9)])
        assert same(found, rows(1, 2, 4))
        assert hits == Hits(memory=1, disk=2, missed=1)

    def test_a_row_found_on_disk_is_found_in_memory_next(self, disk: Callable[..., DiskCache]) -> None:
        memory, below = MemoryCache(CAPACITY), disk()
        below.put(rows(1))
        cache = TieredCache(memory, below)
        assert cache.get_with_tiers([key(1)])[1] == Hits(memory=0, disk=1, missed=0)
        assert cache.get_with_tiers([key(1)])[1] == Hits(memory=1, disk=0, missed=0)
        assert same(memory.get([key(1)]), rows(1))

    def test_what_memory_has_no_room_for_is_found_on_disk(self, disk: Callable[..., DiskCache]) -> None:
        cache = TieredCache(MemoryCache(1_000), disk())
        cache.put(rows(*range(50)))
        found, hits = cache.get_with_tiers([key(i) for i in range(50)])
        assert same(found, rows(*range(50)))
        assert hits.memory < 5 < 45 < hits.disk
        assert hits.missed == 0

    def test_without_a_disk_it_is_the_memory(self) -> None:
        cache = TieredCache(MemoryCache(CAPACITY), None)
        cache.put(rows(1))
        found, hits = cache.get_with_tiers([key(1), key(2)])
        assert same(found, rows(1))
        assert hits == Hits(memory=1, disk=0, missed=1)


def test_rows_outlive_their_process(disk: Callable[..., DiskCache], folder: Path, problems: Problems) -> None:
    first = disk()
    first.put(rows(1, 2, 3))
    first.put(rows(4, d=7))
    second = disk()
    expected = rows(1, 2, 3) | rows(4, d=7)
    assert same(second.get(list(expected)), expected)
    assert second.used_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert not problems


def test_rows_that_another_process_writes_are_found(disk: Callable[..., DiskCache]) -> None:
    reader, writer = disk(), disk()
    assert reader.get([key(1)]) == {}
    writer.put(rows(1))
    assert same(reader.get([key(1)]), rows(1))
    used = writer.used_bytes
    reader.put(rows(1))
    assert writer.used_bytes == used


def test_a_damaged_row_is_a_miss_and_is_deleted(
    disk: Callable[..., DiskCache], folder: Path, problems: Problems
) -> None:
    cache = disk()
    cache.put(rows(1, 2, 3))
    flip(database(folder), database(folder).read_bytes().index(row(2).tobytes()) + 5)
    assert same(cache.get([key(2), key(1)]), rows(1))
    assert len(problems) == 1
    assert str(folder) in problems[0]
    assert "damaged" in problems[0]
    assert same(cache.get([key(1), key(2), key(3)]), rows(1, 3))
    assert len(problems) == 1
    cache.put(rows(2))
    assert same(disk().get([key(2)]), rows(2))


def test_no_damaged_byte_anywhere_gives_a_wrong_row(disk: Callable[..., DiskCache], folder: Path) -> None:
    # Of different lengths, so that their pages are neither all full nor all empty.
    expected = rows(1, 2, d=200) | rows(3, 4, d=1_000)
    cache = disk()
    cache.put(expected)
    intact, lost = database(folder).read_bytes(), 0
    for position in [*range(600), *range(600, len(intact), 17)]:
        database(folder).write_bytes(intact)
        flip(database(folder), position)
        found = cache.get(list(expected))
        assert same(found, {k: r for k, r in expected.items() if k in found}), position
        cache.put(expected)
        lost += len(found) < len(expected)
    assert lost > 300


def test_a_row_under_the_key_of_another_is_not_found(
    disk: Callable[..., DiskCache], folder: Path, problems: Problems
) -> None:
    disk().put(rows(1, 2))
    content = database(folder).read_bytes()
    changed = content.replace(row(1).tobytes(), b"?" * 64).replace(row(2).tobytes(), row(1).tobytes())
    database(folder).write_bytes(changed.replace(b"?" * 64, row(2).tobytes()))
    assert database(folder).read_bytes() != content
    assert disk().get([key(1), key(2)]) == {}
    assert len(problems) == 1


@pytest.mark.parametrize("kept", [5, 100, 3_000, -5_000])
def test_a_truncated_file_goes(disk: Callable[..., DiskCache], folder: Path, problems: Problems, kept: int) -> None:
    cache = disk()
    cache.put(rows(*range(20), d=500))
    content = database(folder).read_bytes()
    database(folder).write_bytes(content[:kept])
    asked = [key(i) for i in range(20)]
    found = cache.get(asked)
    assert same(found, {k: r for k, r in rows(*range(20), d=500).items() if k in found})
    assert len(problems) == 1
    assert f"{database(folder)}: damaged" in problems[0]
    assert not database(folder).exists()
    cache.put(rows(1))
    assert same(cache.get(asked), rows(1))


def test_an_empty_file_is_an_empty_cache(disk: Callable[..., DiskCache], folder: Path, problems: Problems) -> None:
    """Another process creates it so, before its first transaction."""
    cache = disk()
    database(folder).touch()
    assert cache.get([key(1)]) == {}
    cache.put(rows(1))
    assert same(cache.get([key(1)]), rows(1))
    assert not problems


def of_another_schema(folder: Path) -> bytes:
    path = folder / "other"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE rows (something REAL)")
    connection.close()
    content = path.read_bytes()
    path.unlink()
    return content


@pytest.mark.parametrize("content", ["text", "noise", "schema"])
def test_a_file_that_is_no_cache_is_deleted_and_reported(
    disk: Callable[..., DiskCache], folder: Path, problems: Problems, content: str
) -> None:
    cache = disk()
    contents = {
        "text": b"not a database, but longer than the header of one" * 3,
        "noise": b"SQLite format 3\0" + np.random.default_rng(0).bytes(5_000),
        "schema": of_another_schema(folder),
    }
    database(folder).write_bytes(contents[content])
    assert cache.get([key(1)]) == {}
    assert len(problems) == 1
    assert "damaged" in problems[0]
    assert not database(folder).exists()
    cache.put(rows(1))
    assert same(cache.get([key(1), b"\1" * 32]), rows(1))


def test_damage_found_by_a_write_costs_those_rows_only(
    disk: Callable[..., DiskCache], folder: Path, problems: Problems
) -> None:
    cache = disk()
    database(folder).write_bytes(b"not a database" * 100)
    cache.put(rows(1))
    cache.put(rows(2))
    assert same(cache.get([key(1), key(2)]), rows(2))
    assert len(problems) == 1


def test_other_files_are_left_alone(disk: Callable[..., DiskCache], folder: Path, problems: Problems) -> None:
    """Those of other programs, and the safetensors files of earlier versions of this cache."""
    folder.mkdir()
    names = {"model.safetensors", "notes.txt", ".hidden.tmp", f"{secrets.token_hex(16)}.safetensors"}
    for name in names:
        (folder / name).write_text("not ours")
    cache = disk(20_000)
    for i in range(100):
        cache.put(rows(i))
    assert {path.name: path.read_text() for path in folder.iterdir() if path != database(folder)} == dict.fromkeys(
        names, "not ours"
    )
    assert not problems


def test_a_file_that_others_delete_is_a_miss_without_a_word(
    disk: Callable[..., DiskCache], folder: Path, problems: Problems
) -> None:
    cache = disk()
    cache.put(rows(1))
    database(folder).unlink()
    assert cache.used_bytes == 0
    assert cache.get([key(1)]) == {}
    cache.put(rows(1))
    assert same(disk().get([key(1), key(2)]), rows(1))
    assert not problems


def test_a_folder_deleted_meanwhile_is_made_again(
    disk: Callable[..., DiskCache], folder: Path, problems: Problems
) -> None:
    cache = disk()
    cache.put(rows(1))
    database(folder).unlink()
    folder.rmdir()
    assert cache.get([key(1)]) == {}
    cache.put(rows(2))
    assert same(disk().get([key(2)]), rows(2))
    assert not problems


def test_a_file_that_cannot_be_read_is_reported_once_and_stays(
    disk: Callable[..., DiskCache], folder: Path, problems: Problems
) -> None:
    cache = disk()
    database(folder).mkdir()  # even root cannot read a folder as a file
    for _ in range(2):
        assert cache.get([key(1)]) == {}
    assert len(problems) == 1
    assert f"{database(folder)}: cannot be read" in problems[0]
    assert database(folder).exists()


def test_the_row_on_disk_used_longest_ago_goes_first(disk: Callable[..., DiskCache], folder: Path) -> None:
    writer = disk()
    writer.put(rows(1, 2, 3, 4, d=5_000))
    for number, age in {1: 300, 2: 500, 3: 400, 4: 200}.items():
        set_last_use(folder, number, age)
    cache = disk(writer.used_bytes)
    cache.get([key(2)])
    cache.put(rows(5, d=5_000))
    assert same(disk().get([key(i) for i in range(7)]), rows(1, 2, 4, 5, d=5_000))
    set_last_use(folder, 1, 600)
    cache.put(rows(6, d=5_000))
    assert same(cache.get([key(i) for i in range(7)]), rows(2, 4, 5, 6, d=5_000))
    assert cache.used_bytes <= writer.used_bytes


def test_a_file_over_the_capacity_is_cut_when_opened(disk: Callable[..., DiskCache], folder: Path) -> None:
    writer = disk()
    for i in range(10):
        writer.put(rows(i, d=5_000))
    assert writer.used_bytes > 200_000
    cache = disk(100_000)
    assert 60_000 < cache.used_bytes == database(folder).stat().st_size <= 100_000
    assert same(cache.get([key(i) for i in range(10)]), rows(6, 7, 8, 9, d=5_000))


def test_rows_of_other_processes_count_towards_the_capacity(disk: Callable[..., DiskCache], folder: Path) -> None:
    capacity = 100_000
    cache, other = disk(capacity), disk(capacity)
    for i in range(100):
        (cache if i % 2 else other).put(rows(i, d=1_000))
        assert database(folder).stat().st_size <= capacity
    found = disk(capacity).get([key(i) for i in range(100)])
    assert same(found, rows(*range(100 - len(found), 100), d=1_000))
    assert len(found) > 15


def test_no_file_stays_open(disk: Callable[..., DiskCache], folder: Path) -> None:
    cache = disk()
    before = len(os.listdir("/proc/self/fd"))
    for i in range(30):
        cache.put(rows(i))
    assert len(cache.get([key(i) for i in range(30)])) == 30
    assert len(os.listdir("/proc/self/fd")) == before
    assert list(folder.iterdir()) == [database(folder)]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, problems: Problems) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")
    for folder in (tmp_path / "file", tmp_path / "file" / "features"):
        with pytest.raises(ConfigError, match=r"EBFT_STUDY_CACHE.*features\.cache_disk_gib=0") as caught:
            DiskCache(folder, CAPACITY, on_problem=problems)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_must_not_be_written_is_refused(disk: Callable[..., DiskCache], folder: Path) -> None:
    folder.mkdir(mode=0o500)
    with pytest.raises(ConfigError, match=r"Permission denied.*EBFT_STUDY_CACHE.*features\.cache_disk_gib=0"):
        disk()


def assert_it_reads_on_without_writing(cache: DiskCache, folder: Path, problems: Problems, reason: str) -> None:
    """`cache` holds row 0 in a file, and cannot write a row of 80 kB."""
    for i in (1, 2, 3):
        cache.put(rows(i, d=20_000))
    assert len(problems) == 1
    assert str(folder) in problems[0]
    assert reason in problems[0]
    assert "EBFT_STUDY_CACHE" in problems[0]
    assert same(cache.get([key(i) for i in range(4)]), rows(0))
    assert list(folder.iterdir()) == [database(folder)], "nothing half written is left"


def test_a_failed_write_stops_writing_and_is_told_once(
    disk: Callable[..., DiskCache], folder: Path, problems: Problems
) -> None:
    cache = disk()
    cache.put(rows(0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        assert_it_reads_on_without_writing(cache, folder, problems, "disk")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    cache.put(rows(4))
    assert same(disk().get([key(0), key(4)]), rows(0))


def test_a_full_disk_stops_writing_and_is_told_once(
    disk: Callable[..., DiskCache], folder: Path, problems: Problems
) -> None:
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        cache = disk()
        cache.put(rows(0))
        assert_it_reads_on_without_writing(cache, folder, problems, "disk is full")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def use_folder_with_others(folder: Path, capacity: int, seed: int, start: Barrier, results: Queue) -> None:
    """Ask for random rows and put those that are missing; tells problems, hits on others' rows, and wrong rows."""
    problems, random, own = Problems(), np.random.default_rng(seed), set[int]()
    foreign = wrong = 0
    start.wait(60)
    cache = DiskCache(folder, capacity, on_problem=problems)
    for _ in range(150):
        asked = random.integers(200, size=20).tolist()
        found = cache.get([key(i) for i in asked])
        for i in set(asked):
            if key(i) in found:
                wrong += not same({key(i): found[key(i)]}, rows(i))
                foreign += i not in own
            else:
                own.add(i)
                cache.put(rows(i))
    results.put((list(problems), foreign, wrong))


def test_processes_share_a_folder(folder: Path, problems: Problems) -> None:
    capacity, start, results = 40_000, SPAWN.Barrier(3), SPAWN.Queue()
    users = [
        SPAWN.Process(target=use_folder_with_others, args=(folder, capacity, seed, start, results)) for seed in range(3)
    ]
    for user in users:
        user.start()
    outcomes = [results.get(timeout=600) for _ in users]
    for user in users:
        user.join(60)
    assert [user.exitcode for user in users] == [0, 0, 0]
    for told, foreign, wrong in outcomes:
        assert told == []
        assert foreign > 20
        assert wrong == 0
    cache = DiskCache(folder, capacity, on_problem=problems)
    assert 0 < cache.used_bytes <= capacity
    assert not problems


def put_for_ever(folder: Path) -> None:
    cache = DiskCache(folder, 2**30, on_problem=print)
    i = 0
    while True:
        cache.put({key(j): row(j % 7, 4_608) for j in range(i, i + 50)})
        i += 50


def test_a_killed_writer_leaves_only_whole_rows(folder: Path, problems: Problems) -> None:
    writer = SPAWN.Process(target=put_for_ever, args=(folder,))
    writer.start()
    assert writer.pid
    until = time.monotonic() + 600
    reader = DiskCache(folder, 2**30, on_problem=problems)
    while reader.used_bytes < 10 * 2**20 and writer.is_alive() and time.monotonic() < until:
        time.sleep(0.001)
    journal = folder / "features.sqlite-journal"
    while not journal.exists() and time.monotonic() < until:
        pass
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(60)
    assert writer.exitcode == -signal.SIGKILL
    cache = DiskCache(folder, 2**30, on_problem=problems)
    found = cache.get([key(i) for i in range(1_000)])
    assert len(found) >= 500
    assert len(found) % 50 == 0, "a transaction is there as a whole or not at all"
    assert same(found, {key(i): row(i % 7, 4_608) for i in range(len(found))})
    assert not problems
