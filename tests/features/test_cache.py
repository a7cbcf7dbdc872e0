"""Feature caches: the contract, what happens to files that are damaged, deleted or shared, and full disks."""

from __future__ import annotations

import multiprocessing
import os
import resource
import secrets
import signal
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Iterator
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from ebft_study.errors import ConfigError
from ebft_study.features import shards
from ebft_study.features.cache import Cache, DiskCache, Hits, MemoryCache, TieredCache
from tests.contracts.caches import CacheContract, key, row, rows, same

CAPACITY = 2**20
SPAWN = multiprocessing.get_context("spawn")


class Problems(list[str]):
    """Collects what a cache tells."""

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

    def opened(capacity: int = CAPACITY, **options: Any) -> DiskCache:
        return DiskCache(folder, capacity, on_problem=problems, **options)

    return opened


@pytest.fixture
def always_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "LISTING_SECONDS", 0.0)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def put_as_file(cache: DiskCache, folder: Path, *numbers: int, age: float = 0.0) -> Path:
    """Put rows as one file, used last `age` seconds ago."""
    before = set(files(folder))
    cache.put(rows(*numbers))
    cache.flush()
    (path,) = set(files(folder)) - before
    make_old(path, age)
    return path


def make_old(path: Path, age: float) -> None:
    os.utime(path, (time.time() - age,) * 2)


def flip(path: Path, position: int) -> None:
    """Turn around one byte of the file, in place."""
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

    def test_rows_are_told_apart_by_where_they_were_found(self, disk: Callable[..., DiskCache]) -> None:
        before = disk()
        before.put(rows(1, 2, 3))
        before.close()
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
        cache.flush()
        cache.close()


def test_rows_outlive_their_process_and_their_files_are_plain_safetensors(
    disk: Callable[..., DiskCache], folder: Path, problems: Problems
) -> None:
    first = disk()
    first.put(rows(1, 2, 3))
    first.put(rows(4, d=7))
    first.close()
    second = disk()
    expected = rows(1, 2, 3) | rows(4, d=7)
    assert same(second.get(list(expected)), expected)
    assert second.used_bytes == sum(path.stat().st_size for path in folder.iterdir())
    stored = {}
    for path in files(folder):
        tensors = safetensors.numpy.load_file(path)
        assert tensors["checksums"].shape == (len(tensors["keys"]), 8)
        stored |= {k.tobytes(): r for k, r in zip(tensors["keys"], tensors["features"], strict=True)}
    assert same(stored, expected)
    assert not problems


def test_a_file_is_written_when_enough_rows_have_come_together(disk: Callable[..., DiskCache], folder: Path) -> None:
    cache = disk(shard_bytes=10 * 64)
    cache.put(rows(*range(9)))
    assert not files(folder)
    cache.put(rows(9, 10, 11))
    (path,) = files(folder)
    assert len(safetensors.numpy.load_file(path)["keys"]) == 10
    cache.put(rows(*range(10)))
    assert files(folder) == [path], "rows that are there are not collected again"


