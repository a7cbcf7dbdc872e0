"""Where studies live: a folder on a disk, or a prefix in an object store, with one interface.

`place("studies")`, `place("s3://bucket/prefix?endpoint_override=...")`. Importing this package imports no
pyarrow: it is loaded when the first store is opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ebft_study.storage import filesystems
from ebft_study.storage.base import Location, Place, explained
from ebft_study.storage.local import OnDisk
from ebft_study.storage.object_store import InStore

__all__ = ["Location", "Place", "absolute", "explained", "in_parallel", "place"]

T = TypeVar("T")
_REQUESTS_AT_ONCE = 16


def place(location: Location) -> Place:
    """The place that a path, a URL or a place names; refuses URLs that no store understands, or with credentials."""
    if isinstance(location, Place):
        return location
    text = os.fspath(location)
    if "://" not in text:
        return OnDisk(Path(text))
    url, query = filesystems.checked(text)
    if url.startswith("file://"):
        return OnDisk(Path(url.removeprefix("file://")))
    return InStore(url, query, filesystems.open_store(url, query)[1])


def absolute(location: Place) -> Place:
    """The same place, whatever the current folder is later."""
    return location if location.local is None else OnDisk(location.local.resolve())


def in_parallel(function: Callable[[Place], T], found: Iterable[Place]) -> list[T]:
    """`function` of each place in order; of places in a store, many at a time."""
    listed = list(found)
    if len(listed) < 2 or listed[0].local is not None:
        return [function(one) for one in listed]
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return list(pool.map(function, listed))
