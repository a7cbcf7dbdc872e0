"""State of a study, read from its folder alone, without Ray and without its driver."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.live import Live

from ebft_study import results
from ebft_study.analysis import usage
from ebft_study.results.lineage import EXPLOIT
from ebft_study.results.reader import register_metrics
from ebft_study.storage import Location, storage_path
from ebft_study.study.folder import history, lock, study_yaml, trial_states
from ebft_study.study.folder.trial_states import TrialState
from ebft_study.study.spec import trials
from ebft_study.study.spec.study_spec import StudySpec
from ebft_study.study.view.display import Lines, Plan, print_plain, render, rows_on, summary

if TYPE_CHECKING:
    import pandas as pd

_EVENTS = (
    *("retry", "failed", "stopped", "refused", "resumed", "interrupted", "features", "cache", "promoted", EXPLOIT),
    *("memory", "vanishing", "callback"),
)
_ONLY_CHECKED = ("evaluations", "scores", "samples")
_MOST_EVENTS = 12
_MOST_TRIALS = 100
WATCH_SECONDS = 2.0


def show(folder: Location, console: Console) -> None:
    """Print the table of trials and the latest important events."""
    problems = study_yaml.changes(folder)
    seen = _Snapshot.read(folder, problems)
    events = results.read_table(folder, "events", problems)
    for table in _ONLY_CHECKED:
        results.check_table(folder, table, problems)
    console.print(seen.table(_MOST_TRIALS))
    saved = usage.savings(seen.trials, seen.spec.resources.model_dump())
    if saved:
        print_plain(console, f"early stopping saved {saved}")
    for name, value in usage.services(seen.metrics):
        print_plain(console, f"{name}: {value}")
    _show_events(events, console)
    for problem in problems:
        print_plain(console, problem, style="yellow")
    if not seen.is_running and seen.is_open:
        print_plain(console, f"not running; resume with: ebft-study resume {shlex.quote(str(folder))}")


def watch(folder: Location, console: Console) -> None:
    """Show a study until nobody runs it any more: a table that updates on a terminal, elsewhere a line per change."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            for seen in _while_running(folder):
                live.update(seen.table(rows_on(console)), refresh=True)
        show(folder, console)
        return
    before: dict[str, TrialState] = {}
    for seen in _while_running(folder):
        lines = Lines(console, _columns(seen.spec))
        if not before and seen.is_running:
            lines.say(f"{seen.spec.study}: {seen.summary}")
        for state in seen.states if before else ():
            if what := _change(before.get(state.trial_id), state):
                lines.changed(state, what)
        before = {state.trial_id: state for state in seen.states}
    lines.say(f"{seen.spec.study}: {seen.summary}; {'not running' if seen.is_open else 'over'}")


def _while_running(folder: Location) -> Iterator[_Snapshot]:
    """The study now and then, at last when nobody runs it any more."""
    while True:
        began = time.monotonic()
        seen = _Snapshot.read(folder)
        yield seen
        if not seen.is_running:
            return
        # Many small files take long to read, and the driver writes to the same disk.
        time.sleep(max(WATCH_SECONDS, 5 * (time.monotonic() - began)))


def _change(before: TrialState | None, now: TrialState) -> str:
    """What has happened to a trial, in a few words; '' for nothing."""
    if before is not None and (before.status, before.step) == (now.status, now.step):
        return ""
    return f"step {now.step}/{now.total_steps}" if now.status == "running" and now.step else now.status


@dataclass(frozen=True)
class _Snapshot:
    """A study at a moment."""

    spec: StudySpec
    states: list[TrialState]
    is_running: bool
    trials: pd.DataFrame
    metrics: pd.DataFrame

    @classmethod
    def read(cls, folder: Location, problems: list[str] | None = None) -> _Snapshot:
        is_running = lock.is_held(storage_path(folder))  # first: what its driver wrote last is in the tables then
        register_metrics(study_yaml.content(folder), [] if problems is None else problems)
        spec = study_yaml.read(folder)
        columns = (*history.STATE_COLUMNS, *usage.SAVINGS_COLUMNS)
        rows = results.read_table(folder, "trials", problems, columns)
        metrics = results.read_table(folder, "metrics", problems, (*_columns(spec), *usage.SERVICES_COLUMNS))
        states = list(history.states(rows, metrics).values())
        for state in states:
            if state.status == "running" and not is_running:
                state.status, state.started_at, state.note = "interrupted", None, "its driver has ended"
        return cls(spec, states, is_running, rows, metrics)

    @property
    def is_open(self) -> bool:
        return any(state.status in trial_states.OPEN for state in self.states)

    @property
    def plan(self) -> Plan:
        running = sum(state.status == "running" for state in self.states)
        return Plan(trials.number_of_trials(self.spec), concurrency=max(running, 1))

    @property
    def summary(self) -> str:
        return summary(self.states, self.plan)

    def table(self, most: int) -> RenderableType:
        title = f"{self.spec.study}: {' '.join(self.spec.question.split())}"
        return render(self.states, _columns(self.spec), title=title, plan=self.plan, most=most)


def _columns(spec: StudySpec) -> tuple[str, ...]:
    """The metrics that are shown of a trial."""
    return tuple(dict.fromkeys(("ce_loss", "cfm_loss", *(one.metric for one in spec.objective.all))))


def _show_events(events: pd.DataFrame, console: Console) -> None:
    rows: list[dict[Any, Any]] = events[events["kind"].isin(_EVENTS)].tail(_MOST_EVENTS).to_dict("records")
    for row in rows:
        source = row["trial_id"] if isinstance(row["trial_id"], str) else "study"
        when = row["time"].to_pydatetime().astimezone()
        print_plain(console, f"{when:%Y-%m-%d %H:%M:%S} {source} {row['kind']}: {row['message']}")
