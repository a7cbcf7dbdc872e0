"""Files that a study cannot do without are kept twice: the file, and a hidden copy that knows its own hash.

The copy is written first. Whatever happens to one of the two, the other is whole, and at most one change behind.
"""

from __future__ import annotations

import hashlib

from ebft_study.storage import StoragePath

_HASH_BYTES = 32


def write(target: StoragePath, content: bytes) -> None:
    """Put a file and its copy in place."""
    copy_of(target).write_bytes(hashlib.sha256(content).digest() + content)
    target.write_bytes(content)


def copy_of(target: StoragePath) -> StoragePath:
    """Where the copy of a file is. pandas, DuckDB and pyarrow pass over names that begin with a dot."""
    return target.parent / f".{target.name}.copy"


def name_of_copied(name: str) -> str | None:
    """The file that `name` is the copy of, None where it is no copy."""
    return name[1:-5] if name.startswith(".") and name.endswith(".copy") else None


def either_exists(target: StoragePath) -> bool:
    """Whether there is the file or its copy."""
    return target.exists() or copy_of(target).exists()


def read_copy(target: StoragePath) -> bytes | None:
    """What the copy holds; None where there is none, or where it is damaged too."""
    try:
        content = copy_of(target).read_bytes()
    except FileNotFoundError:
        return None
    digest, content = content[:_HASH_BYTES], content[_HASH_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None
