"""Storage of studies: a folder on a disk, or a prefix in an object store, behind one interface.

`storage_path("studies")` is a `LocalPath`, `storage_path("s3://bucket/prefix?region=...")` an `ObjectStorePath`: both
have the same methods. Importing this package imports no pyarrow: it is loaded when the first store is opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias, TypeVar

from ebft_study.storage import filesystems
from ebft_study.storage.filesystems import storage_errors
from ebft_study.storage.local import LocalPath, atomic_write, open_file, remove_leftovers
from ebft_study.storage.object_store import ObjectStorePath

__all__ = [
    "Location",
    "StoragePath",
    "absolute",
    "atomic_write",
    "in_parallel",
    "open_file",
    "remove_leftovers",
    "storage_errors",
    "storage_path",
]

T = TypeVar("T")
StoragePath: TypeAlias = LocalPath | ObjectStorePath
Location: TypeAlias = str | os.PathLike[str] | StoragePath
_CONCURRENT_REQUESTS = 16


def storage_path(location: Location) -> StoragePath:
    """The storage path of a path or a URL; refuses URLs with credentials, or that no file system understands."""
    if isinstance(location, StoragePath):
        return location
    text = os.fspath(location)
    if "://" not in text:
        return LocalPath(text)
    url, query = filesystems.split_url(text)
    if url.startswith("file://"):
        return LocalPath(url.removeprefix("file://"))
    return ObjectStorePath.from_url(url, query)


def absolute(path: StoragePath) -> StoragePath:
    """The same path, whatever the current folder is later."""
    return path.resolve() if isinstance(path, LocalPath) else path


def in_parallel(function: Callable[[StoragePath], T], paths: Iterable[StoragePath]) -> list[T]:
    """`function` of each path, in order; paths in a store are handled concurrently."""
    listed = list(paths)
    if len(listed) < 2 or isinstance(listed[0], LocalPath):
        return [function(path) for path in listed]
    with ThreadPoolExecutor(_CONCURRENT_REQUESTS) as pool:
        return list(pool.map(function, listed))
