"""State of a study, read from its folder alone, without Ray and without its driver."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ebft_study import results
from ebft_study.analysis import usage
from ebft_study.results.lineage import EXPLOIT
from ebft_study.results.reader import register_metrics
from ebft_study.storage import Location, storage_path
from ebft_study.study.folder import history, lock, study_yaml, trial_states
from ebft_study.study.spec import trials
from ebft_study.study.view.display import Plan, print_plain, render

if TYPE_CHECKING:
    import pandas as pd

_EVENTS = (
    *("retry", "failed", "stopped", "refused", "resumed", "interrupted", "features", "cache", "promoted", EXPLOIT),
    *("memory", "vanishing", "callback"),
)
_ONLY_CHECKED = ("evaluations", "scores", "samples")
_MOST_EVENTS = 12
_MOST_TRIALS = 100


def show(folder: Location, console: Console) -> None:
    """Print the table of trials and the latest important events."""
    spec = study_yaml.read(folder)
    columns = tuple(dict.fromkeys(("ce_loss", "cfm_loss", *(objective.metric for objective in spec.objective.all))))
    problems = study_yaml.changes(folder)
    register_metrics(study_yaml.content(folder), problems)
    rows = results.read_table(folder, "trials", problems, (*history.STATE_COLUMNS, *usage.SAVINGS_COLUMNS))
    metrics = results.read_table(folder, "metrics", problems, (*columns, *usage.SERVICES_COLUMNS))
    events = results.read_table(folder, "events", problems)
    for table in _ONLY_CHECKED:
        results.check_table(folder, table, problems)
    states = list(history.states(rows, metrics).values())
    alive = lock.is_held(storage_path(folder))
    for state in states:
        if state.status == "running" and not alive:
            state.status, state.started_at, state.note = "interrupted", None, "its driver has ended"
    title, plan = f"{spec.study}: {' '.join(spec.question.split())}", Plan(trials.number_of_trials(spec))
    console.print(render(states, columns, title=title, plan=plan, most=_MOST_TRIALS))
    saved = usage.savings(rows, spec.resources.model_dump())
    if saved:
        print_plain(console, f"early stopping saved {saved}")
    for name, value in usage.services(metrics):
        print_plain(console, f"{name}: {value}")
    _show_events(events, console)
    for problem in problems:
        print_plain(console, problem, style="yellow")
    if not alive and any(state.status in trial_states.OPEN for state in states):
        print_plain(console, f"not running; resume with: ebft-study resume {shlex.quote(str(folder))}")


def _show_events(events: pd.DataFrame, console: Console) -> None:
    rows: list[dict[Any, Any]] = events[events["kind"].isin(_EVENTS)].tail(_MOST_EVENTS).to_dict("records")
    for row in rows:
        source = row["trial_id"] if isinstance(row["trial_id"], str) else "study"
        when = row["time"].to_pydatetime().astimezone()
        print_plain(console, f"{when:%Y-%m-%d %H:%M:%S} {source} {row['kind']}: {row['message']}")