def test_rows_that_another_process_writes_are_found(
    disk: Callable[..., DiskCache], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = disk(), disk()
    writer.put(rows(1))
    monkeypatch.setattr(shards, "LISTING_SECONDS", 0.0)
    assert reader.get([key(1)]) == {}
    writer.flush()
    monkeypatch.setattr(shards, "LISTING_SECONDS", 1_000.0)
    assert reader.get([key(1)]) == {}, "the folder is listed once in a while only"
    monkeypatch.setattr(shards, "LISTING_SECONDS", 0.0)
    assert same(reader.get([key(1)]), rows(1))
    reader.put(rows(1))
    reader.flush()
    assert len(files(folder)) == 1


@pytest.mark.usefixtures("always_listing")
def test_what_two_processes_compute_at_once_is_written_once(disk: Callable[..., DiskCache], folder: Path) -> None:
    first, second = disk(), disk()
    first.put(rows(1, 2))
    second.put(rows(2, 3))
    first.flush()
    second.flush()
    assert sorted(len(safetensors.numpy.load_file(path)["keys"]) for path in files(folder)) == [1, 2]


def test_a_damaged_row_is_a_miss_and_its_file_goes(
    disk: Callable[..., DiskCache], folder: Path, problems: Problems
) -> None:
    cache = disk()
    path = put_as_file(cache, folder, 1, 2, 3)
    flip(path, path.read_bytes().index(row(2).tobytes()) + 5)
    assert same(cache.get([key(2), key(1)]), rows(1))
    assert len(problems) == 1
    assert str(path) in problems[0]
    assert "damaged" in problems[0]
    assert not path.exists()
    assert cache.get([key(1), key(2), key(3)]) == {}
    assert len(problems) == 1
    cache.put(rows(2))
    cache.flush()
    assert same(disk().get([key(2)]), rows(2))


def test_no_damaged_byte_anywhere_gives_a_wrong_row(disk: Callable[..., DiskCache], folder: Path) -> None:
    path = put_as_file(disk(), folder, 1, 2)
    intact, found_all = path.read_bytes(), 0
    for position in range(len(intact)):
        path.write_bytes(intact)
        flip(path, position)
        cache = disk()
        found = cache.get([key(1), key(2)])
        assert same(found, {k: r for k, r in rows(1, 2).items() if k in found}), position
        found_all += len(found) == 2
    assert found_all < 0.1 * len(intact), "only blanks of the header may be damaged without loss"


def test_a_file_exchanged_for_another_of_the_same_layout_gives_no_row(
    disk: Callable[..., DiskCache], folder: Path, problems: Problems
) -> None:
    cache = disk()
    path, other = put_as_file(cache, folder, 1, 2), put_as_file(cache, folder, 3, 4)
    path.write_bytes(other.read_bytes())
    assert same(cache.get([key(i) for i in (1, 2, 3, 4)]), rows(3, 4))
    assert len(problems) == 1


def test_a_row_under_the_key_of_another_is_not_found(
    disk: Callable[..., DiskCache], folder: Path, problems: Problems
) -> None:
    path = put_as_file(disk(), folder, 1, 2)
    content = path.read_bytes()
    path.write_bytes(content.replace(key(1) + key(2), key(2) + key(1)))
    assert path.read_bytes() != content
    assert disk().get([key(1), key(2)]) == {}
    assert len(problems) == 1


@pytest.mark.parametrize("kept", [0, 5, 100, -1_000, -1])
def test_a_file_truncated_before_it_is_opened_goes(
    disk: Callable[..., DiskCache], folder: Path, problems: Problems, kept: int
) -> None:
    path = put_as_file(disk(), folder, *range(20))
    path.write_bytes(path.read_bytes()[:kept])
    cache = disk()
    assert cache.get([key(i) for i in range(20)]) == {}
    assert len(problems) == 1
    assert f"{path}: damaged" in problems[0]
    assert not path.exists()


@pytest.mark.parametrize("n_whole", [0, 7])
def test_a_file_truncated_after_it_was_opened_goes_but_for_whole_rows(
    disk: Callable[..., DiskCache], folder: Path, problems: Problems, n_whole: int
) -> None:
    cache = disk()
    path = put_as_file(cache, folder, *range(20))
    os.truncate(path, path.read_bytes().index(row(n_whole).tobytes()) + 10)
    assert same(cache.get([key(i) for i in range(20)]), rows(*range(n_whole)))
    assert len(problems) == 1
    assert f"{path}: damaged, it is shorter" in problems[0]
    assert not path.exists()


def of_another_layout(**changed: np.ndarray) -> bytes:
    tensors = {"keys": np.ones((2, 32), np.uint8), "checksums": np.ones((2, 8), np.uint8), "features": np.ones((2, 4))}
    tensors["features"] = tensors["features"].astype(np.float32)
    return safetensors.numpy.save(tensors | changed)


@pytest.mark.parametrize(
    "content",
    [
        b"not a data file, but longer than a header's length",
        np.random.default_rng(0).bytes(5_000),
        (4_000).to_bytes(8, "little") + b"[" * 4_000,
        (39).to_bytes(8, "little") + b'{"features": {"shape": [Infinity, 1]}} ',
        (18).to_bytes(8, "little") + b'{"features": null}',
        safetensors.numpy.save({"something": np.zeros(3)}),
        of_another_layout(keys=np.ones((3, 32), np.uint8)),
        of_another_layout(keys=np.ones((2, 31), np.uint8)),
        of_another_layout(checksums=np.ones((2, 4), np.uint8)),
        of_another_layout(features=np.ones((2, 4), np.int32)),
        of_another_layout(features=np.ones((2, 0), np.float32)),
        of_another_layout(
            keys=np.ones((0, 32), np.uint8), checksums=np.ones((0, 8), np.uint8), features=np.ones((0, 4), np.float32)
        ),
        of_another_layout() + b"more",
    ],
)
def test_a_file_that_is_no_shard_is_deleted_and_told(
    disk: Callable[..., DiskCache], folder: Path, problems: Problems, content: bytes
) -> None:
    intact = put_as_file(disk(), folder, 1)
    (folder / f"{secrets.token_hex(16)}.safetensors").write_bytes(content)
    cache = disk()
    assert len(problems) == 1
    assert files(folder) == [intact]
    assert same(cache.get([key(1), b"\1" * 32]), rows(1))


def test_files_of_other_names_are_left_alone(disk: Callable[..., DiskCache], folder: Path, problems: Problems) -> None:
    folder.mkdir()
    for name in ("model.safetensors", "notes.txt", ".hidden.tmp"):
        (folder / name).write_text("not ours")
        make_old(folder / name, 10**6)
    cache = disk(2_000)
    for i in range(20):
        cache.put(rows(i))
        cache.flush()
    assert {path.read_text() for path in folder.iterdir() if len(path.stem) < 32} == {"not ours"}
    assert len([path for path in folder.iterdir() if len(path.stem) < 32]) == 3
    assert not problems


def test_files_that_others_delete_are_misses_without_a_word(
    disk: Callable[..., DiskCache], folder: Path, problems: Problems
) -> None:
    cache = disk()
    path = put_as_file(cache, folder, 1)
    put_as_file(cache, folder, 2)
    path.unlink()
    assert same(cache.get([key(1), key(2)]), rows(2))
    cache.put(rows(1))
    cache.flush()
    assert same(disk().get([key(1), key(2)]), rows(1, 2))
    assert not problems


@pytest.mark.usefixtures("always_listing")
def test_files_that_others_delete_no_longer_count(disk: Callable[..., DiskCache], folder: Path) -> None:
    cache = disk()
    path, other = put_as_file(cache, folder, 1), put_as_file(cache, folder, 2)
    path.unlink()
    cache.get([key(9)])
    assert cache.used_bytes == other.stat().st_size


def test_a_row_in_two_files_outlives_the_first(
    disk: Callable[..., DiskCache], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cache in (disk(), disk()):
        cache.put(rows(1))
        cache.flush()
    first, _ = files(folder)
    reader = disk()
    first.unlink()
    monkeypatch.setattr(shards, "LISTING_SECONDS", 0.0)
    assert reader.get([key(9)]) == {}
    assert same(reader.get([key(1)]), rows(1))


@pytest.mark.usefixtures("always_listing")
def test_a_folder_deleted_meanwhile_is_made_again(
    disk: Callable[..., DiskCache], folder: Path, problems: Problems
) -> None:
    cache = disk()
    put_as_file(cache, folder, 1).unlink()
    folder.rmdir()
    assert cache.get([key(1)]) == {}
    cache.put(rows(2))
    cache.flush()
    assert same(disk().get([key(2)]), rows(2))
    assert not problems


def test_a_file_that_cannot_be_read_is_told_and_kept(
    disk: Callable[..., DiskCache], folder: Path, problems: Problems
) -> None:
    disk()
    path = folder / f"{secrets.token_hex(16)}.safetensors"
    path.mkdir()  # even root cannot read a folder as a file
    cache = disk()
    assert cache.get([key(1)]) == {}
    assert len(problems) == 1
    assert f"{path}: cannot be read" in problems[0]
    assert path.exists()


def test_what_killed_writers_left_behind_goes_after_an_hour(disk: Callable[..., DiskCache], folder: Path) -> None:
    disk()
    old, young = (folder / f".{secrets.token_hex(16)}.tmp" for _ in range(2))
    for path, age in ((old, 3_700), (young, 3_500)):
        path.write_bytes(b"half a file")
        make_old(path, age)
    disk()
    assert list(folder.iterdir()) == [young]


def test_the_file_used_longest_ago_goes_first(disk: Callable[..., DiskCache], folder: Path) -> None:
    writer = disk()
    ages = {1: 300, 2: 500, 3: 400, 4: 200}
    paths = {i: put_as_file(writer, folder, i, age=age) for i, age in ages.items()}
    size = paths[1].stat().st_size
    cache = disk(5 * size - 1)
    cache.get([key(2)])
    paths[5] = put_as_file(cache, folder, 5)
    assert set(files(folder)) == {paths[i] for i in (1, 2, 4, 5)}
    paths[6] = put_as_file(cache, folder, 6)
    assert set(files(folder)) == {paths[i] for i in (2, 4, 5, 6)}
    assert same(cache.get([key(i) for i in range(7)]), rows(2, 4, 5, 6))
    assert cache.used_bytes == 4 * size


def test_a_hit_marks_its_file_once_in_a_while(
    disk: Callable[..., DiskCache], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = disk()
    path = put_as_file(cache, folder, 1, age=500)
    for pause, expected in ((60.0, True), (60.0, False), (0.0, True)):
        monkeypatch.setattr(shards, "REFRESH_SECONDS", pause)
        make_old(path, 500)
        cache.get([key(1)])
        assert (path.stat().st_mtime > time.time() - 100) == expected


def test_a_folder_over_its_capacity_is_cut_when_opened(disk: Callable[..., DiskCache], folder: Path) -> None:
    writer = disk()
    paths = [put_as_file(writer, folder, i, age=100 - i) for i in range(10)]
    size = paths[0].stat().st_size
    cache = disk(4 * size)
    assert files(folder) == sorted(paths[-3:])
    assert cache.used_bytes == 3 * size


def test_files_of_other_processes_count_towards_the_capacity(disk: Callable[..., DiskCache], folder: Path) -> None:
    size = put_as_file(disk(), folder, 0).stat().st_size
    capacity = 10 * size
    cache, other = disk(capacity), disk(capacity)
    for i in range(1, 8):
        put_as_file(other, folder, i, age=100)
    for i in range(8, 18):
        cache.put(rows(i))
        cache.flush()
    assert sum(path.stat().st_size for path in files(folder)) <= capacity
    assert same(disk(capacity).get([key(i) for i in range(18)]), rows(*range(9, 18)))


@pytest.mark.usefixtures("always_listing")
def test_no_file_stays_open(disk: Callable[..., DiskCache], folder: Path) -> None:
    cache = disk()
    before = len(os.listdir("/proc/self/fd"))
    for i in range(30):
        put_as_file(cache, folder, i)
    assert len(cache.get([key(i) for i in range(30)])) == 30
    assert len(os.listdir("/proc/self/fd")) == before


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
        cache.flush()
    assert len(problems) == 1
    assert str(folder) in problems[0]
    assert reason in problems[0]
    assert "EBFT_STUDY_CACHE" in problems[0]
    assert same(cache.get([key(i) for i in range(4)]), rows(0))
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"], "nothing half written is left"


def test_a_failed_write_stops_writing_and_is_told_once(
    disk: Callable[..., DiskCache], folder: Path, problems: Problems
) -> None:
    cache = disk()
    put_as_file(cache, folder, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        assert_it_reads_on_without_writing(cache, folder, problems, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    cache.put(rows(4))
    cache.close()
    assert len(files(folder)) == 1


def test_a_full_disk_stops_writing_and_is_told_once(
    disk: Callable[..., DiskCache], folder: Path, problems: Problems
) -> None:
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        cache = disk()
        put_as_file(cache, folder, 0)
        assert_it_reads_on_without_writing(cache, folder, problems, "No space left")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def use_folder_with_others(folder: Path, capacity: int, seed: int, start: Barrier, results: Queue) -> None:
    """Ask for random rows and put those that are missing; tells problems, hits on others' rows, and wrong rows."""
    shards.LISTING_SECONDS = 0.0
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
        cache.flush()
    results.put((list(problems), foreign, wrong))


def test_processes_share_a_folder(folder: Path, problems: Problems) -> None:
    capacity, start, results = 12_000, SPAWN.Barrier(3), SPAWN.Queue()
    users = [
        SPAWN.Process(target=use_folder_with_others, args=(folder, capacity, seed, start, results)) for seed in range(3)
    ]
    for user in users:
        user.start()
    outcomes = [results.get(timeout=60) for _ in users]
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
    cache = DiskCache(folder, 2**30, shard_bytes=2**20, on_problem=print)
    i = 0
    while True:
        cache.put({key(i): row(i % 7, 4_608)})
        i += 1


def test_a_killed_writer_leaves_only_whole_rows(folder: Path, problems: Problems) -> None:
    writer = SPAWN.Process(target=put_for_ever, args=(folder,))
    writer.start()
    assert writer.pid
    until = time.monotonic() + 60
    while len(files(folder)) < 5 and writer.is_alive() and time.monotonic() < until:
        time.sleep(0.001)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(60)
    assert writer.exitcode == -signal.SIGKILL
    cache = DiskCache(folder, 2**30, on_problem=problems)
    found = cache.get([key(i) for i in range(1_000)])
    assert len(found) >= 5 * 2**20 // (4 * 4_608) - 5
    assert same(found, {key(i): row(i % 7, 4_608) for i in range(len(found))})
    assert not problems
