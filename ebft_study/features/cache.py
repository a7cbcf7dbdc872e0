"""Feature vectors kept under 32-byte digests of all that they depend on, in memory and on disk.

Keys decide: what is found under a key was put under it, bit for bit. Every row on disk is checked when it is read, so
that a wrong hit is impossible and a lost row only costs the time to compute it again. Caches are used by one thread.
The folder of `DiskCache` may be shared by any number of processes, of one study or several, on a local disk or NFS.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ebft_study.errors import ConfigError
from ebft_study.features.shards import KEY_BYTES, ShardFolder

ENTRY_OVERHEAD = 320
"""Bytes of memory per row beyond its content: two bytes objects, the entry of an OrderedDict, and the allocator's loss.

An upper bound: tracemalloc shows 170 to 300 for 1,000 to 350,000 rows of 1 to 4608 numbers, old rows evicted or not.
"""
_FILES_AT_LEAST = 8  # that fit on disk, so that deleting one loses a small part of what is kept


class Cache(Protocol):
    """What was put may be found again, bit for bit, until newer rows need its room."""

    def get(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """The rows that are there, float32 of shape [d]. They are read-only for good."""
        ...

    def put(self, rows: Mapping[bytes, np.ndarray]) -> None:
        """Keep copies of the rows; a key that is there already is left as it is.

        Raises:
            ValueError: a key is not 32 bytes long, or a row is not float32 of shape [d], d > 0.
        """
        ...

    @property
    def used_bytes(self) -> int:
        """What counts towards the capacity."""
        ...

    def flush(self) -> None:
        """Let other processes find what was put, where they can."""
        ...

    def close(self) -> None:
        """Flush and free the memory. The cache is not used afterwards; closing again does nothing."""
        ...


class MemoryCache:
    """The rows used last, up to `capacity_bytes` of content and overhead; a row that alone is larger is not kept."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity, self._used = capacity_bytes, 0
        self._rows: OrderedDict[bytes, bytes] = OrderedDict()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """See `Cache.get`. A row found is the one used last."""
        found = {}
        for key in keys:
            content = self._rows.get(key)
            if content is not None:
                self._rows.move_to_end(key)
                found[key] = _as_row(content)
        return found

    def put(self, rows: Mapping[bytes, np.ndarray]) -> None:
        """See `Cache.put`."""
        for key, row in rows.items():
            content = _row_content(key, row)
            if key in self._rows:
                self._rows.move_to_end(key)
            elif len(content) + ENTRY_OVERHEAD <= self._capacity:
                self._rows[key] = content
                self._used += len(content) + ENTRY_OVERHEAD
                self._evict()

    @property
    def used_bytes(self) -> int:
        """Bytes of the rows' content and overhead."""
        return self._used

    def flush(self) -> None:
        """Nothing to do: no other process can find the rows."""

    def close(self) -> None:
        """See `Cache.close`."""
        self._rows.clear()
        self._used = 0

    def _evict(self) -> None:
        while self._used > self._capacity:
            _, content = self._rows.popitem(last=False)
            self._used -= len(content) + ENTRY_OVERHEAD


