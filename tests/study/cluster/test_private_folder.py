"""The folder of a cluster's files: nobody else's, short enough for sockets, and gone when its driver is."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ebft_study.study.cluster.private_folder import _SESSION, private_folder

KILLED = """
import os, signal
from ebft_study.study.cluster.private_folder import private_folder
with private_folder() as folder:
    folder.mkdir()
    (folder / "log").write_text("x")
    print(folder.parent, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short path, as Ray's sockets need it."""
    base = Path("/tmp") / f"e{os.getpid()}"
    base.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(base))
    return base


@pytest.fixture(autouse=True)
def tidy(base: Path) -> object:
    yield
    subprocess.run(["rm", "-rf", str(base)], check=True)


def age(folder: Path) -> None:
    os.utime(folder, (time.time() - 3600,) * 2)


def test_no_other_user_can_enter_what_ray_makes_writable_for_all(base: Path) -> None:
    before = os.umask(0)
    try:
        with private_folder() as folder:
            folder.mkdir(mode=0o777)
            assert folder.parent.parent == base
            assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
            assert len(f"{folder}/{_SESSION}") <= 103
    finally:
        os.umask(before)
    assert not list(base.iterdir())


def test_a_base_that_is_too_long_for_sockets_is_not_used(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(base / ("x" * 60)))
    with private_folder() as folder:
        assert folder.parent.parent == Path("/tmp")


def test_what_a_killed_driver_left_is_removed_and_what_others_use_is_not(base: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=600)
    left = Path(killed.stdout.strip())
    assert left.parent == base
    (strange := base / "ebft-ray-file").write_text("no folder")
    (base / "else").mkdir()
    (link := base / "ebft-ray-link").symlink_to(base / "else")
    age(base / "else")
    with private_folder() as used:
        used.mkdir()
        assert left.exists()  # it may have just been made
        age(left)
        age(used.parent)
        with private_folder():
            assert not left.exists()
            assert used.exists()
    assert strange.exists()
    assert link.exists()
