"""One session of a study: one Ray cluster, in which Tune runs the trials that are left."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from ebft_study import results
from ebft_study.config import RunConfig
from ebft_study.errors import EbftError, StorageError
from ebft_study.report import planned
from ebft_study.storage import StoragePath
from ebft_study.study.cluster import own, requests
from ebft_study.study.cluster.capacity import ClusterCapacity
from ebft_study.study.cluster.watchdog import CLUSTER_GONE, watching_the_cluster
from ebft_study.study.driver import services
from ebft_study.study.driver.background_compaction import housekeeping
from ebft_study.study.driver.monitor import Monitor
from ebft_study.study.folder.history import History
from ebft_study.study.folder.lock import LockHandle
from ebft_study.study.forecast import expected
from ebft_study.study.population import exploit, explore
from ebft_study.study.resolving import feature_plan
from ebft_study.study.search import journal
from ebft_study.study.search.listed import Admission, ListedSearch, PopulationSearch, Search
from ebft_study.study.search.optuna_search import OptunaSearch
from ebft_study.study.spec import trials
from ebft_study.study.spec.study_spec import ResourcesSpec, StudySpec
from ebft_study.study.spec.trials import Trial
from ebft_study.study.stopping import rules
from ebft_study.study.view import display

STORAGE_FAILED = "the study's storage failed"


def run_session(
    folder: StoragePath,
    spec: StudySpec,
    runs: Sequence[RunConfig],
    past: History,
    console: Console,
    capacity: ClusterCapacity,
    held: LockHandle | None = None,
) -> str:
    """Run what is left of a study; `past.states` is kept up to date. Returns why it ended early, '' if it did not.

    Args:
        runs: its configurations, or those that stand for all that a search may choose (`checks.check`).
        machines: where they run; if they are a cluster that was joined, Ray is connected to it.
        held: the study's lock; the session ends when it is lost.
    """
    own.set_environment()
    from ebft_study.study.driver.tune_hooks import StudyStopper

    if folder.local:
        exploit.remove_unfinished(folder.local)
    recorder = results.StudyRecorder(folder, study=spec.study)
    monitor = Monitor(recorder, past.states, spec.objective.metric, spec.objective.further_metrics)
    concurrency = requests.concurrent_trials(spec, runs, capacity)
    search = _admitted(_search(folder, spec, past, monitor, concurrency), spec, runs, capacity)
    plan = display.Plan(
        trials.number_of_trials(spec), concurrency, _announce(folder, spec, concurrency, recorder, console)
    )
    columns = tuple(dict.fromkeys(("ce_loss", "cfm_loss", *(one.metric for one in spec.objective.all))))
    watch = rules.RuleMonitor(spec.stopping, spec.objective, past.evaluations)
    stopper = StudyStopper(spec.budget.max_hours, (lambda: True) if capacity.is_existing else own.node_is_alive, watch)
    if held is not None:
        held.on_lost(stopper.request_stop)
    with _signals(stopper.request_stop):
        monitor.display = display.display(console, columns, past.states, title=spec.study, plan=plan)
        monitor.note("session", f"{spec.study}: {display.summary(list(past.states.values()), plan)}")
        try:
            with _watched(capacity, stopper, monitor, folder), housekeeping(folder, monitor.number_ended):
                _tune(folder, spec, past, runs, search, monitor, stopper, plan.concurrency, capacity)
        except StorageError as error:  # of the driver itself; what trials meet comes as a wish
            stopper.request_stop(f"{STORAGE_FAILED}: {error}")
        except BaseException as error:
            stopper.request_stop(f"the driver failed: {type(error).__name__}: {error}")
            raise
        finally:
            _wind_up(folder, monitor, stopper)
    return str(stopper.reason)


def _wind_up(folder: StoragePath, monitor: Monitor, stopper: Any) -> None:
    """Leave a study that can be resumed, as far as its place still takes anything."""
    try:
        monitor.interrupted(stopper.reason or "the driver ended")
        results.compact(folder)
    except StorageError as error:
        stopper.request_stop(f"{STORAGE_FAILED}: {error}")
    if monitor.display:
        monitor.display.close()


def _search(folder: StoragePath, spec: StudySpec, past: History, monitor: Monitor, places: int) -> Search:
    """The trials that have not ended, in order; all that are known by now go on record as pending."""
    if spec.search.algorithm == "optuna":

        def refused(label: str, problem: str) -> None:
            monitor.note("refused", f"{label}: {problem}")

        working = journal.download(folder)
        repaired = journal.repair(spec, working, results.read_table(folder, "trials"))
        if repaired:
            monitor.note("damaged", repaired)
        return OptunaSearch(spec, working, past.trial_results, refused, lambda: journal.upload(folder))
    waiting = [t for t in trials.listed(spec) if t.trial_id not in past.trial_results]
    monitor.all_planned(waiting)
    return PopulationSearch(waiting, slots=places) if spec.scheduler.kind == "pbt" else ListedSearch(waiting)


def _admitted(search: Search, spec: StudySpec, runs: Sequence[RunConfig], capacity: ClusterCapacity) -> Search:
    """The search, with large trials in their turn; where all are of one size, Ray's order is that of the search."""
    if len(requests.resource_requests(spec.resources, runs)) == 1:
        return search
    left = capacity.without_gpus(requests.shared_gpus(spec.resources, runs))
    return Admission(search, lambda trial: requests.request_of(spec.resources, trial.run).share(left))


