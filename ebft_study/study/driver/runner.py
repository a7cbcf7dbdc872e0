"""Starting, resuming and extending a study: the same session, and they differ only in how they get the study.

Tune's own state is never restored: it would unpickle files, and a truncated snapshot of it starts a trial without
settings. A study resumes from study.yaml, its results tables, its checkpoints and, if it has one, its Optuna journal.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ebft_study import report, text
from ebft_study.config import RunConfig
from ebft_study.errors import ConfigError, EbftError, ResultsError, StorageError, rule_broken
from ebft_study.results import Fence, StudyRecorder, copies, study_recorder
from ebft_study.storage import Location, StoragePath, absolute, remove_leftovers, storage_path
from ebft_study.study.cluster import existing
from ebft_study.study.driver.session import run_session
from ebft_study.study.folder import attempts, history, lock, stop_request, study_yaml
from ebft_study.study.folder.history import BUDGET_USED, History
from ebft_study.study.folder.study_yaml import StudySource
from ebft_study.study.folder.trial_states import TrialState
from ebft_study.study.forecast.disk import study_disk
from ebft_study.study.resolving import checks, extending, plugin_use
from ebft_study.study.resolving.resolved import ResolvedStudy
from ebft_study.study.resolving.study_file import resolve, section_of, with_sections
from ebft_study.study.search import earlier, journal
from ebft_study.study.spec.study_spec import StudySpec
from ebft_study.training import Workers

INTERRUPTED = 130


@dataclass(frozen=True)
class StudyResult:
    """Result of one session of a study. `reason` is empty when every trial is over."""

    folder: StoragePath
    states: dict[str, TrialState]
    reason: str = ""
    report: Path | StoragePath | None = None

    @property
    def address(self) -> str:
        """Name or folder by which the command line finds the study again: the name if that is enough."""
        default = Path("studies").resolve() / self.folder.name
        return shlex.quote(self.folder.name if self.folder.local == default else str(self.folder))

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C or SIGTERM, 1 when the session ended early for another reason or a trial failed, else 0."""
        if self.reason.startswith("Ctrl-C"):
            return INTERRUPTED
        return int(bool(self.reason) or any(state.status == "failed" for state in self.states.values()))

    @property
    def how_to_resume(self) -> str:
        """Why the session ended early, and the command that continues the study; '' when every trial is over."""
        if not self.reason:
            return ""
        if self.reason == BUDGET_USED:
            return f"{self.reason}; raise it: ebft-study resume {self.address} budget.max_hours=HOURS"
        return f"{self.reason}; resume with: ebft-study resume {self.address}"


def run(
    study: ResolvedStudy,
    *,
    storage: Location,
    console: Console,
    resume_existing: bool = False,
    accept_changes: bool = False,
    address: str | None = None,
) -> StudyResult:
    """Run a study from its beginning; with `resume_existing`, continue it where an earlier session stopped.

    Args:
        accept_changes: continue with data or models that differ from those that the study began with.
        address: of an existing Ray cluster to use, instead of one of the study's own on this machine.
    """
    folder = _folder(study, storage)
    if not copies.either_exists(folder / study_yaml.NAME):
        return _run(folder, _warm_started(study, storage, console), console, address, is_new=True)
    spec = study_yaml.read(folder)
    different = extending.differences(spec, study.spec)
    if different:
        shown = "; ".join(different[:3]) + (f"; and {len(different) - 3} more" if len(different) > 3 else "")
        raise ResultsError(f"{folder}: holds a study of this name with other settings ({shown}). Choose another --name")
    if resume_existing:
        study = _recorded(folder, spec.with_session_of(study.spec), study.plugin_folder)
        return _run(folder, study, console, address, accept_changes=accept_changes)
    study = _recorded(folder, spec)
    past = _history(folder, study)
    name = StudyResult(folder, past.states).address
    if _is_over(folder, study, past):
        raise ResultsError(f"{folder}: this study is finished. See 'ebft-study status {name}', or use another --name")
    raise ResultsError(f"{folder}: this study was started before. Continue it with 'ebft-study resume {name}'")


def _warm_started(study: ResolvedStudy, storage: Location, console: Console) -> ResolvedStudy:
    """The study with what its search is told of earlier ones."""
    spec = earlier.warm_started(study.spec, storage)
    for each in spec.warm_start:
        line = f"warm start: {earlier.described(each)}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return replace(study, spec=spec)


