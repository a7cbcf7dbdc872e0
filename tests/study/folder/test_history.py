"""States of trials from tables, against a slow reading trial by trial."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from ebft_study import results
from ebft_study.results import reader
from ebft_study.results.metrics import COST
from ebft_study.storage import storage_path
from ebft_study.study.folder import history, study_yaml
from ebft_study.study.view import status
from tests.studies import SOURCE, resolved
from tests.synthetic_study import write_study

NAMES = ("loss", "ce_loss", "cfm_loss", "flops", "cpu_seconds", "kl")


def tables_of(seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Trials of some attempts with gaps, infinities, and steps that a later attempt has not reached again."""
    random, rows = np.random.default_rng(seed), []
    attempts = {f"t{number}": int(random.integers(1, 4)) for number in range(8)}
    for trial, last in attempts.items():
        for step in range(0, 10 * int(random.integers(0, 6)), 10):
            values = random.choice([1.0, 2.5, np.nan, np.inf], len(NAMES), p=[0.4, 0.3, 0.2, 0.1])
            attempt = int(random.integers(1, last + 1))
            rows.append({"trial_id": trial, "attempt": attempt, "step": step, **dict(zip(NAMES, values, strict=True))})
    base = {"label": "x", "status": "running", "error": None, "stop_reason": None, "started_at": pd.NaT}
    numbers = {"total_seconds": math.nan, "steps": 40, "warm_start_steps": 0}
    trials = [{"trial_id": trial, "attempt": attempt, **base, **numbers} for trial, attempt in attempts.items()]
    columns = ["trial_id", "attempt", "step", *NAMES]
    return pd.DataFrame(trials), pd.DataFrame(rows, columns=columns).assign(study="s", written_at=None)


def slowly(trial: str, attempt: int, metrics: pd.DataFrame) -> tuple[int, dict[str, float]]:
    """Step and metrics: the last value of each that is there, but costs as the present attempt last had them."""
    step, found, cost = 0, dict[str, float](), dict[str, float]()
    for row in metrics[metrics["trial_id"] == trial].to_dict("records"):
        step = max(step, int(row["step"]))
        found |= {name: row[name] for name in NAMES if not math.isnan(row[name])}
        if row["attempt"] == attempt:
            cost = {name: row[name] for name in NAMES if name in COST}
    merged = {name: value for name, value in found.items() if name not in COST} | cost
    return step, {name: value for name, value in merged.items() if math.isfinite(value)}


@pytest.mark.parametrize("seed", range(6))
def test_states_are_those_of_a_slow_reading(seed: int) -> None:
    trials, metrics = tables_of(seed)
    for trial, state in history.states(trials, metrics).items():
        assert (state.step, state.metrics) == slowly(trial, state.attempt, metrics)


@pytest.mark.parametrize("seed", range(6))
def test_evaluations_have_the_latest_values_before_them(seed: int) -> None:
    _, metrics = tables_of(seed)
    for trial, evaluations in history._evaluations(metrics).items():
        own, latest, expected = metrics[metrics["trial_id"] == trial], dict[str, float](), []
        for row in own.to_dict("records"):
            latest |= {name: row[name] for name in NAMES if not math.isnan(row[name])}
            if not math.isnan(row["ce_loss"]):
                expected.append((row["step"], {k: v for k, v in latest.items() if math.isfinite(v)}))
        assert [(e.step, e.metrics) for e in evaluations] == expected


def test_status_reads_each_file_once_and_only_the_columns_that_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_study(tmp_path / "s", effects={(1.0, 0.0): (0.0, 0.0), (1.0, 0.1): (0.0, 0.0)}, with_scores=True)
    content = {"study": "s", "question": "?", "run": {"steps": 40}, "axes": {"gamma": [0.0, 0.1]}}
    study_yaml.write(folder, resolved(content).spec, SOURCE, provenance={})
    real, read = reader._parse, list[tuple[Path, Any]]()

    def noted(stored: bytes, path: Path, table: str, columns: Any) -> Any:
        read.append((path, columns))
        return real(stored, storage_path(path), table, columns)

    monkeypatch.setattr(reader, "_parse", noted)
    console = Console(file=io.StringIO(), width=200)
    status.show(folder, console)
    files = sorted((folder / "results").glob("*/[!.]*.parquet"))
    assert sorted(path for path, _ in read) == files
    most = {"trials": 20, "metrics": 30, "events": 9, "evaluations": 0, "scores": 0, "samples": 0}
    for path, columns in read:
        present = {column.name for column in results.schema.columns(path.parent.name)}
        assert columns is None or len(columns & present) <= most[path.parent.name], path
        assert columns is not None or path.parent.name == "events"
    assert "ce_loss" in console.file.getvalue()  # type: ignore[attr-defined]
