"""Weights & Biases beside the tables: off by default, and offline without a key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from wandb.sdk.lib import wbauth

from ebft_study.errors import ConfigError
from ebft_study.results import TrialRecorder
from ebft_study.training import recorded, tracking
from ebft_study.training.prepare import prepare
from ebft_study.training.tracking import WandbRecorder, check_login
from tests.tiny_run import MemoryRecorder, run_tiny, tiny_config

KEY = "0" * 39 + "7"


def test_tracking_is_off_unless_asked_for(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("study: s\n")
    attempt = recorded.Attempt(study="s", study_folder=str(tmp_path), trial_id="t0", label="l", attempt=1)
    assert isinstance(recorded._recorder(tiny_config(tmp_path), attempt), TrialRecorder)
    recorder = recorded._recorder(tiny_config(tmp_path, wandb="offline"), attempt)
    assert isinstance(recorder, WandbRecorder)
    assert isinstance(recorder.inner, TrialRecorder)
    recorder.close()


def test_an_offline_run_holds_every_row_and_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    config = tiny_config(tmp_path, wandb="offline", steps=2)
    inner = MemoryRecorder()
    recorder = WandbRecorder(inner, config, study="study", run_id="study-t0001", label="alpha=1", folder=tmp_path)
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
        assert KEY.encode() not in file.read_bytes(), file


@pytest.fixture(autouse=True)
def fresh_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B remembers credentials for as long as a process lives."""
    monkeypatch.setattr(wbauth.authenticate, "_session_auth", None)
    yield
    wandb.teardown()


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A W&B server that nobody runs, and a key for it."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(tracking, "_ANSWER_SECONDS", 2.0)


def test_a_server_that_does_not_answer_costs_no_run(tmp_path: Path, silent_server: None) -> None:
    inner = MemoryRecorder()
    config = tiny_config(tmp_path, wandb="online")
    recorder = WandbRecorder(inner, config, study="study", run_id="study-t0001", label="l", folder=tmp_path)
    recorder.metrics(1, {"ce_loss": 2.0})
    recorder.close()
    assert recorder.run.offline
    assert recorder.run.id == "study-t0001"
    assert inner.rows == {1: {"ce_loss": 2.0}}
    (kind, message), *others = inner.events
    assert kind == "tracking"
    assert "did not answer" in message
    assert KEY not in message
    assert not others


def test_online_tracking_without_credentials_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    online, offline = tiny_config(tmp_path, wandb="online"), tiny_config(tmp_path, wandb="offline")
    check_login([offline])
    with pytest.raises(ConfigError, match="no W&B credentials here"):
        prepare([offline, online])
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    check_login([online])
