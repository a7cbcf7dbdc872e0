"""Checkpoints on disk: damage is detected, and those that stay are enumerated against the definition."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ebft_study.errors import CheckpointError, StorageError
from ebft_study.networks.loading import fingerprint, load_model
from ebft_study.storage import local
from ebft_study.training import checkpoint, state
from ebft_study.training.checkpoint import ranked, to_keep
from ebft_study.training.update import Run
from tests.disks import small_disk
from tests.tiny_run import DETERMINISTIC, keep_checkpoints, run_tiny, tiny_config

NAN = math.nan
STATE: dict[str, Any] = {
    "step": 4, "latest": {"loss": 0.1 + 0.2, "ce_loss": NAN}, "tally": {"observed": {"loss": {"largest": -math.inf}}},
    "tensors": {
        "weights": {"a.weight": torch.randn(6, 4), "b.weight": torch.randn(3).bfloat16(), "c": torch.randn(4, 6).T},
        "average": {}, "step": {"a.weight": torch.tensor(4.0)},
    },
}  # fmt: skip


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, STATE, step=4, metrics={"cfm_loss": 1 / 3, "reward": NAN})
    assert str(checkpoint.load(tmp_path)) == str(STATE)
    for kind, named in checkpoint.load(tmp_path)["tensors"].items():
        for name, tensor in named.items():
            torch.testing.assert_close(tensor, STATE["tensors"][kind][name], rtol=0, atol=0)
    assert checkpoint.recorded(tmp_path) == (4, {"cfm_loss": 1 / 3})


def test_a_checkpoint_is_files_that_other_libraries_read_and_none_is_pickled(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, STATE, step=4)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    (file,) = tmp_path.glob("*.safetensors")
    read = safetensors.torch.load_file(file)
    assert set(read) == {f"tensors/weights/{n}" for n in ("a.weight", "b.weight", "c")} | {"tensors/step/a.weight"}
    assert torch.equal(read["tensors/weights/c"], STATE["tensors"]["weights"]["c"])


def test_tensors_beyond_the_limit_begin_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 100)
    tensors = {f"{i}": torch.randn(size) for i, size in enumerate((10, 15, 1, 40, 5, 0, 20))}
    asked: list[int] = []

    def complete(tensor: torch.Tensor) -> torch.Tensor:
        asked.append(len(tensor))
        return tensor + 1

    checkpoint.save(tmp_path, {"tensors": tensors}, step=1, complete=complete)
    assert asked == [len(tensor) for tensor in checkpoint.tensors_of({"tensors": tensors})] == [10, 15, 1, 40, 5, 0, 20]
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [f"state-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    sizes = [sorted(tensor.numel() for tensor in safetensors.torch.load_file(file).values()) for file in files]
    assert sizes == [[10, 15], [1], [40], [0, 5, 20]]
    loaded = checkpoint.load(tmp_path)["tensors"]
    assert all(torch.equal(loaded[name], tensor + 1) for name, tensor in tensors.items())


@pytest.mark.parametrize("format", [checkpoint.save, lambda folder, state, step: save_pickled(folder, state, step)])
def test_any_damage_is_found(tmp_path: Path, format: Callable[..., None]) -> None:
    """A byte changed, a file cut, a file lost: of every file, the record included."""
    format(tmp_path, STATE, step=4)
    assert checkpoint.step_of(tmp_path) == checkpoint.load(tmp_path)["step"] == 4
    for file in [path for path in tmp_path.iterdir() if path.name != "checkpoint.json" or format == checkpoint.save]:
        content = file.read_bytes()
        middle = content.index(b"tensors") if b"tensors" in content else len(content) // 2
        for damaged in (content[:middle] + b"\x01" + content[middle + 1 :], content[:middle], b"", None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            assert checkpoint.step_of(tmp_path) is None
            with pytest.raises(CheckpointError, match="complete"):
                checkpoint.load(tmp_path)
        file.write_bytes(content)
    assert checkpoint.step_of(tmp_path) == 4


def test_numbers_of_the_record_are_part_of_what_is_verified(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, STATE, step=4, metrics={"cfm_loss": 0.5})
    record = (tmp_path / "checkpoint.json").read_text()
    for old, new in (
        ('"step": 4', '"step": 5'),
        ('"cfm_loss": 0.5', '"cfm_loss": 0.4'),
        ("0.30000000000000004", "0.3"),
    ):
        assert old in record
        (tmp_path / "checkpoint.json").write_text(record.replace(old, new))
        assert checkpoint.recorded(tmp_path) is None is checkpoint.step_of(tmp_path)


@pytest.mark.parametrize("size", ["64k", "6m"])
def test_a_full_disk_is_named(tmp_path: Path, size: str) -> None:
    """Also where much is free again when the unfinished file is gone."""
    with small_disk(tmp_path / "disk", size) as mounted:
        if not mounted:
            pytest.skip("this machine allows no mounts")
        with pytest.raises(StorageError, match=r"No space left on device\). Free some space, or set TMPDIR"):
            checkpoint.save(tmp_path / "disk", {"tensors": {"weights": {"a": torch.zeros(2_000_000)}}}, step=1)


def save_pickled(folder: Path, state: dict[str, Any], step: int) -> None:
    """A checkpoint in the format of version 0.1."""
    torch.save(state, folder / "state.pt")
    digest = hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()
    record = {"step": step, "sha256": digest, "metrics": {"cfm_loss": 1.5}}
    (folder / "checkpoint.json").write_text(json.dumps(record))


def test_a_run_continues_from_a_checkpoint_of_version_0_1(tmp_path: Path) -> None:
    """Bit for bit; and its weights are those that an evaluation gets."""
    config = tiny_config(tmp_path, ema_decay=0.9)
    _, whole = run_tiny(config, on_report=keep_checkpoints(tmp_path))
    old = tmp_path / "old"
    old.mkdir()
    save_pickled(old, checkpoint.load(tmp_path / "step-2"), 2)
    assert checkpoint.recorded(old) == (2, {"cfm_loss": 1.5})
    _, rest = run_tiny(config, start_from=old)
    for name in DETERMINISTIC:
        assert rest.curve(name) == {step: value for step, value in whole.curve(name).items() if step > 2}
    fingerprints = []
    for folder in (old, tmp_path / "step-2"):
        model = load_model(config.model).model
        assert state.load_weights(model, folder) == 2
        fingerprints.append(fingerprint(model))
    assert fingerprints[0] == fingerprints[1]


def test_of_several_workers_the_first_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path)
    run_tiny(config, on_report=keep_checkpoints(tmp_path))
    hashed: list[str] = []
    digest = checkpoint._digest
    monkeypatch.setattr(checkpoint, "_digest", lambda path: hashed.append(path.name) or digest(path))
    first, second = Run(config, world_size=2), Run(config, rank=1, world_size=2)
    state.restore(second, tmp_path / "step-2")
    assert hashed == []
    state.restore(first, tmp_path / "step-2")
    assert hashed == ["state-00001-of-00001.safetensors"]
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_every_small_case_agrees_with_the_definition(mode: str) -> None:
    """A checkpoint stays if fewer than `newest` are newer, fewer than `best` are better, or its step is a multiple."""
    steps = (1, 2, 3, 4)
    settings = list(itertools.product((1, 2, 5), (0, 1, 2), (None, 1, 2, 3)))
    for levels in itertools.product((0.0, 1.0, 2.0, NAN), repeat=len(steps)):
        values = dict(zip(steps, levels, strict=True))
        for newest, best, every in settings:
            expected = set()
            for step in steps:
                newer = sum(other > step for other in steps)
                better = sum(_is_better(values, other, step, mode) for other in steps)
                measured = not math.isnan(values[step])
                if newer < newest or (measured and better < best) or (every is not None and step % every == 0):
                    expected.add(step)
            kept = to_keep(values, newest=newest, best=best, every_steps=every, mode=mode)  # type: ignore[arg-type]
            assert kept == expected, (values, newest, best, every)


def _is_better(values: dict[int, float], one: int, other: int, mode: str) -> bool:
    a, b = values[one], values[other]
    if math.isnan(a) or math.isnan(b):
        return False
    return one < other if a == b else (a < b) == (mode == "min")


def test_the_newest_always_stays() -> None:
    assert to_keep({2: NAN, 3: NAN}, newest=0) == {3}
    assert to_keep({}, newest=2, best=1) == set()


def test_of_equals_the_earlier_is_the_best() -> None:
    assert ranked({10: 1.0, 20: 1.0, 30: 0.5, 40: NAN}, "min") == [30, 10, 20]
    assert ranked({10: 1.0, 20: 1.0, 30: 0.5}, "max") == [10, 20, 30]


def test_a_record_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a disk that fails for a moment changes which checkpoint is the best."""
    checkpoint.save(tmp_path, STATE, step=4)

    def fail(*_: Any) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "checkpoint_manager_snapshot.json").write_text("{}")
    assert checkpoint.recorded(tmp_path / "checkpoint_manager_snapshot.json") is None
    monkeypatch.setattr(local, "open_file", fail)
    with pytest.raises(StorageError, match="Input/output error"):
        checkpoint.recorded(tmp_path)
    assert checkpoint.step_of(tmp_path) is None
