"""A cache of feature vectors under 32-byte keys: memory over disk.

A vector is found under its key bit for bit or not at all: every row on disk has a checksum, so a wrong hit is
impossible, and a lost row only costs the time to compute it again. A cache is used by one thread. Any number of
processes may use one folder, of one study or several.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ebft_study.errors import ConfigError
from ebft_study.features import NetworkOptions
from ebft_study.features.keys import KEY_BYTES
from ebft_study.paths import cache_folder

ENTRY_OVERHEAD = 320
"""Bytes of memory per row beyond its content: two bytes objects, the entry of an OrderedDict, and the allocator's loss.

An upper bound: tracemalloc shows 170 to 300 for 1,000 to 350,000 rows of 1 to 4608 numbers, old rows evicted or not.
"""
_LOCK_SECONDS = 30.0  # a transaction of another process takes less than a second
_CHECKSUM_BYTES = 8
_ERRORS = (sqlite3.Error, UnicodeDecodeError)  # the latter from names and messages in a damaged file
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS rows (key BLOB UNIQUE, used REAL, content BLOB)",
    "CREATE INDEX IF NOT EXISTS rows_used ON rows (used)",
)


class Cache(Protocol):
    """Returns rows as they were put, bit for bit, until newer rows displace them."""

    def get(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """Return the rows in the cache: read-only, float32 of shape [d]."""
        ...

    def put(self, rows: Mapping[bytes, np.ndarray]) -> None:
        """Store copies of the rows; a key that the cache has is left as it is.

        Raises:
            ValueError: a key is not 32 bytes long, or a row is not float32 of shape [d], d > 0.
        """
        ...

    @property
    def used_bytes(self) -> int:
        """Bytes that count towards the capacity."""
        ...


class MemoryCache:
    """Keeps the most recently used rows, up to `capacity_bytes` of content and overhead."""

    def __init__(self, capacity_bytes: int) -> None:
        self.used_bytes = 0
        self._capacity = capacity_bytes
        self._rows: OrderedDict[bytes, bytes] = OrderedDict()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """See `Cache.get`. A hit makes a row the most recently used one."""
        hits = [key for key in keys if key in self._rows]
        for key in hits:
            self._rows.move_to_end(key)
        return {key: _as_row(self._rows[key]) for key in hits}

    def put(self, rows: Mapping[bytes, np.ndarray]) -> None:
        """See `Cache.put`. A row that alone exceeds the capacity is not stored."""
        for key, row in rows.items():
            content = _row_content(key, row)
            if key in self._rows:
                self._rows.move_to_end(key)
            elif len(content) + ENTRY_OVERHEAD <= self._capacity:
                self._rows[key] = content
                self.used_bytes += len(content) + ENTRY_OVERHEAD
        while self.used_bytes > self._capacity:
            _, content = self._rows.popitem(last=False)
            self.used_bytes -= len(content) + ENTRY_OVERHEAD


class DiskCache:
    """Keeps the most recently used rows in one SQLite file, up to `capacity_bytes` of file.

    Each call opens the file, so a file that another process deletes is noticed by the next call. SQLite's rollback
    journal makes a transaction atomic for other processes and when its writer is killed. Nothing is synced to disk:
    damage by a power cut is found by SQLite or by a checksum.
    """

    def __init__(self, folder: Path, capacity_bytes: int, *, on_problem: Callable[[str], None]) -> None:
        """
        Args:
            on_problem: receives one line for every damage, and one when the disk can no longer be read or written.

        Raises:
            ConfigError: the folder cannot be made or written.
        """
        self._path = Path(folder) / "features.sqlite"
        self._capacity, self._on_problem = capacity_bytes, on_problem
        self._readable = self._writable = True
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ConfigError(
                f"{folder}: feature cache cannot be written ({error.strerror}). Set EBFT_STUDY_CACHE to a folder "
                "that can be written, or features.cache_disk_gib=0 to keep features in memory only"
            ) from None
        # The capacity may have been lowered since the last study.
        if self.used_bytes > capacity_bytes:
            self._write({})

    def get(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """See `Cache.get`. A damaged row is a miss, and is deleted."""
        if not (keys and self.used_bytes and self._readable):
            return {}
        stored: dict[bytes, bytes] = {}
        try:
            with self._transaction("BEGIN") as database:
                for key in keys:
                    for (content,) in database.execute("SELECT content FROM rows WHERE key = ?", (key,)):
                        stored[key] = content
        except _ERRORS as error:
            if not self._delete_if_damaged(error):
                self._readable = False
                self._on_problem(f"{self._path}: cannot be read ({error}); its features are computed again")
            return {}
        damaged = [(key,) for key, content in stored.items() if not _is_intact(key, content)]
        if damaged:
            self._on_problem(f"{self._path}: {len(damaged)} damaged rows; they are deleted and computed again")
            self._change("DELETE FROM rows WHERE key = ?", damaged)
        hits = {key: _as_row(stored[key][_CHECKSUM_BYTES:]) for key in stored.keys() - {key for (key,) in damaged}}
        self._change("UPDATE rows SET used = ? WHERE key = ?", [(time.time(), key) for key in hits])
        return hits

    def put(self, rows: Mapping[bytes, np.ndarray]) -> None:
        """See `Cache.put`. A row of more than half the capacity is not stored; after a failed write none is."""
        contents = {key: _row_content(key, row) for key, row in rows.items()}
        fitting = {key: content for key, content in contents.items() if 2 * len(content) <= self._capacity}
        if fitting and self._writable:
            self._write(fitting)

    @property
    def used_bytes(self) -> int:
        """Bytes of the file."""
        try:
            return self._path.stat().st_size
        except OSError:
            return 0

    def _write(self, contents: Mapping[bytes, bytes]) -> None:
        now = time.time()
        entries = [(key, now, _checksum(key, content) + content) for key, content in contents.items()]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._transaction("BEGIN IMMEDIATE") as database:
                self._evict(database, sum(len(content) for *_, content in entries))
                database.executemany("INSERT OR IGNORE INTO rows VALUES (?, ?, ?)", entries)
                self._evict(database, 0)
        except (OSError, *_ERRORS) as error:
            if not self._delete_if_damaged(error):
                self._writable = False
                self._on_problem(
                    f"{self._path.parent}: feature cache cannot be written ({error}); no more features are stored on "
                    "disk. Free space or set EBFT_STUDY_CACHE to another folder; results are not affected, only time"
                )

    def _change(self, statement: str, parameters: Sequence[tuple[object, ...]]) -> None:
        """Change rows. Where that fails, rows are evicted too early, or damage is found again."""
        with contextlib.suppress(*_ERRORS), self._transaction("BEGIN IMMEDIATE") as database:
            database.executemany(statement, parameters)

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        """Open the file for one transaction; closing it rolls back what an error interrupts."""
        connection = sqlite3.connect(self._path, timeout=_LOCK_SECONDS, isolation_level=None)
        with contextlib.closing(connection) as database:
            database.execute("PRAGMA synchronous = OFF")
            if not self.used_bytes:
                # Of an existing file, the second one would be written anew every time.
                database.execute("PRAGMA page_size = 2048")
                database.execute("PRAGMA auto_vacuum = INCREMENTAL")
            database.execute(begin)
            for statement in _SCHEMA:
                database.execute(statement)
            yield database
            database.execute("COMMIT")

    def _evict(self, database: sqlite3.Connection, n_bytes: int) -> None:
        """Delete the least recently used rows until `n_bytes` more fit, and shorten a file over the capacity."""

        def pragma(name: str) -> int:
            return int(database.execute(f"PRAGMA {name}").fetchone()[0])

        page_bytes, doomed = pragma("page_size"), [(0,)]
        # Rows share pages, so deleting their bytes may free fewer.
        while doomed:
            excess = (pragma("page_count") - pragma("freelist_count")) * page_bytes + n_bytes - self._capacity
            doomed = []
            for rowid, size in database.execute("SELECT rowid, length(content) FROM rows ORDER BY used, rowid"):
                if excess <= 0:
                    break
                doomed.append((rowid,))
                excess -= size
            database.executemany("DELETE FROM rows WHERE rowid = ?", doomed)
        excess_pages = pragma("page_count") - self._capacity // page_bytes
        for _ in range(excess_pages):
            # A larger argument would not help: the sqlite3 module runs the first page's step only.
            database.execute("PRAGMA incremental_vacuum(1)")

    def _delete_if_damaged(self, error: Exception) -> bool:
        """Delete a file that SQLite cannot make sense of; False where the error has another cause."""
        schema_is_wrong = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR
        if isinstance(error, OSError | sqlite3.OperationalError) and not schema_is_wrong:
            return False
        with contextlib.suppress(OSError):
            # A journal must never be applied to another file than its own.
            self._path.with_name(f"{self._path.name}-journal").unlink(missing_ok=True)
            self._path.unlink(missing_ok=True)
        self._on_problem(f"{self._path}: damaged ({error}); it is deleted, and its features are computed again")
        return True


@dataclass(frozen=True)
class Hits:
    """Numbers of distinct keys by where they were found."""

    memory: int
    disk: int
    missed: int


class TieredCache:
    """Memory over disk: a hit on disk moves up, `put` writes to both. Without a disk it is the memory alone."""

    def __init__(self, memory: Cache, disk: Cache | None) -> None:
        self._memory, self._disk = memory, disk

    def get(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """See `Cache.get`."""
        return self.get_with_tiers(keys)[0]

    def get_with_tiers(self, keys: Sequence[bytes]) -> tuple[dict[bytes, np.ndarray], Hits]:
        """See `Cache.get`; also counts the hits of each tier."""
        distinct = list(dict.fromkeys(keys))
        in_memory = self._memory.get(distinct)
        missing = [key for key in distinct if key not in in_memory]
        on_disk = self._disk.get(missing) if self._disk is not None else {}
        self._memory.put(on_disk)
        hits = Hits(memory=len(in_memory), disk=len(on_disk), missed=len(missing) - len(on_disk))
        return in_memory | on_disk, hits

    def put(self, rows: Mapping[bytes, np.ndarray], *, on_disk: bool = True) -> None:
        """See `Cache.put`; `on_disk`: they are worth keeping there, too."""
        self._memory.put(rows)
        if self._disk is not None and on_disk:
            self._disk.put(rows)

    @property
    def used_bytes(self) -> int:
        """Bytes in memory and on disk, in total."""
        return self._memory.used_bytes + (self._disk.used_bytes if self._disk is not None else 0)


def open_cache(options: NetworkOptions, on_problem: Callable[[str], None]) -> TieredCache:
    """Open the cache of a feature service; see `DiskCache` for `on_problem`.

    Raises:
        ConfigError: the cache folder cannot be written.
    """
    disk: Cache | None = None
    if options.disk_bytes:
        disk = DiskCache(cache_folder() / "features", options.disk_bytes, on_problem=on_problem)
    return TieredCache(MemoryCache(options.memory_bytes), disk)


def _row_content(key: bytes, row: np.ndarray) -> bytes:
    """Copy the row's bytes; ValueError unless the key has 32 bytes and the row is float32 of shape [d], d > 0."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes, but got {len(key)}")
    if row.dtype != np.float32 or row.ndim != 1 or not row.size:
        raise ValueError(f"a row is float32 of shape [d], d > 0, but got {row.dtype} of shape {row.shape}")
    return row.tobytes()


def _as_row(content: bytes) -> np.ndarray:
    """Return the row with these bytes, read-only as bytes are."""
    return np.frombuffer(content, np.float32)


def _checksum(key: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(key + content, digest_size=_CHECKSUM_BYTES).digest()


def _is_intact(key: bytes, stored: object) -> bool:
    """Whether the stored checksum and content belong to the key; damage may change even the type."""
    return isinstance(stored, bytes) and stored[:_CHECKSUM_BYTES] == _checksum(key, stored[_CHECKSUM_BYTES:])
