"""Duplicated files: a study's essential files are each written with a hidden copy that carries its own hash.

The copy is written first. Whatever damages one of the two, the other is whole, and at most one change behind.
"""

from __future__ import annotations

import hashlib
from typing import Any

import yaml

from ebft_study.errors import NoFileError, one_line
from ebft_study.storage import StoragePath, storage_errors

_HASH_BYTES = 32


def write(target: StoragePath, content: bytes) -> None:
    """Write a file and its copy atomically."""
    copy_of(target).write_bytes(hashlib.sha256(content).digest() + content)
    target.write_bytes(content)


def delete(target: StoragePath) -> None:
    """Remove a file and its copy."""
    copy_of(target).delete()
    target.delete()


def copy_of(target: StoragePath) -> StoragePath:
    """The path of a file's copy. pandas, DuckDB and pyarrow ignore names that begin with a dot."""
    return target.parent / f".{target.name}.copy"


def name_of_copied(name: str) -> str | None:
    """The name of the file that `name` is the copy of; None where it is no copy."""
    return name[1:-5] if name.startswith(".") and name.endswith(".copy") else None


def either_exists(target: StoragePath) -> bool:
    """Whether the file or its copy exists."""
    return target.exists() or copy_of(target).exists()


def read_copy(target: StoragePath) -> bytes | None:
    """The content of the copy; None where it is missing or damaged."""
    try:
        stored = copy_of(target).read_bytes()
    except (FileNotFoundError, NoFileError):
        return None
    digest, content = stored[:_HASH_BYTES], stored[_HASH_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None


def read_verified(target: StoragePath) -> tuple[bytes | None, str, bool]:
    """The content of a duplicated file, the problem with one of the two, and whether a hash vouches for the content.

    The content is None where there is neither. The copy counts where both are there and differ: it proves itself whole,
    and is never the older one.
    """
    copy = read_copy(target)
    try:
        content = target.read_bytes()
    except FileNotFoundError:
        damaged = copy is None and copy_of(target).exists()
        problem = f"{target}: is missing, and its copy is damaged" if damaged else ""  # the copy is written first
        return copy, problem, copy is not None
    except NoFileError as error:
        return copy, str(error), copy is not None
    if copy is None:
        return content, _damage_of_copy(target), False
    return copy, "" if content == copy else f"{target}: is damaged, its copy is used", True


def repair(target: StoragePath) -> None:
    """Write the mapping of a duplicated file again where the file or its copy is missing or damaged."""
    with storage_errors(target, "repaired"):
        record, problem = read_mapping(target)
        if problem and record is not None:
            copy = read_copy(target)
            write(target, target.read_bytes() if copy is None else copy)


def _damage_of_copy(target: StoragePath) -> str:
    """The problem with a copy that proves nothing: none where there is no copy."""
    return f"{target}: its copy is damaged" if copy_of(target).exists() else ""


def read_mapping(path: StoragePath) -> tuple[dict[str, Any] | None, str]:
    """The YAML mapping of a duplicated file, and the problem of the file itself; None where neither can be read.

    Raises:
        FileNotFoundError: both the file and its copy are missing.
    """
    copy = read_copy(path)
    try:
        content = path.read_bytes()
        if copy is not None and len(content) < len(copy) and copy.startswith(content):  # nobody edits so
            return _mapping(copy), f"{path}: is cut short; its copy is used"
        return _mapping(content), _damage_of_copy(path) if copy is None else ""
    except FileNotFoundError:
        if copy is None:
            raise
        problem = "is missing"
    except (NoFileError, OSError, ValueError, yaml.YAMLError, TypeError, RecursionError) as error:
        problem = f"cannot be read ({one_line(error)})"
    if copy is None:
        return None, f"{path}: {problem}"
    return _mapping(copy), f"{path}: {problem}; its copy is used"


def is_changed(path: StoragePath, mapping: dict[str, Any]) -> bool:
    """Whether the mapping of a duplicated file differs from that of its copy."""
    copy = read_copy(path)
    return copy is not None and _mapping(copy) != mapping


def _mapping(content: bytes) -> dict[str, Any]:
    parsed = yaml.safe_load(content.decode("utf-8"))
    if not isinstance(parsed, dict):
        raise TypeError(f"holds {type(parsed).__name__}, not a mapping")
    return parsed
