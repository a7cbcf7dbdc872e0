"""One session of a study: one Ray cluster, in which Tune runs the trials that are left."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ebft_study import results
from ebft_study.config import RunConfig
from ebft_study.study import (
    checks,
    cluster,
    early_stopping,
    perturbation,
    progress,
    services,
    takeover,
    trials,
)
from ebft_study.study.history import History
from ebft_study.study.monitor import Monitor
from ebft_study.study.search import JOURNAL, ListedSearch, OptunaSearch, PopulationSearch, Search
from ebft_study.study.spec import StudySpec
from ebft_study.study.trials import Trial


def run_session(folder: Path, spec: StudySpec, runs: Sequence[RunConfig], past: History, console: Console) -> str:
    """Run what is left of a study; `past.states` is kept up to date. Returns why it ended early, '' if it did not.

    Args:
        runs: its configurations, or those that stand for all that a search may choose (`checks.check`).
    """
    cluster.set_environment()
    from ebft_study.study.tuning import StopWish

    takeover.tidy(folder)
    recorder = results.StudyRecorder(folder, study=spec.study)
    monitor = Monitor(recorder, past.states, spec.objective.metric, spec.objective.further_metrics)
    plan = progress.Plan(trials.number_of_trials(spec), checks.trials_at_once(spec, runs))
    search = _search(folder, spec, past, monitor, plan.at_once)
    columns = tuple(dict.fromkeys(("ce_loss", "cfm_loss", *(one.metric for one in spec.objective.all))))
    watch = early_stopping.Watch(spec.stopping, spec.objective, past.evaluations)
    wish = StopWish(spec.budget.max_hours, cluster.node_is_alive, watch)
    with _signals(wish.wish):
        monitor.display = progress.display(console, columns, past.states, title=spec.study, plan=plan)
        monitor.note("session", f"{spec.study}: {progress.summary(list(past.states.values()), plan)}")
        try:
            _tune(folder, spec, past, runs, search, monitor, wish, plan.at_once)
        except BaseException as error:
            wish.wish(f"the driver failed: {type(error).__name__}: {error}")
            raise
        finally:
            monitor.interrupted(wish.reason or "the driver ended")
            monitor.display.close()
            results.compact(folder)
    return str(wish.reason)


def _search(folder: Path, spec: StudySpec, past: History, monitor: Monitor, places: int) -> Search:
    """The trials that have not ended, in order; all that are known by now go on record as pending."""
    if spec.search.algorithm == "optuna":

        def refused(label: str, problem: str) -> None:
            monitor.note("refused", f"{label}: {problem}")

        return OptunaSearch(spec, folder / JOURNAL, past.endings, refused)
    waiting = [t for t in trials.listed(spec) if t.trial_id not in past.endings]
    monitor.all_planned(waiting)
    return PopulationSearch(waiting, places=places) if spec.scheduler.kind == "pbt" else ListedSearch(waiting)


def _tune(
    folder: Path,
    spec: StudySpec,
    past: History,
    runs: Sequence[RunConfig],
    search: Search,
    monitor: Monitor,
    wish: Any,
    at_once: int,
) -> None:
    """Start Ray and let Tune run the search to its end, or until `wish` says stop."""
    import ray.tune

    from ebft_study.study import relay
    from ebft_study.study.bridge import run_trial, trial_resources
    from ebft_study.study.tuning import Observer, StudySearcher

    plan = services.plan_features(runs, spec.resources, at_once=at_once)
    if plan.reason:
        monitor.note("features", plan.reason)
    services.check_cache(runs, plan, spec.resources)
    shared = services.StudyServices(spec.resources, plan, runs)
    lines, take_turns = takeover.lines(folder), spec.scheduler.kind == "pbt"
    # Ray frees the places of a stopped trial's workers only after asking the dashboard whether their controller lives.
    with cluster.running(
        namespace=spec.study,
        places=at_once,
        dashboard=spec.resources.workers_per_trial > 0,
        travelling_bytes=plan.travelling_bytes,
    ):
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        post = relay.start()

        def released(trial_id: str, attempt: int) -> None:
            owner = f"{trial_id}-{attempt}"
            post.close.remote(owner)
            shared.released(owner)

        scheduler = _scheduler(folder, spec, runs, past, monitor, at_once, released)
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(run_trial, trial_resources(spec.resources)),
            tune_config=ray.tune.TuneConfig(
                search_alg=StudySearcher(
                    search,
                    monitor,
                    lambda trial: _settings(folder, spec, shared, trial, lines.get(trial.trial_id)),
                    take_turns=take_turns,
                ),
                scheduler=scheduler,
                num_samples=-1,
                max_concurrent_trials=trials.number_of_trials(spec) if take_turns else at_once,
                reuse_actors=False,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=ray.tune.RunConfig(
                name=time.strftime("%Y%m%d-%H%M%S"),
                storage_path=str(folder / "tune"),
                verbose=0,
                stop=wish,
                callbacks=[Observer(search, monitor, released, _reasons(wish.watch, scheduler))],
                failure_config=ray.tune.FailureConfig(max_failures=spec.resources.max_failures),
                checkpoint_config=ray.tune.CheckpointConfig(num_to_keep=3),
            ),
        )
        try:
            tuner.fit()
        finally:
            for problem in shared.close():
                monitor.note("cache", problem)


def _trial_name(trial: Any) -> str:
    return str(trial.config["trial_id"])


def _scheduler(
    folder: Path,
    spec: StudySpec,
    runs: Sequence[RunConfig],
    past: History,
    monitor: Monitor,
    places: int,
    released: Callable[[str, int], None],
) -> Any:
    from ray.tune.schedulers import FIFOScheduler

    from ebft_study.study.population import Populations
    from ebft_study.study.schedulers import StudyScheduler

    if spec.scheduler.kind == "pbt":
        warm = runs[-1].training.warm_start_steps
        return Populations(spec, folder, monitor, warm_start_steps=warm, places=places, released=released)
    if spec.scheduler.kind == "none":
        return FIFOScheduler()
    longest = max(run.total_steps for run in runs)
    return StudyScheduler(spec, longest=longest, history=past.curves)


def _reasons(watch: early_stopping.Watch, scheduler: Any) -> ChainMap[str, str]:
    """Why trials were stopped; a rule for single trials is asked before the scheduler."""
    return ChainMap(watch.reasons, getattr(scheduler, "reasons", {}))


def _settings(
    folder: Path, spec: StudySpec, shared: services.StudyServices, trial: Trial, line: takeover.Line | None
) -> dict[str, Any]:
    """What a trial's processes are told: plain values only. What it shares with others is started.

    `line`: what the trial has taken over from another one in an earlier session.
    """
    from ebft_study.training import recorded

    settings = trial.configuration.settings if line is None else line.settings
    run = shared.settle(trial.run if line is None else perturbation.applied(spec, trial.run.model_dump(), settings))
    shared.provide(run)

    return {
        "study": spec.study,
        "study_folder": str(folder),
        "trial_id": trial.trial_id,
        "label": trial.label,
        "is_baseline": trial.configuration.baseline is not None,
        "total_steps": run.total_steps,
        "run": run.model_dump(mode="json"),
        "settings": settings,
        "line": None if line is None else asdict(line),
        "resources": spec.resources.model_dump(mode="json"),
        "loop": recorded.LOOP,
    }


@contextlib.contextmanager
def _signals(wish: Any) -> Iterator[None]:
    """The first Ctrl-C, or a polite kill, asks the study to stop; the next Ctrl-C ends it at once."""

    def handle(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        wish("Ctrl-C" if number == signal.SIGINT else "Ctrl-C (terminated)")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
