"""Weights & Biases beside the tables: off by default, and offline without a key."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebft_study.training.tracking import WandbRecorder, tracked
from tests.tiny_run import MemoryRecorder, run_tiny, tiny_config


def test_tracking_is_off_unless_asked_for(tmp_path: Path) -> None:
    recorder = MemoryRecorder()
    config = tiny_config(tmp_path)
    assert tracked(recorder, config, study="s", trial_id="t", label="l", folder=tmp_path) is recorder


def test_an_offline_run_holds_every_row_and_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 39 + "7")
    monkeypatch.setenv("EBFT_STUDY_CACHE", str(tmp_path / "cache"))
    config = tiny_config(tmp_path, wandb="offline", steps=2)
    inner = MemoryRecorder()
    recorder = tracked(inner, config, study="study", trial_id="t0001", label="alpha=1", folder=tmp_path)
    assert isinstance(recorder, WandbRecorder)
    assert (recorder.run.group, recorder.run.name, recorder.run.id) == ("study", "alpha=1", "study-t0001")
    assert recorder.run.config["alpha"] == config.reward.alpha
    for step, row in run_tiny(config)[1].rows.items():
        recorder.metrics(step, row)
    recorder.evaluations(2, [{"benchmark": "heldout", "metric": "cfm_loss", "position": 8, "value": 1.0}])
    assert recorder.run.summary["step"] == 2
    assert "heldout/cfm_loss/8" in dict(recorder.run.summary)
    recorder.close()
    assert set(inner.rows) == {0, 1, 2}
    files = list((tmp_path / "wandb").rglob("*.wandb"))
    assert len(files) == 1
    for file in (path for path in (tmp_path / "wandb").rglob("*") if path.is_file()):
        assert b"0" * 39 + b"7" not in file.read_bytes(), file
