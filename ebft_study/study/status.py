"""What a study is doing, from its folder alone: no Ray, and no need for its driver to be alive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import filelock
from rich.console import Console

from ebft_study import results
from ebft_study.report import savings, services
from ebft_study.results.lineage import EXPLOIT
from ebft_study.study import history, progress, record, trials

_EVENTS = ("retry", "failed", "stopped", "refused", "resumed", "interrupted", "features", "cache", EXPLOIT)
_MOST_EVENTS = 12
_MOST_TRIALS = 100


def show(folder: Path, console: Console) -> None:
    """Print the table of trials and the latest remarkable events."""
    spec = record.read(folder)
    metric = spec.objective.metric
    states = list(history.read(folder, metric).states.values())
    alive = _is_running(folder)
    for state in states:
        if state.status == "running" and not alive:
            state.status, state.started_at, state.note = "interrupted", None, "its driver is gone"
    columns = tuple(dict.fromkeys(("ce_loss", "cfm_loss", *(one.metric for one in spec.objective.all))))
    title = f"{spec.study}: {' '.join(spec.question.split())}"
    console.print(
        progress.render(
            states, columns, title=title, plan=progress.Plan(trials.number_of_trials(spec)), most=_MOST_TRIALS
        )
    )
    saved = savings.saved(results.read_table(folder, "trials"), spec.resources.model_dump())
    if saved:
        console.print(f"early stopping saved {saved}", markup=False, highlight=False, soft_wrap=True)
    for name, value in services.used(results.read_table(folder, "metrics")):
        console.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
    _show_events(folder, console)
    if not alive and any(state.status in progress.OPEN for state in states):
        console.print(f"not running; resume with: ebft-study resume {folder}", markup=False, highlight=False)


def _is_running(folder: Path) -> bool:
    """Whether a driver holds the study's lock."""
    path = folder / ".lock"
    if not path.exists():
        return False
    try:
        with filelock.FileLock(path, timeout=0):
            return False
    except filelock.Timeout:
        return True


def _show_events(folder: Path, console: Console) -> None:
    events = results.read_table(folder, "events")
    shown = events[events["kind"].isin(_EVENTS)].tail(_MOST_EVENTS)
    rows: list[dict[Any, Any]] = shown.to_dict("records")
    for row in rows:
        who = row["trial_id"] if isinstance(row["trial_id"], str) else "study"
        when = row["time"].to_pydatetime().astimezone()
        line = f"{when:%Y-%m-%d %H:%M:%S} {who} {row['kind']}: {row['message']}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
