"""One session of a study: one Ray cluster, in which Tune runs the trials that are left."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ebft_study import results
from ebft_study.analysis import usage
from ebft_study.errors import EbftError, StorageError
from ebft_study.storage import StoragePath
from ebft_study.study.cluster import existing, own
from ebft_study.study.cluster.requests import ResourceRequest
from ebft_study.study.cluster.watchdog import CLUSTER_GONE, watching_the_cluster
from ebft_study.study.driver.background_compaction import compacting
from ebft_study.study.driver.callbacks import Callbacks
from ebft_study.study.driver.monitor import Monitor
from ebft_study.study.driver.services import StudyServices
from ebft_study.study.folder import history
from ebft_study.study.folder.history import BUDGET_USED, SESSION, History
from ebft_study.study.folder.lock import LockHandle
from ebft_study.study.folder.trial_states import OPEN
from ebft_study.study.forecast import prediction
from ebft_study.study.population import exploit, explore
from ebft_study.study.resolving.resolved import ResolvedStudy
from ebft_study.study.resolving.service_plan import check_cache
from ebft_study.study.search import journal
from ebft_study.study.search.listed import Admission, ListedSearch, PopulationSearch, Search
from ebft_study.study.search.optuna_search import OptunaSearch
from ebft_study.study.search.promotion import PromotionSearch, Skip
from ebft_study.study.spec.trial_task import TrialTask
from ebft_study.study.spec.trials import Trial, known_labels, shuffled
from ebft_study.study.stopping.rules import RuleMonitor
from ebft_study.study.view import display

if TYPE_CHECKING:
    import ray.tune

    from ebft_study.study.driver.tune_hooks import Observer, StudyStopper

STORAGE_FAILED = "the study's storage failed"
_GRACE_SECONDS = 30.0


def run_session(
    folder: StoragePath,
    study: ResolvedStudy,
    past: History,
    console: Console,
    lock_handle: LockHandle,
) -> str:
    """Run the remaining trials of a study and update `past.states`; returns why it ended early, '' if it did not.

    Args:
        study: on the machines where it runs; if they are an existing cluster, Ray is connected to it.
        lock_handle: the study's lock; the session ends when it is lost.
    """
    own.set_environment()
    from ebft_study.study.driver.tune_hooks import StudyStopper

    if folder.local:
        exploit.remove_unfinished(folder.local)
    spec = study.spec
    fence = lock_handle.fence
    recorder = results.StudyRecorder(folder, study=study.name, fence=fence)
    recorder.event(SESSION, display.summary(list(past.states.values()), display.Plan(study.n_trials)))
    monitor = Monitor(recorder, past.states, spec.objective.metric, spec.objective.further_metrics)
    search = _search(folder, study, past, monitor, fence.check)
    plan = display.Plan(study.n_trials, study.concurrency, _announce(folder, study, recorder, console))
    columns = tuple(dict.fromkeys(("ce_loss", "cfm_loss", *(one.metric for one in spec.objective.all))))
    is_alive = (lambda: True) if study.capacity.is_existing else own.node_is_alive
    hours = spec.budget.max_hours
    hours_left = None if hours is None else hours - past.session_seconds / 3600
    stopper = StudyStopper(hours_left, is_alive, RuleMonitor(spec.stopping, spec.objective, past.evaluations))
    with _ending_soon(lock_handle, stopper), _signals(stopper.request_stop):
        monitor.display = display.display(console, columns, past.states, title=study.name, plan=plan)
        monitor.say(f"{study.name}: {display.summary(list(past.states.values()), plan)}")
        monitor.callbacks = Callbacks(spec.callbacks, lambda problem: monitor.note("callback", problem))
        monitor.callbacks.call("on_study_start", study.name, str(folder))
        try:
            with compacting(folder, monitor.number_ended, fence.check):
                _tune(folder, study, past, search, monitor, stopper, fence)
        except StorageError as error:  # of the driver itself; those of trials come as stop requests
            stopper.request_stop(_storage_failed(fence, error))
        except KeyboardInterrupt:  # a second signal, or one while Ray was starting
            stopper.request_stop("Ctrl-C")
            raise
        except Exception as error:
            # Of a scheduler, for which Tune gives an error of its own.
            if not isinstance(error.__context__, StorageError):
                stopper.request_stop(f"the driver failed: {type(error).__name__}: {error}")
                raise
            stopper.request_stop(f"{STORAGE_FAILED}: {error.__context__}")
        except BaseException as error:
            loss = _loss(fence)  # of which this is what Tune makes
            stopper.request_stop(loss or f"the driver failed: {type(error).__name__}: {error}")
            if not loss:
                raise
        finally:
            _wind_up(folder, monitor, recorder, stopper, fence)
            monitor.callbacks.call("on_study_end", study.name, stopper.reason)
    is_over = search.exhausted and not any(state.status in OPEN for state in past.states.values())
    return "" if is_over and stopper.reason == BUDGET_USED else str(stopper.reason)


@contextlib.contextmanager
def _ending_soon(lock_handle: LockHandle, stopper: StudyStopper) -> Iterator[None]:
    """Context that a lost lock ends; where Ray waits for what does not come any more, the whole process ends."""

    def end() -> None:
        print(f"error: {lock_handle.lost}", file=sys.stderr, flush=True)
        os._exit(1)

    def lost(reason: str) -> None:
        stopper.request_stop(reason)
        deadline.start()

    deadline = threading.Timer(_GRACE_SECONDS, end)
    deadline.daemon = True
    lock_handle.on_lost(lost)
    try:
        yield
    finally:
        deadline.cancel()


def _loss(fence: results.Fence) -> str:
    """Why this driver may not write any more, '' where it may."""
    try:
        fence.check()
    except StorageError as error:
        return str(error)
    return ""


def _storage_failed(fence: results.Fence, error: object) -> str:
    return _loss(fence) or f"{STORAGE_FAILED}: {error}"


def _wind_up(
    folder: StoragePath, monitor: Monitor, recorder: results.StudyRecorder, stopper: StudyStopper, fence: results.Fence
) -> None:
    """Leave a study that can be resumed, as far as its storage still accepts anything."""
    try:
        monitor.interrupted(stopper.reason or "the driver ended")
        recorder.event("interrupted" if stopper.reason else "finished", stopper.reason or "every trial is over")
        results.compact(folder)
    except StorageError as error:
        stopper.request_stop(_storage_failed(fence, error))
    if monitor.display:
        monitor.display.close()


def _search(
    folder: StoragePath, study: ResolvedStudy, past: History, monitor: Monitor, check: Callable[[], None] = lambda: None
) -> Search:
    """The trials that are left, in order; those that are known by now are recorded as pending.

    Args:
        check: raises when the study is another driver's by now.
    """
    spec = study.spec
    if spec.search.algorithm == "optuna":

        def upload() -> None:
            check()
            journal.upload(folder)

        def refused(label: str, problem: str) -> None:
            monitor.note("refused", f"{label}: {problem}")

        working = journal.download(folder)
        repaired = journal.repair(spec, working, results.read_table(folder, "trials"), past.trial_results)
        if repaired:
            monitor.note("damaged", repaired)
        search: Search = OptunaSearch(spec, working, past.trial_results, refused, upload)
    else:
        ordered = list(study.trials)
        if spec.scheduler.compares:
            ordered = shuffled(ordered, spec.drawn_by, lambda trial: trial.unit, first=known_labels(spec))
        waiting = [trial for trial in ordered if trial.trial_id not in past.trial_results]
        if spec.scheduler.kind == "pbt":
            search = PopulationSearch(waiting, slots=study.concurrency)
        elif spec.seeds.promotes:
            search = PromotionSearch(ordered, past.trial_results, spec, _skip(monitor, past))
            waiting = list(search.ready)
        else:
            search = ListedSearch(waiting)
        planned = {trial.trial_id for trial in waiting}
        monitor.all_planned(trial for trial in study.trials if trial.trial_id in planned)
    if len(study.requests) == 1:  # Ray's order is that of the search
        return search
    return Admission(search, lambda trial: ResourceRequest.for_trial(trial).share(study.trial_capacity))


def _skip(monitor: Monitor, past: History) -> Skip:
    """Records trials of configurations that were not promoted, of which no scheduler thinks as running any more."""

    def skip(left_out: Sequence[tuple[Trial, str]], decision: str) -> None:
        monitor.skipped(left_out)
        past.stopped.update({trial.configuration.label: reason for trial, reason in left_out})
        monitor.note("promoted", decision)

    return skip


def _announce(
    folder: StoragePath, study: ResolvedStudy, recorder: results.StudyRecorder, console: Console
) -> float | None:
    """Print and record, once, the time that the study is expected to take, and where its search can be watched.

    Returns the expected seconds of a trial, None without earlier trials.
    """
    if study.spec.search.algorithm == "optuna":
        dashboard = f"the search: optuna-dashboard {journal.working_copy(folder)}"
        console.print(dashboard, markup=False, highlight=False, soft_wrap=True)
    if usage.PLAN_EVENT in set(results.read_table(folder, "events")["kind"]):
        return None
    with contextlib.suppress(EbftError, OSError):  # a study is no worse without
        expected = prediction.predict(study, storage=folder.parent)
        if expected is not None:
            recorder.event(usage.PLAN_EVENT, expected.message, **expected.details)
            console.print(f"planned: {expected.message}", markup=False, highlight=False)
            return expected.mean_seconds
    return None


@contextlib.contextmanager
def _watchdog(study: ResolvedStudy, stopper: StudyStopper, monitor: Monitor, folder: StoragePath) -> Iterator[None]:
    """A cluster may end by itself, and Ray would then end this process without a message."""

    def record_interruption() -> None:
        monitor.interrupted(CLUSTER_GONE)
        monitor.note("interrupted", f"{CLUSTER_GONE}; resume with: ebft-study resume {folder}")

    def gone() -> None:
        stopper.request_stop(CLUSTER_GONE)

    with watching_the_cluster(gone, record_interruption, is_own=not study.capacity.is_existing):
        yield


def _tune(
    folder: StoragePath,
    study: ResolvedStudy,
    past: History,
    search: Search,
    monitor: Monitor,
    stopper: StudyStopper,
    fence: results.Fence,
) -> None:
    """Start Ray, unless the cluster exists, and let Tune run the search to its end, or until a stop is requested."""
    import ray.tune

    from ebft_study.study.driver import relay
    from ebft_study.study.driver.trial import run_trial, tune_resources
    from ebft_study.study.driver.tune_hooks import Observer, StudySearcher
    from ebft_study.training import recorded

    spec, plan = study.spec, study.service_plan
    if plan.reason:
        monitor.record("features", plan.reason)
    check_cache(study.runs, plan, spec.resources)
    services = StudyServices(spec.resources)
    is_population = spec.scheduler.kind == "pbt"
    lineages = exploit.lineages(folder) if is_population else {}
    with _ray(study) as slot, _watchdog(study, stopper, monitor, folder):
        monitor.say(own.dashboard_line())
        for name in ("ray.tune", "ray.train._internal.storage"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        mailboxes = relay.start()

        def launched(trial: Trial) -> TrialTask:
            task = trial_task(folder, study, trial, lineages.get(trial.trial_id), fence.generation)
            services.start(task.run_config)
            return task

        def released(trial_id: str, attempt: int) -> None:
            owner = recorded.attempt_name(trial_id, attempt)
            mailboxes.close.remote(owner)
            services.released(owner)

        scheduler = _scheduler(folder, study, past, monitor, released, stopper.request_stop)
        observer = Observer(
            search,
            monitor,
            released,
            ChainMap(stopper.rule_reasons, getattr(scheduler, "reasons", {})),
            lambda reason: stopper.request_stop(_storage_failed(fence, reason)),
            max_failures=spec.resources.max_failures,
            may_lose_nodes=study.capacity.is_existing,
        )
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(
                run_trial, lambda config: tune_resources(TrialTask.from_config(config).resources_spec, slot)
            ),
            tune_config=ray.tune.TuneConfig(
                search_alg=StudySearcher(
                    search,
                    monitor,
                    launched,
                    take_turns=spec.scheduler.takes_turns,
                    give_up=stopper.request_stop,
                    **({"reason_not_to_start": scheduler.reason_not_to_start} if spec.scheduler.compares else {}),
                ),
                scheduler=scheduler,
                num_samples=-1,
                max_concurrent_trials=study.n_trials if spec.scheduler.takes_turns else study.concurrency,
                reuse_actors=False,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=_run_config(folder, stopper, observer),
        )
        try:
            tuner.fit()
        finally:
            for problem in services.problems():
                monitor.note("cache", problem)


def _run_config(folder: StoragePath, stopper: StudyStopper, observer: Observer) -> ray.tune.RunConfig:
    import ray.tune

    return ray.tune.RunConfig(
        name=time.strftime("%Y%m%d-%H%M%S"),
        **(folder / "tune").for_ray,
        verbose=0,
        stop=stopper,
        callbacks=[observer],
        failure_config=ray.tune.FailureConfig(max_failures=-1),  # the observer counts, without lost nodes
        checkpoint_config=ray.tune.CheckpointConfig(num_to_keep=3),
    )


@contextlib.contextmanager
def _ray(study: ResolvedStudy) -> Iterator[dict[str, float]]:
    """Run Ray; yields the resources that Tune reserves for a trial's own process."""
    if study.capacity.is_existing:
        yield existing.trial_request(study.capacity, study.concurrency)
        return
    # Ray frees the workers of a stopped trial only after asking the dashboard whether their controller is alive.
    dashboard = study.spec.resources.has_workers
    bytes_sent = study.service_plan.travelling_bytes
    with own.running(namespace=study.name, slots=study.concurrency, dashboard=dashboard, travelling_bytes=bytes_sent):
        yield {"slot": 1}


