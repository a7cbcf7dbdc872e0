"""What a large study costs its driver and its readers: everything but Ray, which would need a process per trial.

    make scale          (or: python -m tests.scale.simulate --trials 2000 --reports 50 --at-once 512)

Tune's part is played by a loop that calls our searcher, scheduler, stopper and observer as Tune does, with up to
`--at-once` trials running. A trial's rows are written when it ends, in one file, as the driver's housekeeping leaves
them. Times are of the processor, so that they hold on a machine that is busy with other things; the disk's own time
comes on top.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ebft_study import report, results
from ebft_study.results.writer import now
from ebft_study.study.driver.monitor import Monitor
from ebft_study.study.driver.tune_hooks import Observer, StudySearcher, StudyStopper
from ebft_study.study.folder import history, study_yaml, trial_states
from ebft_study.study.resolving.resolved import ResolvedStudy
from ebft_study.study.search.listed import ListedSearch
from ebft_study.study.stopping import rules
from ebft_study.study.stopping.schedulers import StudyScheduler
from ebft_study.study.view import display
from tests.studies import resolved, task_of

SECONDS: dict[str, float] = {}
COMPACTED_EVERY = 500  # trials


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Add the processor's time inside to `SECONDS[name]`."""
    started = time.process_time()
    yield
    SECONDS[name] = SECONDS.get(name, 0.0) + time.process_time() - started


def study_of(n_trials: int, n_reports: int) -> ResolvedStudy:
    rates = [round(1e-5 * (1 + index), 8) for index in range(n_trials)]
    content = {
        "study": "large",
        "question": "How large can a study be?",
        "run": {"steps": n_reports * 10, "eval_every_steps": 10, "features": {"backend": "local"}},
        "axes": {"learning_rate": rates},
        "stopping": {"divergence": {"margin": 0.5, "evaluations": 3}},
        "scheduler": {"kind": "asha", "grace_period_steps": n_reports * 10 - 1, "reduction_factor": 4},
    }
    return resolved(content)


class Simulation:
    """Our side of a study, with the events of a cluster of `concurrency` slots."""

    def __init__(self, folder: Path, study: ResolvedStudy, concurrency: int) -> None:
        self.folder, self.concurrency, spec = folder, concurrency, study.spec
        self.states: dict[str, trial_states.TrialState] = {}
        self.monitor = Monitor(results.StudyRecorder(folder, study=spec.study), self.states, "cfm_loss")
        with timed("recording trials"):
            self.monitor.all_planned(study.trials)
        search = ListedSearch(study.trials)
        past = history.History({}, {}, {})
        self.scheduler = StudyScheduler(spec, longest=study.longest_run_steps, history=past.curves)
        rule_monitor = rules.RuleMonitor(spec.stopping, spec.objective, {})
        self.stopper = StudyStopper(None, rules=rule_monitor)
        self.searcher = StudySearcher(search, self.monitor, task_of)
        self.observer = Observer(search, self.monitor, lambda trial_id, attempt: None, rule_monitor.reasons)
        self.running: deque[Any] = deque()
        self.reports = 0

    def run(self, compact: Callable[[], None]) -> None:
        ended = 0
        while True:
            while len(self.running) < self.concurrency and self._start():
                pass
            if not self.running:
                return
            trial = self.running.popleft()
            if self._report(trial):
                self.running.append(trial)
            else:
                ended += 1
                if ended % COMPACTED_EVERY == 0:
                    compact()

    def _start(self) -> bool:
        with timed("driver, per trial"):
            settings = self.searcher.suggest("")
        if not isinstance(settings, dict):
            return False
        trial = SimpleNamespace(config=settings, last_result=None, error_file=None, trial_id=settings["trial_id"])
        trial.recorder = results.TrialRecorder(self.folder, study="large", trial_id=settings["trial_id"], attempt=1)
        trial.rows = []
        self.running.append(trial)
        return True

    def _report(self, trial: Any) -> bool:
        step = (trial.last_result or {"step": 0})["step"] + 10
        cfm = 2.0 + trial.config["run"]["optimizer"]["learning_rate"] + 1.0 / step
        metrics = {"ce_loss": 3.0, "cfm_loss": cfm, "reward": 0.1, "step_seconds": 0.5}
        row = {"study": "large", "trial_id": trial.trial_id, "attempt": 1, "step": step, "written_at": now(), **metrics}
        trial.rows.append(row)
        result = {**metrics, "step": step, "attempt": 1, "host": "node", "config": trial.config}
        self.reports += 1
        over = step >= trial.config["total_steps"]
        with timed("driver, per report"):
            self.scheduler.on_trial_result(None, trial, result)
            self.stopper("", result)
            self.observer.on_trial_result(0, [], trial, result)
        trial.last_result = result
        if over:
            trial.recorder._files.write("metrics", trial.rows)
            with timed("driver, per trial"):
                seconds = {"started_at": time.time(), "train_seconds": 1.0, "startup_seconds": 1.0}
                trial.last_result = {**result, "outcome": {"status": "finished", **seconds}}
                self.observer.on_trial_complete(0, [], trial)
        return not over


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--reports", type=int, default=50, help="of each trial")
    parser.add_argument("--report", action="store_true", help="also write the report, with its figures")
    parser.add_argument("--at-once", dest="concurrency", type=int, default=512)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="ebft-scale-"))
    try:
        simulate(root / "large", options)
    finally:
        shutil.rmtree(root)


def simulate(folder: Path, options: argparse.Namespace) -> None:
    folder.mkdir()
    with timed("resolving the study"):
        study = study_of(options.trials, options.reports)
    study_yaml.write(folder, study.spec, study.source, provenance={})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    simulation = Simulation(folder, study, options.concurrency)

    def compact() -> None:
        with timed("compaction"):
            results.compact(folder)

    wall = time.monotonic()
    simulation.run(compact)
    wall = time.monotonic() - wall
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    files = list((folder / "results").rglob("*.parquet"))
    print(f"before the last compaction: {len(files)} files, {sum(p.stat().st_size for p in files) / 2**20:.1f} MiB")
    with timed("results.load before it"):
        results.load(folder)
    compact()
    files = list((folder / "results").rglob("*.parquet"))
    print(f"after it: {len(files)} files, {sum(p.stat().st_size for p in files) / 2**20:.1f} MiB")
    with timed("results.load"):
        loaded = results.load(folder)
    assert len(loaded.trials) == options.trials
    assert len(loaded.metrics) == simulation.reports
    with timed("history of a resumed study"):
        past = history.read(folder, "cfm_loss")
    with timed("scheduler of a resumed study"):
        StudyScheduler(study.spec, longest=study.longest_run_steps, history=past.curves)
    plan = display.Plan(options.trials, options.concurrency)
    with timed("live table, once"):
        display.render(simulation.states.values(), ("ce_loss", "cfm_loss"), title="large", plan=plan)
    if options.report:
        with timed("report"):
            report.write_report(folder)
    for name, seconds in SECONDS.items():
        per = options.trials if "per trial" in name else simulation.reports if "per report" in name else 0
        print(f"{name:35} {seconds:9.2f} s" + (f"   {1000 * seconds / per:8.3f} ms each" if per else ""))
    print(f"{options.trials} trials of {options.reports} reports, {options.concurrency} at once")
    print(f"simulated in {wall:.0f} s; memory grew by {grown / 2**10:.0f} MiB")


if __name__ == "__main__":
    main()
