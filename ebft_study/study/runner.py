"""The driver of a study: prepares, starts Ray, lets Tune run the trials, and leaves everything on record.

Tune's own state is never restored: it would unpickle files, and a truncated snapshot of it starts a trial without
settings. A study resumes from study.yaml, its results tables, its checkpoints and, if it has one, its Optuna journal.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ebft_study import report
from ebft_study.config import RunConfig
from ebft_study.errors import EbftError, ResultsError
from ebft_study.places import Location, Place, absolute, place
from ebft_study.results import copies
from ebft_study.study import checks, history, journal, lock, record, trials
from ebft_study.study.cluster import CLUSTER_DIED
from ebft_study.study.history import History
from ebft_study.study.progress import TrialState
from ebft_study.study.session import STORAGE_FAILED
from ebft_study.study.spec import StudySpec

INTERRUPTED = 130


@dataclass(frozen=True)
class Ended:
    """How a session of a study ended. `reason` is empty when every trial is over."""

    folder: Place
    states: dict[str, TrialState]
    reason: str = ""
    report: Path | Place | None = None

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
        if self.reason.startswith((CLUSTER_DIED, STORAGE_FAILED)):
            return 1
        return int(any(state.status == "failed" for state in self.states.values()))


def run(
    spec: StudySpec, *, file: Path, profile: str | None, storage: Location, console: Console, go_on: bool = False
) -> Ended:
    """Run a study from its beginning; with `go_on`, continue it where an earlier session left it."""
    folder = absolute(place(storage)) / spec.study
    if copies.either_exists(folder / record.NAME):
        return _existing(folder, spec, console, go_on)
    configurations = checks.check(spec, str(file))
    checks.check_machine(spec, configurations)
    with lock.hold(folder, record=record.NAME) as held:
        console.print("preparing data and models")
        provenance = _prepare(configurations)
        record.write(folder, spec, profile=profile, file=file, provenance=provenance)
        return _session(folder, spec, configurations, History({}, {}, {}), console, held)


def resume(location: Location, *, console: Console, retry_failed: bool = False) -> Ended:
    """Continue a study from its folder alone."""
    folder = absolute(place(location))
    spec = record.read(folder)
    configurations = checks.check(spec, str(folder / record.NAME))
    checks.check_machine(spec, configurations)
    with lock.hold(folder, record=record.NAME) as held:
        for problem in history.problems(folder):
            console.print(f"note: {problem}", markup=False, highlight=False, soft_wrap=True)
        past = history.read(folder, spec.objective.metric)
        if retry_failed:
            failed = [trial_id for trial_id, state in past.states.items() if state.status == "failed"]
            endings = {i: e for i, e in past.endings.items() if i not in failed}
            past = replace(past, endings=endings)
        if _is_over(folder, spec, past):
            existing = folder / "report.html"
            return Ended(folder, past.states, report=existing if existing.exists() else _write_report(folder, console))
        for change in record.changed_versions(folder):
            console.print(f"note: the study was started with {change}", markup=False, highlight=False)
        console.print("preparing data and models")
        _prepare(configurations)
        return _session(folder, spec, configurations, past, console, held)


def _existing(folder: Place, spec: StudySpec, console: Console, go_on: bool) -> Ended:
    different = record.differences(record.read(folder), spec)
    if different:
        shown = "; ".join(different[:3]) + (f"; and {len(different) - 3} more" if len(different) > 3 else "")
        raise ResultsError(f"{folder}: holds a study of this name with other settings ({shown}). Choose another --name")
    if go_on:
        return resume(folder, console=console)
    past = history.read(folder, spec.objective.metric)
    address = Ended(folder, past.states).address
    if _is_over(folder, spec, past):
        raise ResultsError(
            f"{folder}: this study is finished. See 'ebft-study status {address}', or use another --name"
        )
    raise ResultsError(f"{folder}: this study was started before. Continue it with 'ebft-study resume {address}'")


def _is_over(folder: Place, spec: StudySpec, past: History) -> bool:
    known = trials.trials_of(spec, trials.enumerated(spec))
    if any(trial.trial_id not in past.endings for trial in known):
        return False
    return spec.search.algorithm != "optuna" or journal.is_over(spec, folder)


def _prepare(configurations: Sequence[RunConfig]) -> dict[str, Any]:
    """Data and models, loaded or built once, before any process is started for a trial."""
    from ebft_study.training.prepare import prepare

    return dict(prepare(configurations))


def _session(
    folder: Place, spec: StudySpec, runs: Sequence[RunConfig], past: History, console: Console, held: lock.Held
) -> Ended:
    from ebft_study.study.session import run_session

    reason = run_session(folder, spec, runs, past, console, held)
    return Ended(folder, past.states, reason, _write_report(folder, console))


def _write_report(folder: Place, console: Console) -> Path | Place | None:
    """The report; one that cannot be written (no trial has results yet) does not spoil the study."""
    try:
        return report.write_report(folder)
    except EbftError as error:
        console.print(f"no report: {error}", markup=False, highlight=False)
        return None
