"""The disk of checkpoints: against those that runs write and trials keep."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ebft_study.storage import storage_path
from ebft_study.study.driver import runner
from ebft_study.study.driver.single_run import run_single
from ebft_study.study.folder.study_yaml import StudySource
from ebft_study.study.forecast import disk
from ebft_study.study.forecast import plan as planning
from ebft_study.study.forecast.disk import CheckpointDisk, checkpoint_bytes, checkpoint_disk, most_kept
from ebft_study.training import checkpoint
from ebft_study.training.checkpoint import to_keep
from tests.studies import resolved
from tests.study.forecast.test_plan import spec
from tests.tiny_run import keep_checkpoints, run_tiny, tiny_config

GIB = 2**30
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema_decay": 0.9, "method": "sft"},
        {"lora_rank": 2},
        {"precision": "bfloat16", "weight_dtype": "bfloat16", "ema_decay": 0.9},
    ],
    ids=str,
)
def test_bytes_are_those_of_the_tensors_of_a_checkpoint(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(tmp_path, steps=1, **changes)
    run_tiny(config, on_report=keep_checkpoints(tmp_path))
    tensors = checkpoint.load(tmp_path / "step-1")["tensors"]
    counts = tensors.pop("step")  # four bytes a tensor
    assert checkpoint_bytes(config) == sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
    files = sum(path.stat().st_size for path in (tmp_path / "step-1").iterdir())
    assert checkpoint_bytes(config) < files < checkpoint_bytes(config) + 700 * len(counts) + 10_000


def test_as_many_are_kept_as_the_rule_for_removing_them_leaves(tmp_path: Path) -> None:
    """At most: the largest number over objectives that rise and that fall."""
    for steps, every, newest, best, multiple in itertools.product((1, 7, 12), (2, 3), (1, 2, 9), (0, 1), (None, 6)):
        settings = {"keep_checkpoints": newest, "keep_best": best, "keep_every_steps": multiple}
        config = tiny_config(tmp_path, steps=steps, warm_start_steps=1, checkpoint_every_steps=every, **settings)
        total = steps + 1
        written = sorted({*range(every, total + 1, every), total})
        sets = [
            to_keep({s: sign * s for s in written}, newest=newest, best=best, every_steps=multiple) for sign in (1, -1)
        ]
        assert max(map(len, sets)) <= most_kept(config) <= len(written)
        if multiple is None:
            assert max(map(len, sets)) == most_kept(config)


def test_a_study_needs_what_all_its_trials_keep(tmp_path: Path) -> None:
    small, large = tiny_config(tmp_path, steps=20), tiny_config(tmp_path, steps=20, ema_decay=0.9)
    found = checkpoint_disk([(small, 3), (large, 2)], concurrency=2)
    own, other = checkpoint_bytes(small), checkpoint_bytes(large)
    assert other == own * 4 / 3
    assert found == CheckpointDisk(other, 3, 3 * 3 * own + 2 * 3 * other + 2 * other, 2 * other)


def free_bytes(monkeypatch: pytest.MonkeyPatch, **free: float) -> None:
    """Disks by the names of folders in their paths; a disk of its own for each."""

    class Stat:
        def __init__(self, path: Path) -> None:
            names = [name for name in free if name in path.parts]
            self.st_dev, self.free = (list(free).index(names[0]), free[names[0]]) if names else (99, 1e18)

    class Existing(type(Path())):  # type: ignore[misc]
        def stat(self, **options: Any) -> Any:
            return Stat(self)

    monkeypatch.setattr(disk, "_existing", lambda path: Existing(path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, Stat(Path(path)).free))


NEED = CheckpointDisk(each_bytes=GIB, kept=3, kept_bytes=8 * GIB, written_bytes=2 * GIB)


@pytest.mark.parametrize(
    ("free", "parts"),
    [
        ({"storage": 9 * GIB, "temporary": 3 * GIB}, []),
        ({"storage": 7 * GIB, "temporary": 3 * GIB}, [("storage", "8.00 GiB", "7.00 GiB", "keep_checkpoints")]),
        ({"storage": 9 * GIB, "temporary": 1 * GIB}, [("temporary", "2.00 GiB", "1.00 GiB", "TMPDIR")]),
        ({"both": 9 * GIB}, [("storage", "10.00 GiB", "9.00 GiB", "keep_checkpoints")]),
        ({"both": 11 * GIB}, []),
    ],
)
def test_a_smaller_disk_is_named_with_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: dict[str, float], parts: list[tuple[str, ...]]
) -> None:
    folder = tmp_path / "both" / "storage"
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "both" / "temporary"))
    free_bytes(monkeypatch, **free)
    lines = NEED.shortages(storage_path(folder))
    assert len(lines) == len(parts)
    for line, expected in zip(lines, parts, strict=True):
        assert all(part in line for part in expected)
    if "temporary" in free:
        assert not any("temporary" in line for line in NEED.shortages(storage_path(folder), are_here=False))


def test_checkpoints_that_are_there_take_no_more_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "storage" / "train" / "t0000-1" / "checkpoint_00000002"
    there.mkdir(parents=True)
    (there / "state-00001-of-00001.safetensors").write_bytes(b"0" * 1000)
    need = CheckpointDisk(400, 2, 1200, 400)
    for free, fits in ((199, False), (200, True)):
        free_bytes(monkeypatch, storage=free)
        assert (need.shortages(storage_path(tmp_path / "storage"), are_here=False) == []) == fits


def test_a_link_that_leads_nowhere_takes_no_room(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "t0-1" / "checkpoint_00000001"
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").symlink_to(tmp_path / "gone")
    assert CheckpointDisk(1, 1, 1, 1).shortages(storage_path(tmp_path)) == []


def test_a_folder_that_is_not_there_yet_is_on_the_disk_of_the_one_above(tmp_path: Path) -> None:
    assert disk._existing(tmp_path / "a" / "b") == tmp_path
    assert NEED.shortages(storage_path(tmp_path / "a" / "b")) == [] or shutil.disk_usage(tmp_path).free < 10 * GIB
    huge = CheckpointDisk(1e15, 1, 1e15, 0)
    (line,) = huge.shortages(storage_path(tmp_path / "a" / "b"))
    assert str(tmp_path / "a" / "b") in line


def test_plan_study_and_run_say_so_before_they_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, steps=1)
    study = resolved(spec(config.model_dump(mode="json", exclude={"name", "seed"})))
    found = planning.plan(study, storage=tmp_path)
    lines = planning.summary(found)
    assert found.disk.describe() in lines
    assert found.disk.describe().startswith("checkpoints: up to ")
    monkeypatch.setattr(CheckpointDisk, "shortages", lambda self, folder, are_here=True: [f"{folder}: is small"])
    assert f"{tmp_path / 's'}: is small" in planning.summary(planning.plan(study, storage=tmp_path))
    console = Console(record=True, width=200)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_prepare", lambda study, console: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runner.run(study, storage=tmp_path, console=console)
    assert "s: is small" in console.export_text()
    run_single(config, StudySource("run.yaml"), folder=tmp_path / "run", resume=False, console=console)
    assert "run: is small" in console.export_text()