def _trial_name(trial: Any) -> str:
    return TrialTask.from_config(trial.config).trial_id


def _scheduler(
    folder: StoragePath,
    study: ResolvedStudy,
    past: History,
    monitor: Monitor,
    released: Callable[[str, int], None],
    give_up: Callable[[str], None],
) -> Any:
    from ray.tune.schedulers import FIFOScheduler

    from ebft_study.study.population.pbt import Populations
    from ebft_study.study.stopping.race import Race, RaceScheduler
    from ebft_study.study.stopping.schedulers import StudyScheduler

    spec = study.spec
    if spec.scheduler.kind == "pbt":
        assert folder.local  # `runner` refuses it elsewhere
        warm = study.runs[-1].training.warm_start_steps
        slots = study.concurrency
        return Populations(spec, folder.local, monitor, warm_start_steps=warm, slots=slots, released=released)
    if spec.scheduler.kind == "race":
        on_axes = [trial for trial in study.trials if trial.configuration.baseline is None]
        every, last = on_axes[0].run.evaluation.eval_every_steps, study.longest_run_steps
        race = Race(
            spec,
            [trial.replicate for trial in on_axes],
            range(every, last, every),
            scores=history.scores(folder, spec.objective.metric),
            history={replicate.trial_id: curve for replicate, curve in past.curves.items()},
            ended=past.trial_results,
        )
        return RaceScheduler(race, monitor, stopped=past.stopped, released=released)
    if spec.scheduler.kind == "none":
        return FIFOScheduler()
    return StudyScheduler(
        spec, longest=study.longest_run_steps, history=past.curves, stopped=past.stopped, give_up=give_up
    )


