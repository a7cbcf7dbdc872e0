"""Archives of files with a manifest: equal content gives equal bytes, and reading trusts nothing.

An archive is a zip file without compression, so that nothing in it is larger than it is. Entries are in order of their
names, with one time and no attributes. `MANIFEST.json` has the size and the SHA-256 of every other entry: whoever
changes both goes unnoticed, so publish the archive's own digest where that matters.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebft_study.errors import ResultsError, one_line
from ebft_study.storage import open_file

MANIFEST = "MANIFEST.json"
FORMAT = 1
MAX_FILES, MAX_BYTES, MAX_MANIFEST_BYTES, MAX_NAME = 2000, 2**30, 2**21, 200
_TIME = (1980, 1, 1, 0, 0, 0)
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*){0,4}", re.ASCII)
"""No part begins with a dot, and none is empty: nothing lies outside the archive, nothing is hidden."""
_END = struct.Struct("<4s4H2LH")
_END_MAGIC, _ZIP64_MAGIC = b"PK\x05\x06", b"PK\x06\x07"
_LONGEST_ENTRY = 46 + MAX_NAME
"""Bytes that the directory has at most for an entry, name included."""


def is_name(name: str) -> bool:
    """Whether an entry may have this name."""
    return bool(_NAME.fullmatch(name)) and len(name) <= MAX_NAME


def pack(files: Mapping[str, bytes], about: Mapping[str, Any]) -> bytes:
    """The bytes of an archive of `files` by name; its manifest holds `about`, plain values, too."""
    for name in files:
        if not is_name(name) or name == MANIFEST:
            raise ResultsError(f"archive: {name!r} cannot be a name in it. Use letters, digits, '_', '-', '.' and '/'")
    entries = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(files.items())
    }
    manifest = json.dumps({**about, "format": FORMAT, "files": entries}, indent=1, sort_keys=True).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sorted({**files, MANIFEST: manifest}.items()):
            info = zipfile.ZipInfo(name, _TIME)
            info.create_system, info.external_attr = 3, (stat.S_IFREG | 0o644) << 16
            archive.writestr(info, content)
    if len(entries) >= MAX_FILES or buffer.tell() > MAX_BYTES or len(manifest) > MAX_MANIFEST_BYTES:
        raise ResultsError(
            f"archive: {len(entries)} files with {buffer.tell()} bytes are more than one may have "
            f"({MAX_FILES} files, {MAX_BYTES} bytes). Leave out samples or figures"
        )
    return buffer.getvalue()


def unpack(source: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What the manifest says, and all other files by name, each of the recorded digest.

    Raises:
        ResultsError: in one line: not such an archive, damaged, or with anything in it that `pack` does not write.
    """
    try:
        with open_file(source) as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read() if size <= MAX_BYTES else b""
    except OSError as error:
        raise ResultsError(f"{source}: cannot be read ({one_line(error)})") from None
    if size > MAX_BYTES:
        raise _damaged(source, f"has {size} bytes, more than {MAX_BYTES}")
    _check_directory(source, content)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            _check_entries(source, entries, size)
            found = {entry.filename: archive.read(entry) for entry in entries}
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError, struct.error) as error:
        raise _damaged(source, one_line(error)) from None
    return _verified(source, found)


def _check_directory(source: Path, content: bytes) -> None:
    """Refuse a directory of more entries than allowed before it is read: it alone could fill the memory."""
    if len(content) < _END.size or content[-_END.size :][:4] != _END_MAGIC:
        raise _damaged(source, "is no archive, or its end is missing")
    _, disk, start_disk, here, total, length, offset, _ = _END.unpack(content[-_END.size :])
    is_simple = disk == start_disk == 0 and here == total and offset + length + _END.size == len(content)
    if not is_simple or content[-_END.size - 20 :][:4] == _ZIP64_MAGIC:
        raise _damaged(source, "its directory is not where it should be")
    if total > MAX_FILES or length > total * _LONGEST_ENTRY:
        raise _damaged(source, f"lists {total} entries in {length} bytes; {MAX_FILES} are allowed")


def _check_entries(source: Path, entries: list[zipfile.ZipInfo], size: int) -> None:
    names = [entry.filename for entry in entries]
    for entry in entries:
        kind = stat.S_IFMT(entry.external_attr >> 16)
        is_plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 0x1
        if not is_name(entry.filename) or kind not in (0, stat.S_IFREG) or not is_plain:
            raise _damaged(source, f"{entry.filename[:100]!r} is not a plain file with a plain name")
    if len(set(names)) < len(names):
        raise _damaged(source, "a name occurs twice")
    if sum(entry.file_size for entry in entries) > size:
        raise _damaged(source, "entries overlap")


def _verified(source: Path, found: dict[str, bytes]) -> tuple[dict[str, Any], dict[str, bytes]]:
    manifest = _manifest(source, found.pop(MANIFEST, b""))
    entries = manifest.pop("files")
    missing, additional = sorted(entries.keys() - found.keys()), sorted(found.keys() - entries.keys())
    if missing or additional:
        what = f"lacks {missing[0]!r}" if missing else f"holds {additional[0]!r}, which its manifest does not name"
        raise _damaged(source, what)
    for name, content in found.items():
        entry = entries[name] if isinstance(entries[name], dict) else {}
        if (entry.get("bytes"), entry.get("sha256")) != (len(content), hashlib.sha256(content).hexdigest()):
            raise _damaged(source, f"{name!r} is not the file that the manifest describes")
    return manifest, found


def _manifest(source: Path, content: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(content[: MAX_MANIFEST_BYTES + 1])
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise _damaged(source, f"has no readable {MANIFEST}")
    if manifest.get("format") != FORMAT:
        raise _damaged(source, f"is of format {str(manifest.get('format'))[:20]!r}, this version reads {FORMAT}")
    return manifest


def _damaged(source: Path | os.PathLike[str], what: str) -> ResultsError:
    return ResultsError(f"{source}: {what}. It is not a bundle as it was written: get it again")
