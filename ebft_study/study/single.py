"""A single run without Ray, recorded like a study of one trial."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from rich.console import Console

from ebft_study import results
from ebft_study.config import RunConfig
from ebft_study.errors import CheckpointError, ResultsError
from ebft_study.study import attempts, record
from ebft_study.study.monitor import Monitor
from ebft_study.study.progress import Lines
from ebft_study.study.spec import StudySpec, nested
from ebft_study.study.trials import Configuration, Trial

TRIAL = "t0000"
COLUMNS = ("ce_loss", "cfm_loss", "reward")


def run_single(run: RunConfig, *, file: Path, folder: Path, go_on: bool, console: Console) -> str:
    """Train `run` in this process; returns its status. `go_on`: from the newest checkpoint in `folder`."""
    from ebft_study.training import loop
    from ebft_study.training.prepare import prepare

    folder = folder.resolve()
    start_from = _start_from(folder, go_on)
    provenance = prepare([run])
    folder.mkdir(parents=True, exist_ok=True)
    spec = StudySpec(study=run.name, question=f"A single run of {file.name}.", run=nested(run), seeds=(run.seed,))
    record.write(folder, spec, profile=None, file=file, provenance=dict(provenance))
    trial = Trial(TRIAL, Configuration("only", {}), run.seed, run)
    monitor = Monitor(results.StudyRecorder(folder, study=run.name), {}, "cfm_loss")
    monitor.display = Lines(console, COLUMNS)
    monitor.planned(trial)
    attempt = attempts.begin(folder, TRIAL)
    own = attempts.folder(folder, TRIAL, attempt)

    def on_report(metrics: dict[str, float], written: Path | None) -> None:
        if written is not None:
            attempts.keep_checkpoint(own, written, step=int(metrics["step"]), keep=run.checkpoint.keep_checkpoints)
        monitor.reported(TRIAL, {**metrics, "attempt": attempt})

    monitor.started(TRIAL)
    started_at = time.time()
    recorder = results.TrialRecorder(folder, study=run.name, trial_id=TRIAL, attempt=attempt)
    try:
        outcome = loop.train(run, recorder=recorder, on_report=on_report, start_from=start_from)
    except BaseException as error:
        monitor.interrupted(f"{type(error).__name__}: {error}".rstrip(": "))
        raise
    times = {"started_at": started_at, "train_seconds": time.time() - started_at}
    monitor.ended(TRIAL, {**dataclasses.asdict(outcome), **times})
    return outcome.status


def _start_from(folder: Path, go_on: bool) -> Path | None:
    exists = (folder / record.NAME).exists()
    if exists and not go_on:
        raise ResultsError(f"{folder}: holds a run already. Add --resume to continue it, or choose another --output")
    found = attempts.newest_checkpoint(folder, TRIAL) if go_on else None
    if go_on and found is None and exists:
        raise CheckpointError(f"{folder}: holds no complete checkpoint. Choose another --output to start afresh")
    return found
