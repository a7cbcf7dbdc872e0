"""Progress of a study: one table, live on a terminal and printed by `status`, and plain lines elsewhere.

Imports no Ray: `status` shows a study from its results tables alone.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ebft_study.results import SKIPPED
from ebft_study.study.folder.trial_states import TrialState

_STYLES = {"running": "bold", "finished": "green", "stopped": "yellow", "failed": "red", "pending": "dim"}
_MOST_ROWS, _MOST_NOTES = 40, 8
_FEWEST_ROWS, _OTHER_LINES = 5, 14  # a live table that is higher than the screen loses its last lines


@dataclass(frozen=True)
class Plan:
    """Numbers of all trials, including those that a search has yet to choose, and of concurrent ones."""

    trials: int
    concurrency: int = 1
    trial_seconds: float | None = None
    """Expected duration of a trial, if earlier studies allow a prediction."""


class Lines:
    """Plain lines, for logs and pipes."""

    def __init__(
        self,
        console: Console,
        columns: tuple[str, ...],
        states: Mapping[str, TrialState] | None = None,
        plan: Plan | None = None,
    ) -> None:
        """`states` and `plan` are those of the whole study, without which lines do not say how far it is."""
        self._console, self._columns, self._states, self._plan = console, columns, states or {}, plan

    def changed(self, state: TrialState, what: str) -> None:
        """Show that `what` happened to a trial, in a few words, and what that means for the study."""
        numbers = " ".join(f"{name}={state.metrics[name]:.4g}" for name in self._columns if name in state.metrics)
        line = " ".join(f"{state.trial_id} {state.label}: {what} {numbers}".split())
        self.say("; ".join(filter(None, [line, self._study(state)])))

    def _study(self, state: TrialState) -> str:
        """After the end of a trial, how many there are; after its steps, the time left."""
        states, plan = list(self._states.values()), self._plan
        if plan is None or state.status == "pending":
            return ""
        if state.status != "running":
            return summary(states, plan) if plan.trials > 1 else ""
        left = seconds_left(_needed(states), plan) if state.step else None
        return f"about {rounded_duration(left)} left" if left else ""

    def say(self, line: str) -> None:
        """Show a line about the study as a whole."""
        print_plain(self._console, f"{time.strftime('%H:%M:%S')} {line}")

    def close(self) -> None:
        """Lines need no closing."""


class LiveTable(Lines):
    """One table that updates in place; lines scroll by above it."""

    def __init__(
        self, console: Console, columns: tuple[str, ...], states: dict[str, TrialState], title: str, plan: Plan
    ) -> None:
        super().__init__(console, columns, states, plan)
        page = functools.partial(self._page, title, plan)
        self._live = Live(console=console, get_renderable=page, refresh_per_second=2, transient=False)
        self._live.start()

    def changed(self, state: TrialState, what: str) -> None:
        """The table refreshes by itself."""

    def say(self, line: str) -> None:
        self._live.console.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False, highlight=False)

    def close(self) -> None:
        self._live.stop()

    def _page(self, title: str, plan: Plan) -> RenderableType:
        return render(self._states.values(), self._columns, title=title, plan=plan, most=rows_on(self._console))


def display(
    console: Console, columns: tuple[str, ...], states: dict[str, TrialState], *, title: str, plan: Plan
) -> Lines:
    """A live table on a terminal, plain lines elsewhere."""
    if console.is_terminal:
        return LiveTable(console, columns, states, title, plan)
    return Lines(console, columns, states, plan)


def rows_on(console: Console) -> int:
    """The most trials that a live table may show on a terminal."""
    return max(_FEWEST_ROWS, min(_MOST_ROWS, console.height - _OTHER_LINES))


def print_plain(console: Console, line: str, style: str | None = None) -> None:
    """Print a line as it is: brackets are no markup, and long lines are not broken."""
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def render(
    states: Iterable[TrialState], columns: tuple[str, ...], *, title: str, plan: Plan, most: int = _MOST_ROWS
) -> RenderableType:
    """The table of trials, the problems, and a line with the number of trials and the remaining time."""
    everything = list(states)
    states = _needed(everything)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in ("trial", "settings", "state", "step", *columns, "time"):
        left, wraps = header in ("trial", "settings", "state"), header == "settings"
        table.add_column(header, justify="left" if left else "right", no_wrap=not wraps)
    for state in _shown(states, most):
        table.add_row(*_cells(state, columns), style=_STYLES.get(state.status, ""))
    noted = [s for s in states if s.note and s.status in ("failed", "stopped")]
    notes = [Text(f"{s.trial_id} {s.status}: {s.note}", style=_STYLES[s.status]) for s in noted[-_MOST_NOTES:]]
    hidden = [Text(f"and {len(states) - most} more trials", style="dim")] if len(states) > most else []
    return Group(table, *hidden, *notes, Text(summary(everything, plan), style="bold"))


def _needed(states: Iterable[TrialState]) -> list[TrialState]:
    """All but those that were skipped, of which the event of the promotion tells."""
    return [state for state in states if state.status != SKIPPED]


def _shown(states: list[TrialState], most: int) -> list[TrialState]:
    """All trials if they fit; else those that run, then the latest to end, then the next to start."""
    if len(states) <= most:
        return states
    rank = {"running": 0, "failed": 1, "stopped": 1, "finished": 2, "interrupted": 2, "pending": 3}
    chosen = sorted(states, key=lambda s: (rank[s.status], -(s.ended_at or 0.0), s.trial_id))[:most]
    return sorted(chosen, key=lambda s: s.trial_id)


def _cells(state: TrialState, columns: tuple[str, ...]) -> list[str]:
    step = f"{state.step}/{state.total_steps}" if state.total_steps else str(state.step)
    numbers = [f"{state.metrics[name]:.4g}" if name in state.metrics else "" for name in columns]
    status = state.status if state.attempt <= 1 else f"{state.status} (start {state.attempt})"
    return [state.trial_id, state.label, status, step, *numbers, rounded_duration(state.seconds)]


def summary(states: list[TrialState], plan: Plan) -> str:
    """`7 of 12 trials finished, 2 running, 3 pending, 6 not needed; about 4 min left`."""
    needed = _needed(states)
    names = dict.fromkeys(state.status for state in needed)
    counts = {name: sum(state.status == name for state in needed) for name in names}
    parts = [f"{counts.pop('finished', 0)} of {max(len(needed), plan.trials)} trials finished"]
    parts += [f"{count} {status}" for status, count in counts.items()]
    parts += [f"{len(states) - len(needed)} not needed"] * (len(needed) < len(states))
    left = seconds_left(needed, plan)
    return ", ".join(parts) + (f"; about {rounded_duration(left)} left" if left else "")


def seconds_left(states: list[TrialState], plan: Plan) -> float | None:
    """Expected time until the last trial ends, None without a prediction.

    By the durations of trials that have ended, else by the throughput of those that run, else as planned.
    """
    ended = [s.seconds for s in states if s.status in ("finished", "stopped") and s.seconds]
    running = [s for s in states if s.status == "running"]
    to_come = sum(s.status == "pending" for s in states) + max(plan.trials - len(states), 0)
    durations = ended or [expected for s in running if (expected := _expected_seconds(s)) is not None]
    mean = sum(durations) / len(durations) if durations else plan.trial_seconds
    if mean is None or not len(running) + to_come:
        return None
    rest = mean * to_come + sum(max((_expected_seconds(s) or mean) - (s.seconds or 0.0), 0.0) for s in running)
    return rest / min(plan.concurrency, len(running) + to_come)


def _expected_seconds(state: TrialState) -> float | None:
    """Duration of a running trial if its steps continue to take as long as so far."""
    if not state.step or not state.total_steps or not state.seconds:
        return None
    return state.seconds * state.total_steps / state.step


def rounded_duration(seconds: float | None) -> str:
    """One number for a cell that changes: 41 s, 4 min, 2.5 h. `text.duration` is exact to the second."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
