"""A single run without Ray, recorded like a study of one trial."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from ebft_study import results
from ebft_study.config import EARLIER_DEFAULTS, RunConfig, build_run, with_paths
from ebft_study.errors import ConfigError, EbftError, ResultsError
from ebft_study.storage import storage_path
from ebft_study.study.cluster import own
from ebft_study.study.driver import services
from ebft_study.study.driver.monitor import Monitor
from ebft_study.study.folder import attempts, history, study_yaml
from ebft_study.study.folder.study_yaml import StudySource
from ebft_study.study.forecast.disk import checkpoint_disk
from ebft_study.study.resolving import plugin_use
from ebft_study.study.resolving.service_plan import check_cache, check_shared_memory, plan_services
from ebft_study.study.spec.study_spec import ObjectiveSpec, ResourcesSpec, StudySpec, nested, paths
from ebft_study.study.spec.trials import Configuration, Trial
from ebft_study.study.view import display
from ebft_study.study.view.display import Lines
from ebft_study.training import RunResult, Workers

TRIAL = "t0000"
COLUMNS = ("ce_loss", "cfm_loss", "reward")
_MAY_GROW = "run.training.steps:"


def run_single(run: RunConfig, source: StudySource, *, folder: Path, resume: bool, console: Console) -> RunResult:
    """Train `run` in this process. `resume`: from the newest checkpoint in `folder`, if there is any.

    Only for the process that holds the folder's lock.
    """
    from ebft_study.training.memory import shortage
    from ebft_study.training.prepare import prepare
    from ebft_study.training.setup import choose_device, planned

    shown, folder = shlex.quote(str(folder)), folder.resolve()
    run = _with_recorded_defaults(run, folder, source.name)
    question = f"A single run of {Path(source.name).name}."
    spec = StudySpec(study=run.name, question=question, run=nested(run), seeds=(run.seed,))
    _check_folder(folder, spec, resume)
    plugin_folder = plugin_use.folder_of(source.name)
    plugin_use.load(spec, [run], source=source.name, folder=plugin_folder)
    workers = Workers("cuda" if choose_device(run).type == "cuda" else "cpu")
    if run.uses_engine:
        alone = ResourcesSpec()
        check_shared_memory([run], plan_services([run], alone, concurrency=1), alone, concurrency=1)
    display.print_plain(console, f"results: {shown}")
    provenance = prepare([run], workers=lambda _: workers)
    if used := plugin_use.record(spec, [run]):
        provenance["plugins"] = used
    if changed := study_yaml.changed_inputs(folder, provenance):
        raise ResultsError(f"{folder}: {'; '.join(changed)}: the run began with others. Use another --output")
    folder.mkdir(parents=True, exist_ok=True)
    study_yaml.write(folder, spec, source, provenance=provenance)
    objective = spec.objective.metric
    past = history.read(folder, objective).states
    monitor = Monitor(results.StudyRecorder(folder, study=run.name), past, objective)
    monitor.display = Lines(console, COLUMNS, past, display.Plan(1))
    of_disk = checkpoint_disk([(run, 1)], concurrency=1).shortages(storage_path(folder))
    for problem in filter(None, [*of_disk, shortage(*planned(run))]):
        console.print(f"note: {problem}", markup=False, highlight=False, soft_wrap=True)
    gpus = float(workers.device == "cuda")
    monitor.planned(Trial(TRIAL, Configuration("only", {}), run.seed, run, ResourcesSpec(gpus_per_worker=gpus)))
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
    display.print_plain(console, f"results: {shown}; their report: ebft-study report {shown}")
    return RunResult(**{field.name: outcome[field.name] for field in dataclasses.fields(RunResult)})


@contextlib.contextmanager
def _services(run: RunConfig, monitor: Monitor) -> Iterator[None]:
    """The services that the run uses, if any."""
    if not services.needs_ray(run):
        yield
        return
    from ebft_study.training.setup import choose_device

    own.set_environment()
    _check_gpus(run, choose_device(run).type)
    resources = ResourcesSpec()
    plan = plan_services([run], resources, concurrency=1)
    check_cache([run], plan, resources)
    with own.running(namespace=run.name, slots=1, dashboard=False, travelling_bytes=plan.travelling_bytes):
        shared = services.StudyServices(resources)
        shared.start(run)
        try:
            yield
        finally:
            for problem in shared.problems():
                monitor.note("cache", problem)


def _check_gpus(run: RunConfig, device: str) -> None:
    """Refuse services that need a GPU: the run occupies the only one, and Ray does not know of it."""
    if device == "cpu":
        return
    if run.features.backend == "service":
        raise ConfigError(
            "features.backend='service': a single run on a GPU leaves none for the service. Use backend=local"
        )
    if run.uses_engine and run.vllm.placement == "own":
        raise ConfigError(
            "vllm.placement='own': a single run uses one GPU only. Use placement=colocated, or a study "
            "of one trial (ebft-study study)"
        )


def _train(run: RunConfig, folder: Path, monitor: Monitor) -> dict[str, Any]:
    from ebft_study.training.recorded import Attempt, train_recorded

    start_from = attempts.newest_checkpoint(folder, TRIAL)
    attempt = attempts.begin(folder, TRIAL)
    attempt_folder = attempts.folder(folder, TRIAL, attempt)
    best = {"best_checkpoint": attempts.best(folder, TRIAL, ObjectiveSpec())}

    def on_report(metrics: dict[str, float], written: Path | None) -> None:
        if written is not None:
            attempts.keep_checkpoint(attempt_folder, written, step=int(metrics["step"]))
            best["best_checkpoint"] = attempts.prune(folder, TRIAL, run.checkpoint, ObjectiveSpec())
        monitor.reported(TRIAL, {**metrics, **best, "attempt": attempt, "host": socket.gethostname()})

    this = Attempt(run.name, str(folder), TRIAL, run.name, attempt, str(start_from) if start_from else None)
    return train_recorded(run, this, on_report=on_report)


def _with_recorded_defaults(run: RunConfig, folder: Path, source: str) -> RunConfig:
    """A run that began with an earlier version, with that version's defaults where it gives no value."""
    if not (folder / study_yaml.NAME).exists():
        return run
    given, recorded = paths(run.model_dump(exclude_unset=True)), paths(study_yaml.read(folder).run)
    kept = {path: recorded[path] for path in EARLIER_DEFAULTS if path in recorded and path not in given}
    return build_run(with_paths(run.model_dump(mode="json"), kept), source=source) if kept else run


def _check_folder(folder: Path, spec: StudySpec, resume: bool) -> None:
    """Refuse a folder that holds another run, or the same one without `resume`."""
    if not (folder / study_yaml.NAME).exists():
        return
    different = [
        line for line in study_yaml.differences(study_yaml.read(folder), spec) if not line.startswith(_MAY_GROW)
    ]
    if different:
        raise ResultsError(
            f"{folder}: holds a run with other settings ({'; '.join(different[:3])}). Use another --output"
        )
    if not resume:
        raise ResultsError(f"{folder}: holds this run already. Add --resume to continue it, or use another --output")
