"""What every feature cache must hold. Subclass and give a `make` fixture that builds one of a given capacity."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest

from ebft_study.features.cache import Cache

SPECIAL = np.array([0x7FC00001, 0xFFC12345, 0x7F800000, 0x80000000, 0x00000001], np.uint32).view(np.float32)
"""Two NaNs with different payloads, infinity, minus zero and the smallest denormal."""


def key(i: int) -> bytes:
    return hashlib.sha256(f"key {i}".encode()).digest()


def row(i: int, d: int = 16) -> np.ndarray:
    """The one content that belongs to `key(i)`."""
    return np.random.default_rng(i).standard_normal(d, np.float32)


def rows(*numbers: int, d: int = 16) -> dict[bytes, np.ndarray]:
    return {key(i): row(i, d) for i in numbers}


def same(found: dict[bytes, np.ndarray], expected: dict[bytes, np.ndarray]) -> bool:
    """The same keys, each with the same bits."""
    return {k: (r.dtype, r.shape, r.tobytes()) for k, r in found.items()} == {
        k: (r.dtype, r.shape, r.tobytes()) for k, r in expected.items()
    }


class CacheContract:
    """Bit for bit what was put, or nothing; never more bytes than allowed."""

    @pytest.fixture
    def make(self) -> Callable[[int], Cache]:
        raise AssertionError("give a builder of the cache under test")

    @pytest.fixture
    def cache(self, make: Callable[[int], Cache]) -> Cache:
        return make(2**20)

    def test_what_was_put_is_found_bit_for_bit(self, cache: Cache) -> None:
        expected = {**rows(*range(50)), key(50): SPECIAL}
        cache.put(expected)
        assert same(cache.get(list(expected)), expected)

    def test_unknown_keys_are_absent(self, cache: Cache) -> None:
        assert cache.get([key(1)]) == {}
        cache.put(rows(1, 2))
        assert same(cache.get([key(3), key(1), key(1), key(4)]), rows(1))

    def test_every_key_has_its_own_row(self, cache: Cache) -> None:
        for start in range(0, 600, 60):
            cache.put(rows(*range(start, start + 60)))
        order = np.random.default_rng(0).permutation(600)
        assert same(cache.get([key(i) for i in order]), rows(*range(600)))

    def test_put_twice_is_put_once(self, cache: Cache) -> None:
        cache.put(rows(1, 2))
        used = cache.used_bytes
        for _ in range(3):
            cache.put(rows(2, 1))
        assert cache.used_bytes == used > 0
        assert same(cache.get([key(1), key(2)]), rows(1, 2))

    def test_rows_may_differ_in_length(self, cache: Cache) -> None:
        expected = rows(1, 2, d=1) | rows(3, d=384) | rows(4, 5, d=7) | rows(6, d=384)
        cache.put(expected)
        assert same(cache.get(list(expected)), expected)

    def test_nothing_done_to_arrays_outside_reaches_the_cache(self, cache: Cache) -> None:
        given = row(1)
        cache.put({key(1): given})
        given[:] = 0
        for _ in range(2):
            found = cache.get([key(1)])[key(1)]
            with pytest.raises(ValueError):
                found[0] = 0
            with pytest.raises(ValueError):
                found.setflags(write=True)
            assert same({key(1): found}, rows(1))

    def test_a_view_of_a_larger_array_is_put_as_its_own_numbers(self, cache: Cache) -> None:
        table = np.arange(60, dtype=np.float32).reshape(6, 10)
        cache.put({key(1): table[:, 3]})
        assert cache.get([key(1)])[key(1)].tolist() == [3, 13, 23, 33, 43, 53]

    def test_bytes_stay_bounded_and_the_newest_rows_stay(self, make: Callable[[int], Cache]) -> None:
        capacity, d = 100_000, 64
        cache = make(capacity)
        n = 10 * capacity // (4 * d)
        for i in range(n):
            cache.put(rows(i, d=d))
            assert cache.used_bytes <= capacity
        assert capacity // 4 < cache.used_bytes <= capacity
        newest = rows(*range(n - 50, n), d=d)
        assert same(cache.get(list(newest)), newest)
        assert cache.get([key(i) for i in range(n // 2)]) == {}

    def test_a_row_too_large_to_keep_costs_no_other_row(self, make: Callable[[int], Cache]) -> None:
        cache = make(20_000)
        cache.put(rows(1))
        cache.put(rows(2, d=8_000))
        cache.put(rows(3))
        assert same(cache.get([key(i) for i in (1, 2, 3)]), rows(1, 3))

    def test_no_capacity_keeps_nothing(self, make: Callable[[int], Cache]) -> None:
        cache = make(0)
        cache.put(rows(1, 2))
        assert cache.get([key(1), key(2)]) == {}
        assert cache.used_bytes == 0

    def test_nothing_asked_or_put_is_nothing_done(self, cache: Cache) -> None:
        cache.put({})
        assert cache.get([]) == {}
        assert cache.used_bytes == 0
        cache.put(rows(1))
        assert cache.get([]) == {}

    @pytest.mark.parametrize(
        ("wrong_key", "wrong_row"),
        [
            (b"short", row(1)),
            (key(1), row(1).astype(np.float64)),
            (key(1), row(1).reshape(4, 4)),
            (key(1), np.zeros(0, np.float32)),
        ],
        ids=["key", "dtype", "shape", "empty"],
    )
    def test_what_is_no_key_or_no_row_is_refused(self, cache: Cache, wrong_key: bytes, wrong_row: np.ndarray) -> None:
        with pytest.raises(ValueError, match="but got"):
            cache.put({wrong_key: wrong_row})
        assert cache.used_bytes == 0