class DiskCache:
    """Rows in immutable files of one folder; the files used last are kept, up to `capacity_bytes`.

    Rows are collected in memory and written as one file (`shards.py`) at a time: when `shard_bytes` have come together,
    but never more than an eighth of the capacity, and at every flush. Few large files serve better than many small
    ones, so flush seldom. The index takes some 200 bytes of memory per row on disk.
    """

    def __init__(
        self,
        folder: Path,
        capacity_bytes: int,
        *,
        shard_bytes: int = 8 * 2**20,
        on_problem: Callable[[str], None],
    ) -> None:
        """
        Args:
            on_problem: told in one line of every damaged file, and once when nothing more can be written.

        Raises:
            ConfigError: the folder cannot be made, written or listed.
        """
        self._folder, self._on_problem = Path(folder), on_problem
        self._shard_bytes = min(shard_bytes, capacity_bytes // _FILES_AT_LEAST)
        self._buffer: dict[bytes, bytes] = {}
        self._buffered, self._writing = 0, True
        try:
            self._files = ShardFolder(self._folder, capacity_bytes, on_problem)
        except OSError as error:
            raise ConfigError(
                f"{self._folder}: feature cache cannot be written ({error.strerror}). Set EBFT_STUDY_CACHE to a folder "
                "that can be written, or features.cache_disk_gib=0 to keep features in memory only"
            ) from None

    def get(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """See `Cache.get`. A row that is damaged is not found, and its file is deleted."""
        found = {key: self._buffer[key] for key in keys if key in self._buffer}
        found.update(self._files.find(key for key in keys if key not in found))
        missing = [key for key in keys if key not in found]
        if missing and self._files.list_if_due():
            found.update(self._files.find(missing))
        return {key: _as_row(content) for key, content in found.items()}

    def put(self, rows: Mapping[bytes, np.ndarray]) -> None:
        """See `Cache.put`. Once a write has failed, nothing more is kept, and `on_problem` has been told why."""
        for key, row in rows.items():
            content = _row_content(key, row)
            if self._writing and key not in self._buffer and key not in self._files:
                self._buffer[key] = content
                self._buffered += len(content)
                if self._buffered >= self._shard_bytes:
                    self.flush()

    @property
    def used_bytes(self) -> int:
        """Bytes of the files in the folder, as far as this process knows of them."""
        return self._files.used_bytes

    def flush(self) -> None:
        """Write the rows that are still collected in memory, as one file per length of row."""
        rows, self._buffer, self._buffered = self._buffer, {}, 0
        if rows:
            self._files.list_if_due()
        by_length: defaultdict[int, dict[bytes, bytes]] = defaultdict(dict)
        for key, content in rows.items():
            if key not in self._files:  # another process may have written it meanwhile
                by_length[len(content)][key] = content
        try:
            for group in by_length.values():
                self._files.write(group)
        except OSError as error:
            self._stop_writing(error)

    def close(self) -> None:
        """See `Cache.close`. No file is open between calls."""
        self.flush()
        self._files.clear()

    def _stop_writing(self, error: OSError) -> None:
        self._writing = False
        self._on_problem(
            f"{self._folder}: feature cache cannot be written ({error.strerror}); no more features are kept on disk. "
            "Free space or set EBFT_STUDY_CACHE to another folder; results are not affected, only time"
        )


@dataclass(frozen=True)
class Hits:
    """Where distinct keys were found."""

    memory: int
    disk: int
    missed: int


class TieredCache:
    """Memory over disk: rows found on disk move up, rows put go to both. Without a disk it is the memory alone."""

    def __init__(self, memory: Cache, disk: Cache | None) -> None:
        self._memory, self._disk = memory, disk

    def get(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """See `Cache.get`."""
        return self.get_with_tiers(keys)[0]

    def get_with_tiers(self, keys: Sequence[bytes]) -> tuple[dict[bytes, np.ndarray], Hits]:
        """See `Cache.get`; also where the rows were found."""
        distinct = list(dict.fromkeys(keys))
        found = self._memory.get(distinct)
        missing = [key for key in distinct if key not in found]
        below = self._disk.get(missing) if self._disk is not None and missing else {}
        self._memory.put(below)
        hits = Hits(memory=len(found), disk=len(below), missed=len(missing) - len(below))
        return found | below, hits

    def put(self, rows: Mapping[bytes, np.ndarray], *, on_disk: bool = True) -> None:
        """See `Cache.put`; `on_disk`: they are worth a place there, too."""
        for tier in self._tiers() if on_disk else [self._memory]:
            tier.put(rows)

    @property
    def used_bytes(self) -> int:
        """Bytes of memory and disk together."""
        return sum(tier.used_bytes for tier in self._tiers())

    def flush(self) -> None:
        """See `Cache.flush`."""
        for tier in self._tiers():
            tier.flush()

    def close(self) -> None:
        """See `Cache.close`."""
        for tier in self._tiers():
            tier.close()

    def _tiers(self) -> list[Cache]:
        return [self._memory] if self._disk is None else [self._memory, self._disk]


def _row_content(key: bytes, row: np.ndarray) -> bytes:
    """A copy of the row's bytes; ValueError unless the key has 32 bytes and the row is float32, of shape [d], d > 0."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes, but got {len(key)}")
    if row.dtype != np.float32 or row.ndim != 1 or not row.size:
        raise ValueError(f"a row is float32 of shape [d], d > 0, but got {row.dtype} of shape {row.shape}")
    return row.tobytes()


def _as_row(content: bytes) -> np.ndarray:
    """The row with these bytes. It cannot be made writable, because bytes cannot."""
    return np.frombuffer(content, np.float32)
