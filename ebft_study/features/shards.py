"""The feature cache's files: a folder of immutable safetensors files of rows, each able to tell damage from content.

A file is written whole under another name and then renamed: a reader sees all of it or nothing. It is read by position
and never mapped into memory, because a file that goes away under a map kills its reader; a read that fails is a miss.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

KEY_BYTES = 32
LISTING_SECONDS = 5.0
"""Files of other processes are looked for at most this often."""
REFRESH_SECONDS = 60.0
"""A hit marks its file as used at most this often."""

_FILL_AFTER_EVICTION = 0.9  # of the capacity, so that not every write has to ask for the age of every file
_ROWS_AT_MOST = 2**32  # per file
_CHECKSUM_BYTES = 8
_LONGEST_HEADER = 4096  # bytes; the three tensors need some 200
_LEFT_BEHIND = 3600.0  # seconds after which a temporary file has no writer any more
# No other file is opened or deleted, whatever folder the cache is pointed at.
_SHARD_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
_TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{32}\.tmp")


class DamagedShardError(Exception):
    """The content of a shard is not what was written."""


@dataclass
class Shard:
    """Where the rows of one file stand. The file is closed between reads: descriptors never run out."""

    path: Path
    keys: list[bytes]
    checksums: bytes
    start: int
    """Bytes of the file before its first row."""
    row_bytes: int
    size: int
    """Bytes of the whole file."""
    refreshed: float = -math.inf
    """When a hit last moved the file's modification time: seconds, as `time.monotonic` counts."""

    def read(self, numbers: Iterable[int]) -> Iterator[tuple[bytes, bytes]]:
        """Key and content of the rows with these numbers, each checked before it is given.

        Raises:
            DamagedShardError: a row is not what was written; rows given before it are.
            OSError: the file cannot be read, or is there no more.
        """
        with open(self.path, "rb", buffering=0) as file:
            for number in numbers:
                content = _read_exactly(file.fileno(), self.row_bytes, self.start + number * self.row_bytes)
                expected = self.checksums[number * _CHECKSUM_BYTES : (number + 1) * _CHECKSUM_BYTES]
                if _checksum(self.keys[number], content) != expected:
                    raise DamagedShardError(f"row {number} does not match its checksum")
                yield self.keys[number], content

    def last_used(self) -> int:
        """Modification time of the file in nanoseconds; 0 where it cannot be told, as for a file deleted by others."""
        try:
            return self.path.stat().st_mtime_ns
        except OSError:
            return 0


def encode_shard(rows: Mapping[bytes, bytes]) -> bytes:
    """The file of these rows, all of one length: keys [N, 32], checksums [N, 8] and features [N, d]."""
    checksums = b"".join(_checksum(key, content) for key, content in rows.items())
    tensors: dict[str, np.ndarray] = {
        "keys": np.frombuffer(b"".join(rows), np.uint8),
        "checksums": np.frombuffer(checksums, np.uint8),
        "features": np.frombuffer(b"".join(rows.values()), np.float32),
    }
    content: bytes = safetensors.numpy.save({name: part.reshape(len(rows), -1) for name, part in tensors.items()})
    return content


