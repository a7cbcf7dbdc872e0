"""A study is resolved once: what follows from its file is computed once, and passed on."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from unittest import mock

import pytest
import yaml
from rich.console import Console

from ebft_study.config import RunConfig
from ebft_study.study.cluster.requests import ResourceRequest
from ebft_study.study.driver import runner, session
from ebft_study.study.resolving import checks, study_file
from ebft_study.study.spec import enumeration, trials

CONTENT = {
    "study": "s",
    "question": "?",
    "axes": {"alpha": [0.0, 1.0], "gamma": [0.0, 0.1]},
    "baselines": {"sft": {"method": "sft"}},
    "seeds": [0, 1, 2],
}


def test_from_the_file_to_ray_nothing_is_computed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(CONTENT))
    monkeypatch.setattr(runner, "_prepare", lambda study, console: {})
    monkeypatch.setattr(session, "_tune", lambda *arguments: None)
    counted = {"listed": trials, "enumerated": trials, "grid": enumeration, "check": checks, "check_capacity": checks}
    counted |= {"model_validate": RunConfig, "for_trial": ResourceRequest}
    with contextlib.ExitStack() as patches:
        calls = {
            name: patches.enter_context(mock.patch.object(of, name, wraps=getattr(of, name)))
            for name, of in counted.items()
        }
        study = study_file.load_study(tmp_path / "s.yaml")
        runner.run(study, storage=tmp_path / "studies", console=Console(file=io.StringIO()))
    counts = {name: call.call_count for name, call in calls.items()}
    assert counts.pop("model_validate") == len(study.trials) == 15
    assert counts.pop("for_trial") == 5  # configurations
    assert counts == dict.fromkeys(counts, 1)


def test_other_machines_change_what_depends_on_them_and_nothing_else(tmp_path: Path) -> None:
    from ebft_study.study.cluster.capacity import ClusterCapacity, Node

    study = study_file.load_study(CONTENT)
    large = study.on(ClusterCapacity((Node(8), Node(4))))
    assert large.trials is study.trials
    assert large.concurrency == 12
    assert study.on(ClusterCapacity((Node(1),))).concurrency == 1


def test_optuna_has_candidates_and_trials_to_come() -> None:
    axes = {"alpha": {"distribution": "uniform", "low": 0.0, "high": 1.0}, "n_samples": [2, 4]}
    search = {"algorithm": "optuna", "num_configurations": 7}
    study = study_file.load_study({**CONTENT, "axes": axes, "search": search})
    assert [trial.configuration.label for trial in study.trials] == ["sft"] * 3
    assert {trial.configuration.label for trial in study.candidates} == {
        f"alpha={alpha} n_samples={n}" for alpha in (0, 1) for n in (2, 4)
    }
    assert study.n_trials == 3 * (1 + 7)
    assert len(study.runs) == 1 + 4
