"""Files of results that were written and are gone: every writer numbers its files without gaps.

A compacted file keeps of each writer how many of its files were merged, and the highest number among them.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from ebft_study.errors import EbftError
from ebft_study.storage import StoragePath, in_parallel

COMPACTED_PREFIX = "compacted-"
WRITERS = b"writers"
"""Key of a compacted file's metadata: writer -> number of its files, and the highest of their numbers, as JSON."""
_NUMBERED = re.compile(r"(?P<attempt>.+-a\d+)-(?P<number>\d{6})-(?P<token>[0-9a-f]{8})-[0-9a-f]{16}\.parquet")
"""Names without a digest are of earlier versions, whose writers also counted what they could not write."""

Counts = dict[str, tuple[int, int]]


def missing_files(results: StoragePath, visible_files: Callable[[], Iterable[StoragePath]]) -> list[str]:
    """A problem for every attempt of which files are missing; its last ones nobody misses."""
    problems: list[str] = []
    for _ in range(3):  # what is written or merged meanwhile is there the next time
        problems = [
            f"{results}: files of {writer.rpartition('-')[0]} are missing ({highest + 1 - number} of {highest + 1}). "
            "Restore them"
            for writer, (number, highest) in sorted(counted(visible_files()).items())
            if number <= highest
        ]
        if not problems:
            break
    return problems


def counted(paths: Iterable[StoragePath]) -> Counts:
    """Of each writer the number of its files among `paths`, merged ones included, and the highest of their numbers."""
    total = defaultdict[str, tuple[int, int]](lambda: (0, -1))
    names, merged = list[str](), list[StoragePath]()
    for path in paths:
        if path.name.startswith(COMPACTED_PREFIX):
            merged.append(path)
        else:
            names.append(path.name)
    small = [match for match in map(_NUMBERED.fullmatch, names) if match]
    parts: list[Mapping[str, tuple[int, int]]] = [
        {f"{match['attempt']}-{match['token']}": (1, int(match["number"]))} for match in small
    ]
    for part in parts + in_parallel(_merged, merged):
        for writer, (number, highest) in part.items():
            total[writer] = (total[writer][0] + number, max(total[writer][1], highest))
    return dict(total)


def _merged(path: StoragePath) -> Counts:
    try:
        return {
            writer: (int(n), int(highest))
            for writer, (n, highest) in json.loads(metadata(path).get(WRITERS, b"{}")).items()
        }
    except (ValueError, TypeError, AttributeError):
        return {}  # reading the rows says what is wrong with it


def metadata(path: StoragePath) -> dict[bytes, bytes]:
    """The metadata of a Parquet file; empty where it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file:
            return pq.read_metadata(file).metadata or {}
    except (pa.ArrowException, OSError, EbftError, ValueError, TypeError):
        return {}
