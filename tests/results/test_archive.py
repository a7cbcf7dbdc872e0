"""Archives: equal content, equal bytes; and everything that an archive of a stranger could hold is refused."""

from __future__ import annotations

import io
import json
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ebft_study.errors import ResultsError
from ebft_study.results import archive

FILES = {"study.yaml": b"study: s\n", "results/trials/trials.parquet": b"PAR1" * 100, "tables/a_b-c.csv": b"1,2\n"}


def test_equal_content_gives_equal_bytes_whatever_the_order() -> None:
    one = archive.pack(FILES, {"study": "s"})
    assert one == archive.pack(dict(reversed(FILES.items())), {"study": "s"})
    assert one != archive.pack({**FILES, "study.yaml": b"study: t\n"}, {"study": "s"})


def test_what_was_packed_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(archive.pack(FILES, {"study": "s"}))
    about, files = archive.unpack(tmp_path / "a.zip")
    assert files == FILES
    assert about == {"study": "s", "format": 1}
    with zipfile.ZipFile(tmp_path / "a.zip") as opened:  # any other program reads it, too
        assert opened.testzip() is None
        assert opened.namelist() == sorted([*FILES, "MANIFEST.json"])
        manifest = json.loads(opened.read("MANIFEST.json"))
    assert manifest["files"]["study.yaml"]["bytes"] == 9


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../b", "a//b", "a/", ".x", "a/.x", "c:x", "a\\b", "", "x" * 300, "ä"]
)
def test_names_that_lead_elsewhere(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResultsError, match="cannot be a name"):
        archive.pack({name: b""}, {})
    with monkeypatch.context() as patched:
        patched.setattr(archive, "is_name", lambda name: True)
        named = archive.pack({name: b"x"}, {})  # its manifest names it, too
    refused(tmp_path, named, "is not a plain file with a plain name")


def packed() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive.pack(FILES, {}))) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def rewritten(
    files: dict[str, bytes],
    *,
    method: int = zipfile.ZIP_STORED,
    change: Callable[[zipfile.ZipInfo], None] | None = None,
) -> bytes:
    """An archive of these files as someone else could write it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as target:
        for name, content in files.items():
            info = zipfile.ZipInfo("x")
            info.filename, info.compress_type = name, method
            if change:
                change(info)
            target.writestr(info, content)
    return buffer.getvalue()


def refused(folder: Path, content: bytes, match: str = "It is not a bundle as it was written") -> None:
    path = folder / "bad.zip"
    path.write_bytes(content)
    with pytest.raises(ResultsError, match=match) as caught:
        archive.unpack(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert sorted(each.name for each in folder.iterdir()) == ["bad.zip"]


def test_a_rewritten_archive_is_one(tmp_path: Path) -> None:
    """The helper writes nothing that is refused for itself."""
    (tmp_path / "a.zip").write_bytes(rewritten(packed()))
    assert archive.unpack(tmp_path / "a.zip")[1] == FILES


def test_a_changed_bit_anywhere_is_found(tmp_path: Path) -> None:
    whole = archive.pack(FILES, {})
    (tmp_path / "a.zip").write_bytes(whole)
    for position in range(0, len(whole), 7):
        content = bytearray(whole)
        content[position] ^= 0x10
        (tmp_path / "a.zip").write_bytes(content)
        try:
            _, files = archive.unpack(tmp_path / "a.zip")
        except ResultsError:
            continue
        assert files == FILES, position  # a time, say, which nobody reads


@pytest.mark.parametrize("kept", [0, 10, 100, -1, -30])
def test_a_part_of_an_archive(tmp_path: Path, kept: int) -> None:
    refused(tmp_path, archive.pack(FILES, {})[:kept])


def test_more_or_less_than_the_manifest_names(tmp_path: Path) -> None:
    refused(tmp_path, rewritten({n: c for n, c in packed().items() if n != "study.yaml"}), "lacks 'study.yaml'")
    refused(tmp_path, rewritten({**packed(), "tables/x.csv": b""}), "holds 'tables/x.csv'")
    refused(tmp_path, rewritten({**packed(), "study.yaml": b"study: x\n"}), "'study.yaml' is not the file")
    refused(tmp_path, rewritten(FILES), "has no readable MANIFEST.json")
    refused(tmp_path, rewritten({**packed(), "MANIFEST.json": b"[" * 10**5}), "has no readable")
    refused(tmp_path, rewritten({**packed(), "MANIFEST.json": b'{"files": {}, "format": 2}'}), "is of format '2'")
    refused(tmp_path, archive.pack(FILES, {}) + b"tail")
    refused(tmp_path, b"head" + archive.pack(FILES, {}))


def test_entries_that_are_no_plain_files(tmp_path: Path) -> None:
    def link(info: zipfile.ZipInfo) -> None:
        info.external_attr = (stat.S_IFLNK | 0o777) << 16

    def device(info: zipfile.ZipInfo) -> None:
        info.external_attr = (stat.S_IFCHR | 0o666) << 16

    for change in (link, device):
        refused(tmp_path, rewritten(packed(), change=change), "is not a plain file")
    refused(tmp_path, rewritten(packed(), method=zipfile.ZIP_DEFLATED), "is not a plain file")
    twice = rewritten({**packed(), "study.yamm": b""}).replace(b"study.yamm", b"study.yaml")
    refused(tmp_path, twice, "a name occurs twice")


def test_archives_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = rewritten({**packed(), "zeros": bytes(10**7)}, method=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 10**5
    refused(tmp_path, bomb, "is not a plain file")
    whole = archive.pack(FILES, {})
    end = bytearray(whole)
    struct.pack_into("<HH", end, len(end) - 14, 60_000, 60_000)  # as many entries, it says
    refused(tmp_path, bytes(end), "lists 60000 entries")

    def spread(info: zipfile.ZipInfo) -> None:
        info.extra = struct.pack("<HH", 0xCAFE, 50_000) + bytes(50_000)

    refused(tmp_path, rewritten(packed(), change=spread), "lists 4 entries in 200")
    monkeypatch.setattr(archive, "MAX_BYTES", len(whole) - 1)
    refused(tmp_path, whole, "more than")
    with pytest.raises(ResultsError, match="more than one may have"):
        archive.pack(FILES, {})


def test_entries_that_share_their_bytes(tmp_path: Path) -> None:
    """Two entries of the directory that lie in one place would be more than the archive has."""
    content = bytearray(rewritten({"a": bytes(3000), "b": bytes(3000), "c": b"x"}))
    start = struct.unpack("<L", content[-6:-2])[0]
    second = content.index(b"PK\x01\x02", start + 4)
    struct.pack_into("<LL", content, second + 20, 10**6, 10**6)
    refused(tmp_path, bytes(content), "entries overlap")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"none\.zip: cannot be read"):
        archive.unpack(tmp_path / "none.zip")
