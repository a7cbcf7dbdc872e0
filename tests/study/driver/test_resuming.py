"""What a session finds of earlier ones: other data, models and benchmarks are refused or recorded, nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from ebft_study import results
from ebft_study.errors import ResultsError
from ebft_study.study.driver import runner, single_run
from ebft_study.study.driver.monitor import Monitor
from ebft_study.study.folder.study_yaml import StudySource
from tests.evaluation.downstream import files
from tests.studies import resolved
from tests.tiny_run import tiny_config, write_model


def flip_a_bit(path: Path, *, offset: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.fixture
def began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A study that has begun, and no trial of which has run; its settings."""
    monkeypatch.setattr(runner, "run_session", lambda *_: "stopped")
    monkeypatch.setattr(runner, "_report", lambda *_: None)
    benchmark, judge = files.parallel(tmp_path), write_model(tmp_path / "judge")
    limits = {"benchmark_problems": 1, "benchmark_max_tokens": 2}
    settings = tiny_config(
        tmp_path, judge=str(judge), judge_completion_length=3, judge_depths=[1.0], benchmarks=[benchmark], **limits
    )
    run = settings.model_dump(mode="json", exclude={"name", "seed"})
    runner.run(resolved({"study": "s", "question": "?", "run": run}), storage=tmp_path, console=Console())
    return run


def change(run: dict[str, Any], kind: str, tmp_path: Path) -> None:
    if kind == "data":
        file = Path(run["data"]["dataset"])
        lines = file.read_text().splitlines()
        file.write_text("\n".join([*lines[1:], json.dumps({"text": "def other(x): return x " * 40})]))
    elif kind == "benchmarks":
        file = next(tmp_path.glob("test.de-en*.en"))
        file.write_text(file.read_text().replace("o", "e"))
    else:
        flip_a_bit(Path(run["model"] if kind == "model" else tmp_path / "judge") / "model.safetensors")


@pytest.mark.parametrize("kind", ["data", "model", "judge", "benchmarks"])
def test_a_study_is_not_resumed_with_other_inputs(began: dict[str, Any], kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    runner.resume(folder, console=Console())
    change(began, kind, tmp_path)
    before = (folder / "study.yaml").read_bytes()
    with pytest.raises(ResultsError, match=r"(data|models|benchmarks) .*: [0-9a-f]{8} -> [0-9a-f]{8}.*Put them back"):
        runner.resume(folder, console=Console())
    assert (folder / "study.yaml").read_bytes() == before

    runner.resume(folder, console=Console(), accept_changes=True)
    runner.resume(folder, console=Console())  # the new ones are the study's now
    record = yaml.safe_load((folder / "study.yaml").read_text())
    (former,) = record["former_provenance"]
    assert {key: value for key, value in former.items() if key != "until"} == yaml.safe_load(before)["provenance"]
    (event,) = results.load(folder).events.query("kind == 'changed'").to_dict("records")
    assert "from here on with other inputs" in event["message"]


def test_an_extended_study_keeps_its_inputs(began: dict[str, Any], tmp_path: Path) -> None:
    change(began, "model", tmp_path)
    larger = resolved({"study": "s", "question": "?", "run": began, "seeds": [0, 1]})
    with pytest.raises(ResultsError, match=r"models .*Put them back"):
        runner.extend(larger, storage=tmp_path, console=Console())
    runner.extend(larger, storage=tmp_path, console=Console(), accept_changes=True)
    assert "former_provenance" in yaml.safe_load((tmp_path / "s" / "study.yaml").read_text())


def test_a_record_of_an_earlier_version_has_less_to_compare(began: dict[str, Any], tmp_path: Path) -> None:
    """It has no hashes of files, feature networks or benchmarks."""
    path = tmp_path / "s" / "study.yaml"
    record = yaml.safe_load(path.read_text())
    models = {name: {"parameters": entry["parameters"]} for name, entry in record["provenance"]["models"].items()}
    path.write_text(yaml.safe_dump({**record, "provenance": {"data": record["provenance"]["data"], "models": models}}))
    change(began, "model", tmp_path)
    runner.resume(tmp_path / "s", console=Console())
    change(began, "data", tmp_path)
    with pytest.raises(ResultsError, match="data "):
        runner.resume(tmp_path / "s", console=Console())


def test_a_single_run_is_not_resumed_with_other_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_config(tmp_path, steps=1)
    source = StudySource("run.yaml")
    single_run.run_single(run, source, folder=tmp_path / "out", resume=False, console=Console())
    change(run.model_dump(mode="json"), "model", tmp_path)
    with pytest.raises(ResultsError, match=r"models .*Use another --output"):
        single_run.run_single(run, source, folder=tmp_path / "out", resume=True, console=Console())


def test_a_driver_that_dies_after_the_last_checkpoint_leaves_the_best_one_findable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, source, folder = tiny_config(tmp_path, steps=2), StudySource("run.yaml"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "ended", lambda *_: None)  # as if it had been killed before
        single_run.run_single(run, source, folder=folder, resume=False, console=Console())
    assert results.load(folder).best_checkpoint("t0000") is None
    single_run.run_single(run, source, folder=folder, resume=True, console=Console())
    best = results.load(folder).best_checkpoint("t0000")
    assert best is not None
    assert best.exists()