def _announce(
    folder: StoragePath, spec: StudySpec, concurrency: int, recorder: results.StudyRecorder, console: Console
) -> float | None:
    """Say what the study is expected to take, on record once, and where its search can be watched.

    Returns the expected seconds of a trial, None where nothing tells.
    """
    if spec.search.algorithm == "optuna":
        watch = f"the search: optuna-dashboard {journal.working_copy(folder)}"
        console.print(watch, markup=False, highlight=False, soft_wrap=True)
    if planned.EVENT in set(results.read_table(folder, "events")["kind"]):
        return None
    with contextlib.suppress(EbftError, OSError):  # a study is no worse without
        forecast = expected.forecast(spec, storage=folder.parent, concurrency=concurrency)
        if forecast is not None:
            recorder.event(planned.EVENT, expected.message(forecast), **forecast)
            console.print(f"planned: {expected.message(forecast)}", markup=False, highlight=False)
            return expected.mean_seconds(forecast)
    return None


@contextlib.contextmanager
def _watched(capacity: ClusterCapacity, stopper: Any, monitor: Monitor, folder: StoragePath) -> Iterator[None]:
    """A cluster that was joined may go away by itself, and Ray would end this process then without a word."""
    if not capacity.is_existing:
        yield
        return

    def last_words() -> None:
        monitor.interrupted(CLUSTER_GONE)
        monitor.note("interrupted", f"{CLUSTER_GONE}; resume with: ebft-study resume {folder}")

    with watching_the_cluster(lambda: stopper.request_stop(CLUSTER_GONE), last_words):
        yield


def _tune(
    folder: StoragePath,
    spec: StudySpec,
    past: History,
    runs: Sequence[RunConfig],
    search: Search,
    monitor: Monitor,
    stopper: Any,
    concurrency: int,
    capacity: ClusterCapacity,
) -> None:
    """Start Ray, unless it was joined, and let Tune run the search to its end, or until `wish` says stop."""
    import ray.tune

    from ebft_study.study.driver import relay
    from ebft_study.study.driver.trial import run_trial, trial_resources
    from ebft_study.study.driver.tune_hooks import Observer, StudySearcher

    plan = feature_plan.plan_features(runs, spec.resources, concurrency=concurrency)
    if plan.reason:
        monitor.note("features", plan.reason)
    feature_plan.check_cache(runs, plan, spec.resources)
    shared = services.StudyServices(spec.resources, plan, runs)
    lines, take_turns = exploit.lineages(folder), spec.scheduler.kind == "pbt"
    # Ray's start puts a handler of its own for SIGTERM in place of ours, which ends the process there and then.
    with _ray(spec, capacity, concurrency, plan.travelling_bytes) as place, _signals(stopper.request_stop):
        monitor.say(own.dashboard_line())
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        post = relay.start()

        def resources_of(settings: dict[str, Any]) -> ray.tune.PlacementGroupFactory:
            own = trial_resources(ResourcesSpec(**settings["resources"]), place)
            return ray.tune.PlacementGroupFactory([own])

        def released(trial_id: str, attempt: int) -> None:
            owner = f"{trial_id}-{attempt}"
            post.close.remote(owner)
            shared.released(owner)

        def give_up(reason: str) -> None:
            stopper.request_stop(f"{STORAGE_FAILED}: {reason}")

        scheduler = _scheduler(folder, spec, runs, past, monitor, concurrency, released)
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(run_trial, resources_of),
            tune_config=ray.tune.TuneConfig(
                search_alg=StudySearcher(
                    search,
                    monitor,
                    lambda trial: _settings(folder, spec, shared, trial, lines.get(trial.trial_id)),
                    take_turns=take_turns,
                ),
                scheduler=scheduler,
                num_samples=-1,
                max_concurrent_trials=trials.number_of_trials(spec) if take_turns else concurrency,
                reuse_actors=False,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=ray.tune.RunConfig(
                name=time.strftime("%Y%m%d-%H%M%S"),
                **(folder / "tune").for_ray,
                verbose=0,
                stop=stopper,
                callbacks=[Observer(search, monitor, released, _reasons(stopper.watch, scheduler), give_up)],
                failure_config=ray.tune.FailureConfig(max_failures=spec.resources.max_failures),
                checkpoint_config=ray.tune.CheckpointConfig(num_to_keep=3),
            ),
        )
        try:
            tuner.fit()
        finally:
            for problem in shared.close():
                monitor.note("cache", problem)