def resume(
    location: Location,
    overrides: Sequence[str] = (),
    *,
    console: Console,
    retry_failed: bool = False,
    accept_changes: bool = False,
    address: str | None = None,
) -> StudyResult:
    """Continue a study from its folder alone; `overrides` may change its budget and `resources.max_failures`."""
    folder = absolute(storage_path(location))
    for override in overrides:
        if section_of(override) != "budget" and override.partition("=")[0].strip() != "resources.max_failures":
            raise ConfigError(
                f"command line: {override!r}: a study keeps its settings when it is resumed, except for its budget and "
                "resources.max_failures. Write budget.max_hours=HOURS, or start another study"
            )
    spec = with_sections(study_yaml.read(folder), overrides)
    study = _recorded(folder, spec)
    return _run(folder, study, console, address, retry_failed=retry_failed, accept_changes=accept_changes)


def extend(
    study: ResolvedStudy,
    *,
    storage: Location,
    console: Console,
    accept_changes: bool = False,
    address: str | None = None,
) -> StudyResult:
    """Extend an existing study by the trials or steps that its file has gained, and run them."""
    folder = _folder(study, storage)
    spec = extending.extended(study_yaml.read(folder), study)
    extended = resolve(spec, study.source, study.capacity, plugin_folder=study.plugin_folder)
    return _run(folder, extended, console, address, is_new=True, accept_changes=accept_changes)


def _folder(study: ResolvedStudy, storage: Location) -> StoragePath:
    folder = absolute(storage_path(storage)) / study.name
    if study.spec.scheduler.kind == "pbt" and folder.local is None:
        raise rule_broken(
            source="command line",
            key="--storage",
            given=folder,
            rule="scheduler.kind=pbt links checkpoints of one trial into the folder of another, which a store cannot",
            remedy="Use a folder that all machines see, or another scheduler",
        )
    return folder


def _recorded(folder: StoragePath, spec: StudySpec, plugin_folder: str | None = None) -> ResolvedStudy:
    """The study in a folder; its plug-ins are where it found them, or beside the file that is given again."""
    source = StudySource(str(folder / study_yaml.NAME))
    return resolve(spec, source, plugin_folder=plugin_folder or study_yaml.used_plugins(folder)[0])


def _run(
    folder: StoragePath,
    study: ResolvedStudy,
    console: Console,
    address: str | None,
    *,
    is_new: bool = False,
    retry_failed: bool = False,
    accept_changes: bool = False,
) -> StudyResult:
    """One session of a study. `is_new`: study.yaml does not contain this spec yet."""
    plugin_use.load(study.spec, study.runs, source=study.source.name, folder=study.plugin_folder)
    journal.check_sampler(study.spec)
    with _cluster_and_lock(folder, study, address, console.print) as (study, lock_handle):
        past = _history(folder, study)
        if retry_failed:
            failed = {trial_id for trial_id, state in past.states.items() if state.status == "failed"}
            past = replace(past, trial_results={i: r for i, r in past.trial_results.items() if i not in failed})
        if not is_new:
            for problem in [*history.problems(folder), *attempts.damaged(folder)]:
                console.print(f"note: {problem}", markup=False, highlight=False, soft_wrap=True)
            copies.repair(folder / study_yaml.NAME)
            study_recorder.repair(folder)
            if _is_over(folder, study, past):
                written = folder / "report.html"
                return StudyResult(
                    folder, past.states, report=written if written.exists() else _report(folder, console)
                )
            for change in study_yaml.changed_versions(folder):
                console.print(f"note: the study was started with {change}", markup=False, highlight=False)
        _check_budget(study, past)
        for problem in study_disk(study).shortages(folder, are_here=not study.capacity.is_existing):
            console.print(f"note: {problem}", markup=False, highlight=False, soft_wrap=True)
        if not is_new and (recorded := study_yaml.read(folder)) != recorded.with_session_of(study.spec):
            study_yaml.change_session(folder, study.spec)
        provenance = _prepare(study, console)
        lock_handle.fence.check()
        if copies.either_exists(folder / study_yaml.NAME):
            _check_inputs(folder, study, provenance, lock_handle.fence, accept_changes=accept_changes)
        if is_new:
            earlier.check_files(study.spec, provenance)
            study_yaml.write(folder, study.spec, study.source, provenance=provenance)
        reason = run_session(folder, study, past, console, lock_handle)
        try:
            lock_handle.fence.check()
        except StorageError:
            return StudyResult(folder, past.states, reason)
        return StudyResult(folder, past.states, reason, _report(folder, console))


