"""The Python API: what scripts and notebooks call, from a study file to its results."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import ebft_study as ebft
from ebft_study.errors import ConfigError, ResultsError
from ebft_study.study.driver import runner, session
from ebft_study.training.update import Run
from tests.tiny_run import tiny_config

CONTENT: dict[str, Any] = {
    "study": "s",
    "question": "Does it run?",
    "axes": {"alpha": [0.0, 1.0]},
    "seeds": [0, 1],
    "run": {"steps": 20},
    "profiles": {"cpu": {"run": {"model": "tiny-1m"}}, "large": {"run": {"model": "tiny-4m"}}},
}


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def test_a_mapping_and_a_file_of_the_same_content_are_the_same_study(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(CONTENT))
    from_file = ebft.load(tmp_path / "s.yaml", "cpu", ["steps=7"], name="other")
    from_mapping = ebft.load(CONTENT, profile="cpu", overrides=["steps=7"], name="other")
    assert from_file.trials == from_mapping.trials
    assert from_file.spec == from_mapping.spec
    assert {trial.run.training.steps for trial in from_file.trials} == {7}
    assert ebft.load(str(tmp_path / "s.yaml"), profile="large").trials[0].run.model == "tiny-4m"
    with pytest.raises(ConfigError, match=r"^study: unknown key 'axis'. Did you mean 'axes'"):
        ebft.load({**CONTENT, "axis": {}})


def test_a_plan_starts_nothing(tmp_path: Path) -> None:
    planned = ebft.plan(ebft.load(CONTENT, "cpu"), storage=tmp_path, memory_gib=4.0)
    assert (planned.n_trials, planned.fits, planned.hours) == (4, True, None)
    assert list(tmp_path.iterdir()) == []


def test_a_study_runs_resumes_and_has_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray: its integration tests are of the command line, which calls the same functions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "_prepare", lambda study, console: {})
    monkeypatch.setattr(session, "_tune", lambda *arguments: None)
    study = ebft.load(CONTENT, "cpu")
    ended = ebft.run(study, console=quiet())
    assert (ended.exit_code, ended.reason, len(ended.states)) == (0, "", 4)
    assert set(ebft.read_results("s").trials["status"]) == {"interrupted"}
    assert yaml.safe_load(Path("studies/s/study.yaml").read_text())["profile"] == "cpu"
    with pytest.raises(ResultsError, match="Continue it with 'ebft-study resume s'"):
        ebft.run(study, console=quiet())
    for again in (ebft.run(study, resume=True, console=quiet()), ebft.resume("s", console=quiet())):
        assert set(again.states) == set(ended.states)
    longer = ebft.extend(ebft.load({**CONTENT, "seeds": [0, 1, 2]}, "cpu"), console=quiet())
    assert len(longer.states) == 6
    with pytest.raises(ResultsError, match="is neither a study's folder nor the name"):
        ebft.resume("nowhere", console=quiet())


def test_one_run_trains_from_a_mapping_or_from_settings(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, name="tiny")
    settings = config.model_dump(mode="json", exclude_none=True)
    result = ebft.train(settings, ["steps=2", "learning_rate=1e-4"], output=tmp_path / "a", console=quiet())
    assert (result.status, result.step) == ("finished", config.training.warm_start_steps + 2)
    trials = ebft.read_results(tmp_path / "a").trials
    assert trials["learning_rate"].tolist() == [1e-4]
    again = ebft.train(config, output=tmp_path / "b", console=quiet())
    assert again.metrics["ce_loss"] == pytest.approx(ebft.read_results(tmp_path / "b").trials["final_ce_loss"].item())
    assert ebft.write_report(tmp_path / "b").name == "report.html"


def test_a_run_that_is_killed_and_resumed_pays_for_what_it_does_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two updates are in the checkpoint, the third is on record, the fourth is interrupted."""
    config = tiny_config(tmp_path, name="tiny")
    ebft.train(config, output=tmp_path / "whole", console=quiet())
    whole = ebft.read_results(tmp_path / "whole").trials.iloc[0]
    update = Run.update

    def interrupted(run: Run) -> None:
        if run.step == 3:
            raise KeyboardInterrupt
        update(run)

    monkeypatch.setattr(Run, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ebft.train(config, output=tmp_path / "a", console=quiet())
    monkeypatch.setattr(Run, "update", update)
    ebft.train(config, output=tmp_path / "a", resume=True, console=quiet())
    found = ebft.read_results(tmp_path / "a")
    row, curve = found.trials.iloc[0], found.metrics.set_index("step")["flops"]
    assert row["attempt"] == 2
    assert row["flops"] == pytest.approx(whole["flops"] * 5 / 4), "five updates for four"
    assert row["sampled_tokens"] > whole["sampled_tokens"]
    assert row["tokens_seen"] == whole["tokens_seen"]
    assert curve.tolist() == pytest.approx([whole["flops"] * step / 4 for step in range(5)]), "what led to each model"
    assert row["update_seconds"] > found.metrics["update_seconds"].max()
    assert row["parameters"] == whole["parameters"] > row["feature_parameters"] > 0


def test_a_resumed_run_keeps_the_defaults_that_it_began_with(tmp_path: Path) -> None:
    """A run of version 0.1 recorded k3, the default then."""
    complete = tiny_config(tmp_path, name="tiny", steps=2, kl_coefficient=0.1).model_dump(mode="json")
    settings = {**complete, "loss": {"kl_coefficient": 0.1}}
    ebft.train({**settings, "kl_estimator": "k3"}, output=tmp_path / "a", console=quiet())
    ebft.train(settings, output=tmp_path / "a", resume=True, console=quiet())
    assert ebft.read_results(tmp_path / "a").trials["kl_estimator"].tolist() == ["k3"]
    with pytest.raises(ResultsError, match="kl_estimator: k3 -> k1"):
        ebft.train({**settings, "kl_estimator": "k1"}, output=tmp_path / "a", resume=True, console=quiet())


def test_importing_it_is_instant() -> None:
    code = "import sys, ebft_study; assert not {'torch', 'ray', 'pandas', 'rich', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
