"""Where studies live: a folder on a disk, or a prefix in an object store, with one interface.

`storage_path("studies")`, `storage_path("s3://bucket/prefix?endpoint_override=...")`. Importing this package imports no
pyarrow: it is loaded when the first store is opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ebft_study.storage import filesystems
from ebft_study.storage.base import Location, StoragePath, storage_errors
from ebft_study.storage.local import LocalPath
from ebft_study.storage.object_store import ObjectStorePath

__all__ = ["Location", "StoragePath", "absolute", "in_parallel", "storage_errors", "storage_path"]

T = TypeVar("T")
_REQUESTS_AT_ONCE = 16


def storage_path(location: Location) -> StoragePath:
    """The place that a path, a URL or a place names; refuses URLs that no store understands, or with credentials."""
    if isinstance(location, StoragePath):
        return location
    text = os.fspath(location)
    if "://" not in text:
        return LocalPath(Path(text))
    url, query = filesystems.checked(text)
    if url.startswith("file://"):
        return LocalPath(Path(url.removeprefix("file://")))
    return ObjectStorePath(url, query, filesystems.open_store(url, query)[1])


def absolute(location: StoragePath) -> StoragePath:
    """The same place, whatever the current folder is later."""
    return location if location.local is None else LocalPath(location.local.resolve())


def in_parallel(function: Callable[[StoragePath], T], found: Iterable[StoragePath]) -> list[T]:
    """`function` of each place in order; of places in a store, many at a time."""
    listed = list(found)
    if len(listed) < 2 or listed[0].local is not None:
        return [function(one) for one in listed]
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return list(pool.map(function, listed))
