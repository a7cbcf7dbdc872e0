"""The driver of a study: prepares, starts Ray, lets Tune run the trials, and leaves everything on record.

Tune's own state is never restored: it would unpickle files, and a truncated snapshot of it starts a trial without
settings. A study resumes from study.yaml, its results tables, its checkpoints and, if it has one, its Optuna journal.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ebft_study import report
from ebft_study.config import RunConfig
from ebft_study.errors import EbftError, ResultsError, rule_broken
from ebft_study.results import copies
from ebft_study.storage import Location, StoragePath, absolute, storage_path
from ebft_study.study.cluster import existing, requests
from ebft_study.study.cluster.capacity import ClusterCapacity
from ebft_study.study.cluster.own import CLUSTER_DIED
from ebft_study.study.cluster.watchdog import CLUSTER_GONE
from ebft_study.study.driver.session import STORAGE_FAILED
from ebft_study.study.folder import history, lock, study_yaml
from ebft_study.study.folder.history import History
from ebft_study.study.folder.trial_states import TrialState
from ebft_study.study.resolving import checks, extending
from ebft_study.study.search import journal
from ebft_study.study.spec import trials
from ebft_study.study.spec.study_spec import StudySpec

INTERRUPTED = 130


@dataclass(frozen=True)
class StudyResult:
    """How a session of a study ended. `reason` is empty when every trial is over."""

    folder: StoragePath
    states: dict[str, TrialState]
    reason: str = ""
    report: Path | StoragePath | None = None

    @property
    def address(self) -> str:
        """How the command line finds the study again: its name if that is enough, else its folder."""
        usual = Path("studies").resolve() / self.folder.name
        return shlex.quote(self.folder.name if self.folder.local == usual else str(self.folder))

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 1 when a trial failed or the cluster did, else 0."""
        if self.reason.startswith("Ctrl-C"):
            return INTERRUPTED
        if self.reason.startswith((CLUSTER_DIED, CLUSTER_GONE, STORAGE_FAILED)):
            return 1
        return int(any(state.status == "failed" for state in self.states.values()))


def run(
    spec: StudySpec,
    *,
    file: Path,
    profile: str | None,
    storage: Location,
    console: Console,
    resume_existing: bool = False,
    address: str | None = None,
) -> StudyResult:
    """Run a study from its beginning; with `go_on`, continue it where an earlier session left it.

    Args:
        address: of a Ray cluster to join, instead of one of its own on this machine.
    """
    folder = absolute(storage_path(storage)) / spec.study
    _check_place(folder, spec)
    if copies.either_exists(folder / study_yaml.NAME):
        return _existing(folder, spec, console, resume_existing, address)
    configurations = checks.check(spec, str(file))
    with _occupied(folder, spec, configurations, address) as (capacity, held):
        provenance = _prepare(configurations, console)
        study_yaml.write(folder, spec, profile=profile, file=file, provenance=provenance)
        return _session(folder, spec, configurations, History({}, {}, {}), console, capacity, held)


def resume(
    location: Location, *, console: Console, retry_failed: bool = False, address: str | None = None
) -> StudyResult:
    """Continue a study from its folder alone."""
    folder = absolute(storage_path(location))
    spec = study_yaml.read(folder)
    configurations = checks.check(spec, str(folder / study_yaml.NAME))
    with _occupied(folder, spec, configurations, address) as (capacity, held):
        for problem in history.problems(folder):
            console.print(f"note: {problem}", markup=False, highlight=False, soft_wrap=True)
        past = _past(folder, spec)
        if retry_failed:
            failed = [trial_id for trial_id, state in past.states.items() if state.status == "failed"]
            trial_results = {i: e for i, e in past.trial_results.items() if i not in failed}
            past = replace(past, trial_results=trial_results)
        if _is_over(folder, spec, past):
            existing = folder / "report.html"
            return StudyResult(
                folder, past.states, report=existing if existing.exists() else _write_report(folder, console)
            )
        for change in study_yaml.changed_versions(folder):
            console.print(f"note: the study was started with {change}", markup=False, highlight=False)
        _prepare(configurations, console)
        return _session(folder, spec, configurations, past, console, capacity, held)