def trial_task(
    folder: StoragePath, study: ResolvedStudy, trial: Trial, lineage: exploit.Lineage | None, generation: int = 0
) -> TrialTask:
    """The task of a trial's processes, with every open choice made.

    Args:
        lineage: what the trial has continued since an exploit in an earlier session.
        generation: of the driver, in a store.
    """
    from ebft_study.training import recorded

    run, settings = trial.run, trial.configuration.settings
    if lineage is not None:
        settings = lineage.settings
        run = explore.perturbed_run(study.spec, run.model_dump(), settings)
    run = study.service_plan.settled(run)
    return TrialTask(
        study=study.name,
        study_folder=str(folder),
        trial_id=trial.trial_id,
        label=trial.label,
        is_baseline=trial.configuration.baseline is not None,
        total_steps=run.total_steps,
        run=run.model_dump(mode="json"),
        settings=settings,
        resources=trial.resources.model_dump(mode="json"),
        objective=study.spec.objective.all[0].model_dump(mode="json", exclude={"further"}),
        loop=recorded.LOOP,
        plugins=study.plugins,
        lineage=None if lineage is None else dataclasses.asdict(lineage),
        generation=generation,
    )


@contextlib.contextmanager
def _signals(request_stop: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl-C, or a SIGTERM, asks the study to stop; the next Ctrl-C ends it immediately."""

    def handle(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        request_stop("Ctrl-C" if number == signal.SIGINT else "Ctrl-C (terminated)")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
