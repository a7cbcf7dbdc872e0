"""The contract of storage paths, whatever holds their bytes."""

from __future__ import annotations

import copy
import hashlib
import threading
from pathlib import Path

import pytest

from ebft_study.storage import StoragePath, in_parallel, storage_path


class StoragePathContract:
    """Subclasses provide `here`: the path of an empty folder."""

    def test_what_is_written_is_read(self, here: StoragePath) -> None:
        for content in (b"", b"some bytes", bytes(range(256)) * 40_000):
            (here / "file").write_bytes(content)
            assert (here / "file").read_bytes() == content
            with (here / "file").open("rb") as file:
                assert hashlib.file_digest(file, "sha256").hexdigest() == hashlib.sha256(content).hexdigest()

    def test_a_folder_below_is_made_once(self, here: StoragePath) -> None:
        for _ in range(2):
            (here.subfolder("a", "b") / "file").write_bytes(b"x")
        assert here.names() == ["a"]
        assert (here / "a").names() == ["b"]
        assert (here / "a" / "b").exists()
        assert (here / "a" / "b" / "file").name == "file"

    def test_what_is_missing(self, here: StoragePath) -> None:
        assert not (here / "nothing").exists()
        assert (here / "nothing").names() == []
        with pytest.raises(FileNotFoundError):
            (here / "nothing").read_bytes()
        (here / "nothing").delete()

    @pytest.mark.parametrize("name", ["ä ö.parquet", "名前", "a+b=c&d.txt", "100%25"])
    def test_names_may_hold_any_letter(self, here: StoragePath, name: str) -> None:
        (here / name).write_bytes(b"x")
        assert here.names() == [name]
        assert storage_path(str(here / name)).read_bytes() == b"x"

    def test_a_file_or_a_folder_is_removed(self, here: StoragePath) -> None:
        for name in ("keep", "file", "folder/one", "folder/two"):
            *above, last = name.split("/")
            (here.subfolder(*above) / last).write_bytes(b"x")
        (here / "file").delete()
        (here / "folder").delete()
        assert here.names() == ["keep"]
        assert not (here / "folder").exists()

    def test_a_reader_never_sees_half_of_a_file(self, here: StoragePath) -> None:
        target, contents = here / "file", [bytes([value]) * 300_000 for value in (1, 2)]
        target.write_bytes(contents[0])
        seen: list[bytes] = []
        over = threading.Event()

        def read() -> None:
            while not over.is_set():
                seen.append(target.read_bytes())

        reader = threading.Thread(target=read)
        reader.start()
        for number in range(12):
            target.write_bytes(contents[number % 2])
        over.set()
        reader.join()
        assert seen
        assert all(content in contents for content in seen)

    def test_a_folder_goes_up_and_comes_back(self, here: StoragePath, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.mkdir()
        for name, size in (("large.bin", 12_000_000), ("a.json", 10), ("zz", 0)):
            (source / name).write_bytes(b"7" * size)
        (here / "copy").upload(source, last="a.json")
        assert (here / "copy").names() == ["a.json", "large.bin", "zz"]
        with (here / "copy").on_disk() as folder:
            assert {path.name: path.stat().st_size for path in folder.iterdir()} == {
                "large.bin": 12_000_000,
                "a.json": 10,
                "zz": 0,
            }
        assert here.names() == ["copy"]

    def test_a_path_is_identified_by_its_name_alone(self, here: StoragePath) -> None:
        (here / "file").write_bytes(b"x")
        again = storage_path(str(here / "file"))
        assert again == here / "file"
        assert hash(again) == hash(here / "file")
        assert again.read_bytes() == b"x"
        assert copy.deepcopy(again) == again

    def test_many_files_are_read_in_order(self, here: StoragePath) -> None:
        for number in range(5):
            (here / f"{number}").write_bytes(str(number).encode())
        assert in_parallel(lambda path: path.read_bytes(), [here / name for name in here.names()]) == [
            str(number).encode() for number in range(5)
        ]
