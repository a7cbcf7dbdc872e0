"""A single run without Ray, recorded like a study of one trial."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from ebft_study import results
from ebft_study.config import RunConfig
from ebft_study.errors import ConfigError, EbftError, ResultsError
from ebft_study.study.cluster import own
from ebft_study.study.driver import services
from ebft_study.study.driver.monitor import Monitor
from ebft_study.study.folder import attempts, study_yaml
from ebft_study.study.resolving import feature_plan
from ebft_study.study.spec.study_spec import ObjectiveSpec, ResourcesSpec, StudySpec, nested
from ebft_study.study.spec.trials import Configuration, Trial
from ebft_study.study.view.display import Lines

TRIAL = "t0000"
COLUMNS = ("ce_loss", "cfm_loss", "reward")
_MAY_GROW = "run.training.steps:"


def run_single(run: RunConfig, *, file: Path, folder: Path, resume_existing: bool, console: Console) -> str:
    """Train `run` in this process; returns its status. `go_on`: from the newest checkpoint in `folder`, if any."""
    from ebft_study.training.prepare import prepare

    folder = folder.resolve()
    spec = StudySpec(study=run.name, question=f"A single run of {file.name}.", run=nested(run), seeds=(run.seed,))
    _check_folder(folder, spec, resume_existing)
    provenance = prepare([run])
    folder.mkdir(parents=True, exist_ok=True)
    study_yaml.write(folder, spec, profile=None, file=file, provenance=provenance)
    monitor = Monitor(results.StudyRecorder(folder, study=run.name), {}, "cfm_loss")
    monitor.display = Lines(console, COLUMNS)
    monitor.planned(Trial(TRIAL, Configuration("only", {}), run.seed, run))
    monitor.started(TRIAL)
    try:
        with _services(run, monitor):
            outcome = _train(run, folder, monitor)
    except EbftError as error:
        monitor.ended(TRIAL, {"status": "failed", "reason": str(error)})
        raise
    except BaseException as error:
        monitor.interrupted(f"{type(error).__name__}: {error}".rstrip(": "))
        raise
    monitor.ended(TRIAL, outcome)
    return str(outcome["status"])


@contextlib.contextmanager
def _services(run: RunConfig, monitor: Monitor) -> Iterator[None]:
    """The processes beside this one that the run asks for, if any."""
    if not services.needs_ray(run):
        yield
        return
    from ebft_study.training.setup import choose_device

    own.set_environment()
    _check_gpus(run, choose_device(run).type)
    resources = ResourcesSpec()
    plan = feature_plan.plan_features([run], resources, concurrency=1)
    feature_plan.check_cache([run], plan, resources)
    with own.running(namespace=run.name, places=1, dashboard=False, travelling_bytes=plan.travelling_bytes):
        shared = services.StudyServices(resources, plan)
        shared.provide(run)
        try:
            yield
        finally:
            for problem in shared.problems():
                monitor.note("cache", problem)


def _check_gpus(run: RunConfig, device: str) -> None:
    """A run that is on a GPU without Ray's knowing leaves none that Ray could give to others."""
    if device == "cpu":
        return
    if run.features.backend == "service":
        raise ConfigError(
            "features.backend='service': a single run on a GPU has none to spare for it. Use backend=local"
        )
    if run.uses_engine and run.vllm.placement == "own":
        raise ConfigError(
            "vllm.placement='own': a single run knows of no GPU but its own. Use placement=colocated, or a study "
            "of one trial (ebft-study study)"
        )


def _train(run: RunConfig, folder: Path, monitor: Monitor) -> dict[str, Any]:
    from ebft_study.training.recorded import Attempt, train_recorded

    start_from = attempts.newest_checkpoint(folder, TRIAL)
    attempt = attempts.begin(folder, TRIAL)
    own = attempts.folder(folder, TRIAL, attempt)

    def on_report(metrics: dict[str, float], written: Path | None) -> None:
        best: dict[str, Any] = {}
        if written is not None:
            attempts.keep_checkpoint(own, written, step=int(metrics["step"]))
            best["best_checkpoint"] = attempts.prune(folder, TRIAL, run.checkpoint, ObjectiveSpec())
        monitor.reported(TRIAL, {**metrics, **best, "attempt": attempt, "host": socket.gethostname()})

    this = Attempt(run.name, str(folder), TRIAL, run.name, attempt, str(start_from) if start_from else None)
    return train_recorded(run, this, on_report=on_report)


def _check_folder(folder: Path, spec: StudySpec, resume_existing: bool) -> None:
    """Refuse a folder that holds another run, or the same one without being asked to go on."""
    if not (folder / study_yaml.NAME).exists():
        return
    different = [
        line for line in study_yaml.differences(study_yaml.read(folder), spec) if not line.startswith(_MAY_GROW)
    ]
    if different:
        raise ResultsError(
            f"{folder}: holds a run with other settings ({'; '.join(different[:3])}). Use another --output"
        )
    if not resume_existing:
        raise ResultsError(f"{folder}: holds this run already. Add --resume to continue it, or use another --output")