@contextlib.contextmanager
def _ray(
    spec: StudySpec, capacity: ClusterCapacity, concurrency: int, travelling_bytes: float
) -> Iterator[dict[str, float]]:
    """Ray runs; yields what a trial takes of it as its place."""
    if capacity.is_existing:
        from ebft_study.study.cluster import existing

        yield existing.place(capacity, concurrency)
        return
    # Ray frees the places of a stopped trial's workers only after asking the dashboard whether their controller lives.
    dashboard = spec.resources.has_workers
    with own.running(namespace=spec.study, places=concurrency, dashboard=dashboard, travelling_bytes=travelling_bytes):
        yield {"slot": 1}


def _trial_name(trial: Any) -> str:
    return str(trial.config["trial_id"])


def _scheduler(
    folder: StoragePath,
    spec: StudySpec,
    runs: Sequence[RunConfig],
    past: History,
    monitor: Monitor,
    places: int,
    released: Callable[[str, int], None],
) -> Any:
    from ray.tune.schedulers import FIFOScheduler

    from ebft_study.study.population.pbt import Populations
    from ebft_study.study.stopping.schedulers import StudyScheduler

    if spec.scheduler.kind == "pbt":
        assert folder.local  # `runner` refuses it elsewhere
        warm = runs[-1].training.warm_start_steps
        return Populations(spec, folder.local, monitor, warm_start_steps=warm, slots=places, released=released)
    if spec.scheduler.kind == "none":
        return FIFOScheduler()
    longest = max(run.total_steps for run in runs)
    return StudyScheduler(spec, longest=longest, history=past.curves)


def _reasons(watch: rules.RuleMonitor, scheduler: Any) -> ChainMap[str, str]:
    """Why trials were stopped; a rule for single trials is asked before the scheduler."""
    return ChainMap(watch.reasons, getattr(scheduler, "reasons", {}))


def _settings(
    folder: StoragePath, spec: StudySpec, shared: services.StudyServices, trial: Trial, line: exploit.Lineage | None
) -> dict[str, Any]:
    """What a trial's processes are told: plain values only. What it shares with others is started.

    `line`: what the trial has taken over from another one in an earlier session.
    """
    from ebft_study.training import recorded

    settings = trial.configuration.settings if line is None else line.settings
    run = shared.settle(trial.run if line is None else explore.applied(spec, trial.run.model_dump(), settings))
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
        "resources": spec.resources.for_run(trial.run).model_dump(mode="json"),
        "objective": spec.objective.all[0].model_dump(mode="json", exclude={"further"}),
        "loop": recorded.LOOP,
    }


@contextlib.contextmanager
def _signals(stopper: Any) -> Iterator[None]:
    """The first Ctrl-C, or a polite kill, asks the study to stop; the next Ctrl-C ends it at once."""

    def handle(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stopper("Ctrl-C" if number == signal.SIGINT else "Ctrl-C (terminated)")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