def extend(
    spec: StudySpec,
    *,
    file: Path,
    profile: str | None,
    storage: Location,
    console: Console,
    address: str | None = None,
) -> StudyResult:
    """Give an existing study the further trials or steps that its file now asks for, and run them."""
    folder = absolute(storage_path(storage)) / spec.study
    configurations = checks.check(spec, str(file))
    spec = extending.extended(study_yaml.read(folder), spec, configurations, str(file))
    with _occupied(folder, spec, configurations, address) as (capacity, held):
        provenance = _prepare(configurations, console)
        study_yaml.write(folder, spec, profile=profile, file=file, provenance=provenance)
        return _session(folder, spec, configurations, _past(folder, spec), console, capacity, held)


def _check_place(folder: StoragePath, spec: StudySpec) -> None:
    """What only a disk can do."""
    if spec.scheduler.kind == "pbt" and folder.local is None:
        raise rule_broken(
            source="command line",
            key="--storage",
            given=folder,
            rule="scheduler.kind=pbt links checkpoints of one trial into the folder of another, which a store cannot",
            remedy="Use a folder that all machines see, or another scheduler",
        )


@contextlib.contextmanager
def _occupied(
    folder: StoragePath, spec: StudySpec, runs: Sequence[RunConfig], address: str | None
) -> Iterator[tuple[ClusterCapacity, lock.LockHandle]]:
    """The machines of a study, found fit for each of its trials, and its lock."""
    with existing.reached(address, study=spec.study, gpus=requests.wants_gpus(spec.resources)) as capacity:
        checks.check_machine(spec, runs, capacity)
        with lock.hold(folder, record=study_yaml.NAME) as held:
            _check_cluster(folder, spec, runs, capacity)
            yield capacity, held


def _check_cluster(folder: StoragePath, spec: StudySpec, runs: Sequence[RunConfig], capacity: ClusterCapacity) -> None:
    """What only a cluster that others started may lack."""
    if capacity.is_existing:
        from ebft_study.study.cluster import existing

        checks.check_population(spec, runs, capacity)
        existing.check(folder.local)
        if spec.resources.has_workers:
            existing.check_dashboard()


def _existing(
    folder: StoragePath, spec: StudySpec, console: Console, resume_existing: bool, address: str | None
) -> StudyResult:
    recorded = study_yaml.read(folder)
    different = extending.differences(recorded, spec)
    if different:
        shown = "; ".join(different[:3]) + (f"; and {len(different) - 3} more" if len(different) > 3 else "")
        raise ResultsError(f"{folder}: holds a study of this name with other settings ({shown}). Choose another --name")
    if resume_existing:
        return resume(folder, console=console, address=address)
    past = _past(folder, recorded)
    known_as = StudyResult(folder, past.states).address
    if _is_over(folder, recorded, past):
        raise ResultsError(
            f"{folder}: this study is finished. See 'ebft-study status {known_as}', or use another --name"
        )
    raise ResultsError(f"{folder}: this study was started before. Continue it with 'ebft-study resume {known_as}'")


def _past(folder: StoragePath, spec: StudySpec) -> History:
    """What earlier sessions left on record; trials that were given more steps since are open again."""
    return extending.reopened(spec, history.read(folder, spec.objective.metric, spec.objective.further_metrics))


def _is_over(folder: StoragePath, spec: StudySpec, past: History) -> bool:
    known = trials.listed(spec)
    if any(trial.trial_id not in past.trial_results for trial in known):
        return False
    return spec.search.algorithm != "optuna" or journal.is_over(spec, folder)


def _prepare(configurations: Sequence[RunConfig], console: Console) -> dict[str, Any]:
    """Data and models, loaded or built once, before any process is started for a trial."""
    from ebft_study.training.prepare import prepare

    console.print("preparing data and models")
    return dict(prepare(configurations))


def _session(
    folder: StoragePath,
    spec: StudySpec,
    runs: Sequence[RunConfig],
    past: History,
    console: Console,
    capacity: ClusterCapacity,
    held: lock.LockHandle,
) -> StudyResult:
    from ebft_study.study.driver.session import run_session

    reason = run_session(folder, spec, runs, past, console, capacity, held)
    return StudyResult(folder, past.states, reason, _write_report(folder, console))


def _write_report(folder: StoragePath, console: Console) -> Path | StoragePath | None:
    """The report; one that cannot be written (no trial has results yet) does not spoil the study."""
    try:
        return report.write_report(folder)
    except EbftError as error:
        console.print(f"no report: {error}", markup=False, highlight=False)
        return None
