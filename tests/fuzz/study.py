"""A study of Optuna's in the middle of its life, written by the code of its driver and its trials, without Ray."""

from __future__ import annotations

import functools
import math
import tempfile
from pathlib import Path
from unittest import mock

import torch

from ebft_study import results
from ebft_study.storage import storage_path
from ebft_study.study.driver.monitor import Monitor
from ebft_study.study.folder import attempts, study_yaml
from ebft_study.study.folder.study_yaml import StudySource
from ebft_study.study.folder.trial_states import TrialResult, TrialState
from ebft_study.study.resolving.study_file import load_study
from ebft_study.study.search import journal
from ebft_study.study.search.optuna_search import OptunaSearch
from ebft_study.study.spec.study_spec import StudySpec
from ebft_study.study.spec.trials import Trial
from ebft_study.training import checkpoint
from tests.tiny_run import write_data, write_model

STEPS = 4
INPUTS = {"data": {"here": {"fingerprint": "9f" * 32}}}
"""Provenance, as a session finds it again."""


def spec(models: Path) -> StudySpec:
    """Two configurations of two seeds, and a baseline; data and model in the folder `models`."""
    run = {
        "model": str(models / "model"), "dataset": str(models / "data.jsonl"), "text_column": "text",
        "sequence_length": 24, "completion_length": 3, "stride": 4, "n_samples": 3, "batch_size": 4, "steps": STEPS,
        "device": "cpu", "validation_sequences": 4,
        "heldout_sequences": 4, "profile_lengths": [1, 3], "eval_every_steps": 2, "features": {"backend": "local"},
    }  # fmt: skip
    content = {
        "study": "studied", "question": "Is what is damaged found?", "run": run, "seeds": [0, 1],
        "axes": {"alpha": {"distribution": "uniform", "low": 0, "high": 1}, "gamma": [0.0, 0.5]},
        "search": {"algorithm": "optuna", "num_configurations": 3, "sampler": "random"},
        "baselines": {"sft": {"method": "sft"}},
    }  # fmt: skip
    return load_study(content).spec


def write(folder: Path, models: Path) -> Path:
    """Baseline and two configurations have ended, their files are merged in part; the third was interrupted."""
    if not (models / "model").exists():
        write_data(models / "data.jsonl")
        write_model(models / "model")
    folder.mkdir(parents=True, exist_ok=True)
    study = spec(models)
    with mock.patch("os.fsync"):
        study_yaml.write(folder, study, StudySource("studied.yaml", "ab" * 32), provenance=INPUTS)
        recorder, states = results.StudyRecorder(folder, study=study.study), dict[str, TrialState]()
        monitor = Monitor(recorder, states, study.objective.metric)
        search = OptunaSearch(study, journal.working_copy(storage_path(folder)), {})
        recorder.event("session", "begins")
        for number, trial in enumerate(iter(search.next, None)):
            ended = _train(folder, trial, monitor, steps=STEPS if number < 6 else STEPS // 2)
            if number < 6:
                search.ended(trial.trial_id, ended)
            if number == 3:
                results.compact(folder)
            if number == 6:
                break
        monitor.interrupted("Ctrl-C")
    return folder


def _train(folder: Path, trial: Trial, monitor: Monitor, *, steps: int) -> TrialResult:
    monitor.planned(trial)
    monitor.started(trial.trial_id)
    attempt = attempts.begin(folder, trial.trial_id)
    writer = functools.partial(results.TrialRecorder, folder, study="studied", trial_id=trial.trial_id, attempt=attempt)
    recorder, shift = writer(), 0.1 * trial.run.reward.alpha + 0.01 * trial.seed
    for step in range(0, steps + 1, 2):
        values = {"ce_loss": 3.0 - shift - 0.1 * step, "cfm_loss": 2.0 + shift / (1 + step), "flops": 1e9 * step}
        recorder.metrics(step, values)
        rows = [
            {"benchmark": "heldout", "metric": name, "position": None if name == "ce_loss" else 3,
             "value": values[name], "standard_error": 0.01, "count": 40}
            for name in ("ce_loss", "cfm_loss")
        ]  # fmt: skip
        recorder.evaluations(step, rows)
        lists = {"sequences": [0, 1], "counts": [20, 20]}
        keys = ("benchmark", "metric", "position")
        recorder.scores(
            step, [{**{k: r[k] for k in keys}, **lists, "values": [r["value"] - 0.1, r["value"] + 0.1]} for r in rows]
        )
        sample = {"context": "def", "completion": " value", "ground_truth": " index", "reward": 0.5}
        recorder.samples(step, [{"sequence": 0, "anchor": 4, "sample": 0, **sample}])
        with tempfile.TemporaryDirectory() as temporary:
            state = {"step": step, "tensors": {"weights": {"w": torch.full((8,), shift)}, "average": {}}}
            checkpoint.save(Path(temporary), state, step=step, metrics=values)
            kept = attempts.keep_checkpoint(
                attempts.folder(folder, trial.trial_id, attempt), Path(temporary), step=step
            )
        best = f"train/{kept.parent.name}/{kept.name}"
        monitor.reported(trial.trial_id, {**values, "step": step, "attempt": attempt, "best_checkpoint": best})
    if steps < STEPS:
        return TrialResult("failed", math.nan)
    return monitor.ended(trial.trial_id, {"status": "finished", "metrics": values})
