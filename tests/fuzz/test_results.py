"""Folders of results that are not as their writers left them: the same tables, the damage named, or one line."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**63,
    1e308,
    float("nan"),
    "",
    "x",
    "[red]",
    "a" * 300,
    [],
    {},
    [1],
    {"a": 1},
]
DEEP = b"[" * 20000 + b"]" * 20000


# --- damage ------------------------------------------------------------------------------------------------------


def damage(folder: Path, draw: Random) -> str:
    """Change one file of a study; returns how."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".compact.lock")
    kinds = sorted({_kind(path) for path in files})
    kind = draw.choice(kinds)
    path = draw.choice([path for path in files if _kind(path) == kind])
    how = draw.choice(HOW)
    how(path, draw)
    return f"{how.__name__} {path.relative_to(folder)}"


def _kind(path: Path) -> str:
    """Files of one kind are read by the same code."""
    return re.sub(r"t\d{4}(-a?\d+)?|[0-9a-f]{8,}|\d{6,}", "", f"{path.parent.name}/{path.name}")


def flipped(path: Path, draw: Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 1, 4])):
        if content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncated(path: Path, draw: Random) -> None:
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: draw.randrange(size) if size else 0])


def zeroed(path: Path, draw: Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def replaced(path: Path, draw: Random) -> None:
    path.write_bytes(
        draw.choice([b"", b"\0", b"{}", b"[]", b"null", b"PAR1PAR1", b"\xff\xfe", b"a: &a [*a]", DEEP, b"1" * 5000])
    )


def in_other_words(path: Path, draw: Random) -> None:
    """Another value somewhere in YAML or JSON; of other files, some bytes."""
    try:
        content = json.loads(path.read_bytes()) if path.suffix == ".json" else study_content(path)
        where = draw.choice([*places(content)])
        node = functools.reduce(lambda inner, key: inner[key], where[:-1], content)
        if draw.random() < 0.2:
            del node[where[-1]]
        else:
            node[where[-1]] = draw.choice(VALUES)
        path.write_text(json.dumps(content))  # which is YAML, too
    except (ValueError, TypeError, IndexError):
        flipped(path, draw)


def missing(path: Path, draw: Random) -> None:
    path.unlink()


def duplicated(path: Path, draw: Random) -> None:
    shutil.copy(
        path, path.with_name(draw.choice([f"copy-{path.name}", f"{path.stem}-1{path.suffix}", path.name.upper()]))
    )


def a_folder(path: Path, draw: Random) -> None:
    path.unlink()
    path.mkdir()


def a_link(path: Path, draw: Random) -> None:
    path.unlink()
    path.symlink_to(draw.choice([path.name, "..", "/nowhere", "../.."]))


def foreign(path: Path, draw: Random) -> None:
    name = draw.choice(
        ["README.txt", "x.parquet", ".hidden", "_x.parquet", "t9999.parquet", "a b", "é", "checkpoint_x", "t0000-x"]
    )
    content = draw.choice([b"", b"hello", path.read_bytes()])
    path.with_name(name).write_bytes(content)


HOW: list[Callable[[Path, Random], None]] = [
    flipped, flipped, flipped, truncated, zeroed, replaced, in_other_words, in_other_words, missing, duplicated, a_folder,
    a_link, foreign,
]  # fmt: skip


def study_content(path: Path) -> Any:
    import yaml

    if path.suffix != ".yaml":
        raise ValueError(path)
    return yaml.safe_load(path.read_text())


def places(node: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in inner:
        yield (*above, key)
        yield from places(child, (*above, key))
