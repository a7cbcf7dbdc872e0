"""What a study is doing, from its folder alone: no Ray, and no need for its driver to be alive."""

from __future__ import annotations

import shlex
from typing import Any

from rich.console import Console

from ebft_study import results
from ebft_study.analysis import usage
from ebft_study.results.lineage import EXPLOIT
from ebft_study.storage import Location, storage_path
from ebft_study.study.folder import history, lock, study_yaml, trial_states
from ebft_study.study.spec import trials
from ebft_study.study.view import display

_EVENTS = ("retry", "failed", "stopped", "refused", "resumed", "interrupted", "features", "cache", EXPLOIT)
_MOST_EVENTS = 12
_MOST_TRIALS = 100


def show(folder: Location, console: Console) -> None:
    """Print the table of trials and the latest remarkable events."""
    spec = study_yaml.read(folder)
    metric = spec.objective.metric
    states = list(history.read(folder, metric).states.values())
    alive = lock.is_held(storage_path(folder))
    for state in states:
        if state.status == "running" and not alive:
            state.status, state.started_at, state.note = "interrupted", None, "its driver is gone"
    columns = tuple(dict.fromkeys(("ce_loss", "cfm_loss", *(one.metric for one in spec.objective.all))))
    title = f"{spec.study}: {' '.join(spec.question.split())}"
    console.print(
        display.render(
            states, columns, title=title, plan=display.Plan(trials.number_of_trials(spec)), most=_MOST_TRIALS
        )
    )
    saved = usage.savings(results.read_table(folder, "trials"), spec.resources.model_dump())
    if saved:
        console.print(f"early stopping saved {saved}", markup=False, highlight=False, soft_wrap=True)
    for name, value in usage.services(results.read_table(folder, "metrics")):
        console.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
    _show_events(folder, console)
    for problem in history.problems(folder):
        console.print(problem, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if not alive and any(state.status in trial_states.OPEN for state in states):
        resume = f"ebft-study resume {shlex.quote(str(folder))}"
        console.print(f"not running; resume with: {resume}", markup=False, highlight=False, soft_wrap=True)


def _show_events(folder: Location, console: Console) -> None:
    events = results.read_table(folder, "events")
    shown = events[events["kind"].isin(_EVENTS)].tail(_MOST_EVENTS)
    rows: list[dict[Any, Any]] = shown.to_dict("records")
    for row in rows:
        who = row["trial_id"] if isinstance(row["trial_id"], str) else "study"
        when = row["time"].to_pydatetime().astimezone()
        line = f"{when:%Y-%m-%d %H:%M:%S} {who} {row['kind']}: {row['message']}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