def write_shard(folder: Path, content: bytes) -> Path:
    """Put a file of a new name in place; OSError where that fails, and then nothing is left behind."""
    token = secrets.token_hex(16)
    path, temporary = folder / f"{token}.safetensors", folder / f".{token}.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # Not synced to the disk: what a power cut damages is found by its checksum, and only costs time.
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def open_shard(path: Path) -> Shard:
    """The shard in `path`, its layout checked against the size of the file, its rows not yet read.

    Raises:
        DamagedShardError: the file is not a whole shard.
        OSError: the file cannot be read, or is there no more.
    """
    with open(path, "rb", buffering=0) as file:
        descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size
        start = 8 + int.from_bytes(_read_exactly(descriptor, 8, 0), "little")
        if start > min(size, _LONGEST_HEADER):
            raise DamagedShardError("its header is too long")
        offsets = _offsets(_read_exactly(descriptor, start - 8, 8), size - start)
        (rows, end), sums, keys = (offsets[name] for name in ("features", "checksums", "keys"))
        checksums = _read_exactly(descriptor, sums[1] - sums[0], start + sums[0])
        joined = _read_exactly(descriptor, keys[1] - keys[0], start + keys[0])
    split = [joined[at : at + KEY_BYTES] for at in range(0, len(joined), KEY_BYTES)]
    return Shard(path, split, checksums, start + rows, (end - rows) // len(split), size)


class ShardFolder:
    """The rows in a folder's files, at most `capacity_bytes` of files: those used least recently are deleted.

    Other processes may add and delete files at any time. What they add is found within `LISTING_SECONDS`, and may take
    the folder over its capacity until this process writes again.
    """

    def __init__(self, folder: Path, capacity_bytes: int, on_problem: Callable[[str], None]) -> None:
        """`on_problem` is told of every damaged file; OSError unless the folder can be made, written and listed."""
        self._folder, self._capacity, self._on_problem = folder, capacity_bytes, on_problem
        self._shards: dict[int, Shard] = {}
        # Values are shard number * _ROWS_AT_MOST + row number: one small object, which garbage collection passes over.
        self._index: dict[bytes, int] = {}
        self._seen: set[str] = set()
        self._opened, self._listed = 0, -math.inf
        self._prepare()
        self.list_if_due()
        self._make_room(0)

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    @property
    def used_bytes(self) -> int:
        """Bytes of the files, as far as this process knows of them."""
        return sum(shard.size for shard in self._shards.values())

    def find(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """Content of the rows that are there. One that is damaged is not found, and its file is deleted."""
        by_shard: defaultdict[int, set[int]] = defaultdict(set)
        for key in keys:
            if key in self._index:
                number, row = divmod(self._index[key], _ROWS_AT_MOST)
                by_shard[number].add(row)
        found: dict[bytes, bytes] = {}
        for number, rows in by_shard.items():
            found.update(self._read(number, sorted(rows)))
        return found

    def write(self, rows: Mapping[bytes, bytes]) -> None:
        """Add rows of one length as one file, unless it alone is over the capacity; OSError where that fails."""
        content = encode_shard(rows)
        if len(content) <= self._capacity:
            self._make_room(len(content))
            self._open(write_shard(self._folder, content))

    def list_if_due(self) -> bool:
        """Take notice of files that others have added or deleted, unless that was done a moment ago."""
        if time.monotonic() - self._listed < LISTING_SECONDS:
            return False
        self._list()
        return True

    def clear(self) -> None:
        """Free the memory; the files stay."""
        self._shards.clear()
        self._index.clear()

    def _prepare(self) -> None:
        """Make the folder, and remove what killed writers left there."""
        self._folder.mkdir(parents=True, exist_ok=True)
        probe = self._folder / f".{secrets.token_hex(16)}.tmp"
        probe.touch()
        now = probe.stat().st_mtime  # the clock of the file system, which may be another machine's
        probe.unlink()
        for name in filter(_TEMPORARY_NAME.fullmatch, os.listdir(self._folder)):
            with contextlib.suppress(OSError):
                if (self._folder / name).stat().st_mtime < now - _LEFT_BEHIND:
                    (self._folder / name).unlink()

    def _read(self, number: int, rows: Iterable[int]) -> dict[bytes, bytes]:
        found, shard = {}, self._shards[number]
        try:
            for key, content in shard.read(rows):
                found[key] = content  # kept even where a later row turns out damaged
        except (DamagedShardError, OSError) as error:
            self._forget(number)
            self._refuse(shard.path, error)
        if found and time.monotonic() - shard.refreshed >= REFRESH_SECONDS:
            shard.refreshed = time.monotonic()
            with contextlib.suppress(OSError):  # evicted too early at worst
                os.utime(shard.path)
        return found

    def _make_room(self, n_bytes: int) -> None:
        """Delete the files used least recently until `n_bytes` more fit; OSError where one cannot be deleted."""
        if self.used_bytes + n_bytes <= self._capacity:
            return
        self._list()
        excess = self.used_bytes + n_bytes - _FILL_AFTER_EVICTION * self._capacity
        # Files of one age, as coarse clocks make them, go in the order in which they were opened.
        for number in sorted(self._shards, key=lambda number: self._shards[number].last_used()):
            if excess <= 0:
                break
            self._shards[number].path.unlink(missing_ok=True)
            excess -= self._shards[number].size
            self._forget(number)

    def _list(self) -> None:
        self._listed = time.monotonic()
        try:
            names = set(filter(_SHARD_NAME.fullmatch, os.listdir(self._folder)))
        except OSError:  # no news
            return
        for number in [number for number, shard in self._shards.items() if shard.path.name not in names]:
            self._forget(number)
        for name in sorted(names - self._seen):
            self._open(self._folder / name)
        self._seen &= names

    def _open(self, path: Path) -> None:
        # Names are never used again: what was refused or evicted once is not opened a second time.
        self._seen.add(path.name)
        try:
            shard = open_shard(path)
        except (DamagedShardError, OSError) as error:
            self._refuse(path, error)
            return
        number, self._opened = self._opened, self._opened + 1
        self._shards[number] = shard
        self._index.update(zip(shard.keys, range(number * _ROWS_AT_MOST, (number + 1) * _ROWS_AT_MOST), strict=False))

    def _forget(self, number: int) -> None:
        for key in self._shards.pop(number).keys:
            if self._index.get(key, -1) // _ROWS_AT_MOST == number:
                del self._index[key]

    def _refuse(self, path: Path, error: DamagedShardError | OSError) -> None:
        """Say why a file is not used, and delete a damaged one. One that others deleted is no problem."""
        if isinstance(error, OSError):
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                self._on_problem(f"{path}: cannot be read ({error.strerror}); its features are computed again")
            return
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        self._on_problem(f"{path}: damaged, {error}; it is deleted, and its features are computed again")


def _checksum(key: bytes, content: bytes) -> bytes:
    state = hashlib.blake2b(key, digest_size=_CHECKSUM_BYTES)
    state.update(content)
    return state.digest()


def _read_exactly(descriptor: int, count: int, offset: int) -> bytes:
    content = os.pread(descriptor, count, offset)
    if len(content) != count:
        raise DamagedShardError("it is shorter than what was written")
    return content


def _offsets(header: bytes, size: int) -> dict[str, tuple[int, int]]:
    """First byte and end of each tensor, counted from the end of the header; the file has `size` bytes after it."""
    try:
        tensors = json.loads(header)
        n, d = (int(extent) for extent in tensors["features"]["shape"])
        found = {name: _extent(tensors[name]) for name in ("features", "checksums", "keys")}
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise DamagedShardError("its header cannot be read") from None
    expected = {
        "features": ("F32", [n, d], 4 * n * d),
        "checksums": ("U8", [n, _CHECKSUM_BYTES], n * _CHECKSUM_BYTES),
        "keys": ("U8", [n, KEY_BYTES], n * KEY_BYTES),
    }
    laid_out = {name: (dtype, shape, end - begin) for name, (dtype, shape, begin, end) in found.items()}
    inside = all(0 <= begin < end <= size for _, _, begin, end in found.values())
    if laid_out != expected or not inside or sum(extent for _, _, extent in expected.values()) != size:
        raise DamagedShardError("its header does not describe a shard of its size")
    return {name: (begin, end) for name, (_, _, begin, end) in found.items()}


def _extent(tensor: Mapping[str, Any]) -> tuple[str, list[int], int, int]:
    begin, end = (int(offset) for offset in tensor["data_offsets"])
    return tensor["dtype"], tensor["shape"], begin, end