@contextlib.contextmanager
def _cluster_and_lock(
    folder: StoragePath, study: ResolvedStudy, address: str | None, tell: Callable[[str], None]
) -> Iterator[tuple[ResolvedStudy, lock.LockHandle]]:
    """The study on the machines where it runs, each of its trials found to fit there, and its lock."""
    with existing.connection(address, study=study.name) as capacity:
        study = study if capacity is None else study.on(capacity)
        checks.check_capacity(study)
        if capacity is None and any(run.uses_engine for run in study.runs):
            from ebft_study.study.resolving.service_plan import check_shared_memory

            resources = study.spec.resources
            check_shared_memory(study.runs, study.service_plan, resources, concurrency=study.concurrency)
        with lock.hold(folder, record=study_yaml.NAME) as lock_handle, stop_request.heeded(folder, tell):
            if capacity is not None:
                existing.check(folder.local, needs_dashboard=study.spec.resources.has_workers)
            if folder.local:
                remove_leftovers(folder.local)
            yield study, lock_handle


def _history(folder: StoragePath, study: ResolvedStudy) -> History:
    """The results of earlier sessions; trials that were given more steps since are open again."""
    objective = study.spec.objective
    return extending.reopened(study, history.read(folder, objective.metric, objective.further_metrics))


def _is_over(folder: StoragePath, study: ResolvedStudy, past: History) -> bool:
    known = {*(trial.trial_id for trial in study.trials), *past.states}
    if known - set(past.trial_results):
        return False
    return study.spec.search.algorithm != "optuna" or journal.is_over(study.spec, folder)


def _check_budget(study: ResolvedStudy, past: History) -> None:
    """Refuse to continue a study whose earlier sessions took all of its hours."""
    hours = study.spec.budget.max_hours
    if hours is not None and past.session_seconds >= hours * 3600:
        raise rule_broken(
            source=study.name,
            key="budget.max_hours",
            given=hours,
            rule=f"the sessions of this study took {text.duration(past.session_seconds)} so far, and "
            f"{sum(r.kind != 'skipped' for r in past.trial_results.values())} of its {study.n_trials} trials are over",
            remedy="Raise it: add budget.max_hours=HOURS to the command",
        )


def _prepare(study: ResolvedStudy, console: Console) -> dict[str, Any]:
    """Load or build data and models once, before any process is started for a trial."""
    from ebft_study.training.prepare import prepare

    def workers(run: RunConfig) -> Workers:
        resources, is_here = study.spec.resources.for_run(run), not study.capacity.is_existing
        return Workers(resources.device_of(run), resources.processes, resources.gpu_fraction, is_here)

    console.print("preparing data and models")
    provenance = prepare(study.runs, workers=workers)
    used = plugin_use.record(study.spec, study.runs)
    return {**provenance, **({"plugins": used} if used else {})}


def _check_inputs(
    folder: StoragePath, study: ResolvedStudy, provenance: dict[str, Any], fence: Fence, *, accept_changes: bool
) -> None:
    """Refuse to continue a study with other data or models than it began with, unless that is wanted."""
    changed = study_yaml.changed_inputs(folder, provenance)
    if not changed:
        return
    if not accept_changes:
        raise ResultsError(
            f"{folder}: {'; '.join(changed)}: the study began with others, and results of both do not compare. Put "
            "them back, or start another study (or add --accept-changes, which records the change)"
        )
    message = f"from here on with other inputs: {'; '.join(changed)}"
    StudyRecorder(folder, study=study.name, fence=fence).event("changed", message)
    study_yaml.accept_inputs(folder, provenance)


def _report(folder: StoragePath, console: Console) -> Path | StoragePath | None:
    """The report; one that cannot be written (no trial has results yet) does not spoil the study."""
    try:
        return report.write_report(folder)
    except EbftError as error:
        console.print(f"no report: {error}", markup=False, highlight=False)
        return None
