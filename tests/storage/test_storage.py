"""Storage paths: one contract for disks and stores, and errors that say what to do."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebft_study import storage
from ebft_study.errors import ConfigError, StorageError
from ebft_study.storage import StoragePath, filesystems, remove_leftovers, storage_path
from ebft_study.storage.local import LocalPath
from tests import disks
from tests.contracts.storage_paths import StoragePathContract


class TestFolder(StoragePathContract):
    @pytest.fixture
    def here(self, tmp_path: Path) -> StoragePath:
        return storage_path(tmp_path).subfolder("here")


class TestFileUrl(StoragePathContract):
    @pytest.fixture
    def here(self, tmp_path: Path) -> StoragePath:
        return storage_path(f"file://{tmp_path}").subfolder("here")


class TestS3(StoragePathContract):
    @pytest.fixture
    def here(self, s3_query: str, request: pytest.FixtureRequest) -> StoragePath:
        return storage_path(f"s3://studies/{abs(hash(request.node.name))}?{s3_query}")


class TestFsspec(StoragePathContract):
    @pytest.fixture
    def here(self, request: pytest.FixtureRequest) -> StoragePath:
        return storage_path(f"memory://{abs(hash(request.node.name))}")

    @pytest.mark.skip(reason="fsspec's memory shares one open file between its reader and its writer")
    def test_a_reader_never_sees_half_of_a_file(self, here: StoragePath) -> None: ...


# --- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAEXAMPLE:verysecret@bucket/studies",
        "s3://bucket/studies?access_key=AKIAEXAMPLE&secret_key=verysecret",
        "s3://bucket/studies?region=eu&session_token=verysecret",
        "abfs://container@account/x?account_key=verysecret",
        "s3://bucket/studies?endpoint_override=http://AKIAEXAMPLE:verysecret@localhost:9000",
        "s3://bucket/studies?endpoint_override=AKIAEXAMPLE%3Averysecret%40localhost",
        "https://verysecret@example.com/studies",
        "memory://verysecret@studies",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="the URL holds credentials") as caught:
        storage_path(url)
    assert "verysecret" not in str(caught.value)
    assert "AKIAEXAMPLE" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_of_a_url_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown key 'endpoint'"):
        storage_path("s3://bucket/x?endpoint=localhost")


def test_a_url_that_nothing_understands_is_refused() -> None:
    with pytest.raises(ConfigError, match="no known kind of storage"):
        storage_path("nowhere://bucket/x")


def test_a_bucket_that_does_not_exist_is_said_in_one_line(s3_query: str) -> None:
    with pytest.raises(StorageError, match="bucket does not exist"):
        (storage_path(f"s3://elsewhere/x?{s3_query}") / "file").write_bytes(b"x")


def test_a_store_that_does_not_answer_is_an_error_within_seconds() -> None:
    before = time.monotonic()
    path = storage_path("s3://studies/x?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1")
    with pytest.raises(StorageError, match="does not answer"):
        (path / "file").write_bytes(b"x")
    assert time.monotonic() - before < 20


def test_no_permission_is_said_in_one_line() -> None:
    error = OSError("When initiating multiple part upload: AWS Error ACCESS_DENIED during PutObject operation: no")
    assert filesystems.reason_of(error)[0] == "no permission"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 64 KiB."""
    with disks.small_disk(tmp_path / "small", "64k") as mounted:
        if not mounted:
            pytest.skip("needs the right to mount a small disk")
        yield tmp_path / "small"


def test_a_full_disk_keeps_what_it_had(small_disk: Path) -> None:
    target = storage_path(small_disk) / "file"
    target.write_bytes(b"old")
    with pytest.raises(StorageError, match=r"No space left on device.*Free some space"):
        target.write_bytes(bytes(100_000))
    assert target.read_bytes() == b"old"
    assert os.listdir(small_disk) == ["file"], "nothing half written stays behind"


def test_a_read_only_disk_is_said_in_one_line(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match="Read-only file system"):
        (storage_path(small_disk) / "file").write_bytes(b"x")


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(small_disk: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "state").write_bytes(b"1")
    target = storage_path(small_disk) / "target"
    target.upload(source, last="state")
    (source / "state").write_bytes(bytes(100_000))
    with pytest.raises(StorageError, match="No space left"):
        target.upload(source, last="state")
    assert (target / "state").read_bytes() == b"1"
    assert os.listdir(small_disk) == ["target"]


def test_a_link_to_a_folder_is_removed_and_the_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    storage_path(tmp_path / "link").delete()
    assert storage_path(tmp_path).names() == ["folder"]
    assert (tmp_path / "folder" / "file").exists()


def test_an_absolute_path_does_not_depend_on_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute(storage_path("x")) == tmp_path / "x"


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    left = [tmp_path / "results" / ".a.parquet.0a1b2c3d.tmp", tmp_path / ".study.yaml.ffffffff.tmp"]
    kept = [tmp_path / "results" / "a.tmp", tmp_path / ".mine.tmp", tmp_path / "results" / ".x.parquet.copy"]
    for path in (*left, *kept):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    folder = tmp_path / "train" / ".checkpoint_00000002.0a1b2c3d.tmp"
    (folder / "inner").mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert not any(path.exists() for path in (*left, folder))
    assert all(path.exists() for path in kept)


def test_leftovers_are_named_as_writers_name_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ebft_study.storage.local.os.replace", lambda *_: os._exit(9))
    if (child := os.fork()) == 0:
        LocalPath(tmp_path / "file").write_bytes(b"x")
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_whether_a_file_exists_may_be_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    assert not storage_path(tmp_path / "none").exists()
    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(StorageError, match="Stale file handle"):
        storage_path(tmp_path).exists()


def test_leftovers_that_cannot_be_listed_are_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(StorageError, match="Stale file handle"):
        remove_leftovers(tmp_path)
