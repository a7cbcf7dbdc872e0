"""One session of a study: one Ray cluster, in which Tune runs the trials that are left."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console

from ebft_study import results
from ebft_study.config import RunConfig
from ebft_study.errors import StorageError
from ebft_study.places import Place
from ebft_study.study import checks, cluster, early_stopping, journal, progress, services, trials
from ebft_study.study.history import History
from ebft_study.study.lock import Held
from ebft_study.study.monitor import Monitor
from ebft_study.study.search import ListedSearch, OptunaSearch, Search
from ebft_study.study.spec import StudySpec
from ebft_study.study.trials import Trial

STORAGE_FAILED = "the study's storage failed"


def run_session(
    folder: Place, spec: StudySpec, runs: Sequence[RunConfig], past: History, console: Console, held: Held | None = None
) -> str:
    """Run what is left of a study; `past.states` is kept up to date. Returns why it ended early, '' if it did not.

    Args:
        runs: its configurations, or those that stand for all that a search may choose (`checks.check`).
        held: the study's lock; the session ends when it is lost.
    """
    cluster.set_environment()
    from ebft_study.study.tuning import StopWish

    recorder = results.StudyRecorder(folder, study=spec.study)
    monitor = Monitor(recorder, past.states, spec.objective.metric)
    search = _search(folder, spec, past, monitor)
    plan = progress.Plan(trials.number_of_trials(spec), checks.trials_at_once(spec, runs))
    columns = tuple(dict.fromkeys(("ce_loss", "cfm_loss", spec.objective.metric)))
    watch = early_stopping.Watch(spec.stopping, spec.objective, past.evaluations)
    wish = StopWish(spec.budget.max_hours, cluster.node_is_alive, watch)
    if held is not None:
        held.on_lost(wish.wish)
    with _signals(wish.wish):
        monitor.display = progress.display(console, columns, past.states, title=spec.study, plan=plan)
        monitor.note("session", f"{spec.study}: {progress.summary(list(past.states.values()), plan)}")
        try:
            _tune(folder, spec, past, runs, search, monitor, wish, plan.at_once)
        except StorageError as error:  # of the driver itself; what trials meet comes as a wish
            wish.wish(f"{STORAGE_FAILED}: {error}")
        except BaseException as error:
            wish.wish(f"the driver failed: {type(error).__name__}: {error}")
            raise
        finally:
            _wind_up(folder, monitor, wish)
    return str(wish.reason)


def _wind_up(folder: Place, monitor: Monitor, wish: Any) -> None:
    """Leave a study that can be resumed, as far as its place still takes anything."""
    try:
        monitor.interrupted(wish.reason or "the driver ended")
        results.compact(folder)
    except StorageError as error:
        wish.wish(f"{STORAGE_FAILED}: {error}")
    if monitor.display:
        monitor.display.close()


def _search(folder: Place, spec: StudySpec, past: History, monitor: Monitor) -> Search:
    """The trials that have not ended, in order; all that are known by now go on record as pending."""
    if spec.search.algorithm == "optuna":

        def refused(label: str, problem: str) -> None:
            monitor.note("refused", f"{label}: {problem}")

        working = journal.fetch(folder)
        mended = journal.mend(spec, working, results.read_table(folder, "trials"))
        if mended:
            monitor.note("damaged", mended)
        return journal.Kept(OptunaSearch(spec, working, past.endings, refused), working, folder)
    waiting = [t for t in trials.trials_of(spec, trials.enumerated(spec)) if t.trial_id not in past.endings]
    for trial in waiting:
        monitor.planned(trial)
    return ListedSearch(waiting)


def _tune(
    folder: Place,
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

        def give_up(reason: str) -> None:
            wish.wish(f"{STORAGE_FAILED}: {reason}")

        tuner = ray.tune.Tuner(
            ray.tune.with_resources(run_trial, trial_resources(spec.resources)),
            tune_config=ray.tune.TuneConfig(
                search_alg=StudySearcher(search, monitor, lambda trial: _settings(folder, spec, shared, trial)),
                scheduler=_scheduler(spec, runs, past),
                num_samples=-1,
                max_concurrent_trials=at_once,
                reuse_actors=False,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=ray.tune.RunConfig(
                name=time.strftime("%Y%m%d-%H%M%S"),
                **(folder / "tune").for_ray,
                verbose=0,
                stop=wish,
                callbacks=[Observer(search, monitor, released, wish.watch.reasons, give_up)],
                failure_config=ray.tune.FailureConfig(max_failures=spec.resources.max_failures),
                checkpoint_config=ray.tune.CheckpointConfig(num_to_keep=2),
            ),
        )
        try:
            tuner.fit()
        finally:
            for problem in shared.close():
                monitor.note("cache", problem)


def _trial_name(trial: Any) -> str:
    return str(trial.config["trial_id"])


def _scheduler(spec: StudySpec, runs: Sequence[RunConfig], past: History) -> Any:
    from ray.tune.schedulers import FIFOScheduler

    from ebft_study.study.schedulers import Rungs

    if spec.scheduler.kind == "none":
        return FIFOScheduler()
    longest = max(run.total_steps for run in runs)
    return Rungs(spec, longest=longest, history=past.curves)


def _settings(folder: Place, spec: StudySpec, shared: services.StudyServices, trial: Trial) -> dict[str, Any]:
    """What a trial's processes are told: plain values only. What it shares with others is started."""
    from ebft_study.training import recorded

    run = shared.settle(trial.run)
    shared.provide(run)

    return {
        "study": spec.study,
        "study_folder": str(folder),
        "trial_id": trial.trial_id,
        "label": trial.label,
        "is_baseline": trial.configuration.baseline is not None,
        "total_steps": run.total_steps,
        "run": run.model_dump(mode="json"),
        "resources": spec.resources.model_dump(mode="json"),
        "objective": spec.objective.model_dump(mode="json"),
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
