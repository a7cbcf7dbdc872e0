"""Ray Tune's side of a study: thin adapters from its hooks to `search`, `monitor`, and the driver's wish to stop.

Tune pickles all of them into snapshots that nothing here ever reads, so they pickle to nothing.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.search import Searcher

from ebft_study.storage import filesystems
from ebft_study.study.cluster.own import CLUSTER_DIED
from ebft_study.study.driver.monitor import Monitor
from ebft_study.study.folder.trial_states import EARLY_STOP
from ebft_study.study.search.listed import Search
from ebft_study.study.spec.trials import Trial
from ebft_study.study.stopping.rules import RuleMonitor

Settings = dict[str, Any]
_ALIVE_SECONDS = 3.0


class StudySearcher(Searcher):  # type: ignore[misc]
    """Hands the trials of a `Search` to Tune."""

    def __init__(
        self, search: Search, monitor: Monitor, settings: Callable[[Trial], Settings], *, take_turns: bool = False
    ) -> None:
        """`take_turns`: Tune is given more trials than there are places for, and starts them when it likes."""
        super().__init__()
        self._search, self._monitor, self._settings, self._take_turns = search, monitor, settings, take_turns

    def suggest(self, trial_id: str) -> Settings | str | None:
        trial = self._search.next()
        if trial is None:
            return str(Searcher.FINISHED) if self._search.exhausted else None
        self._monitor.planned(trial)
        if not self._take_turns:
            self._monitor.started(trial.trial_id)
        return self._settings(trial)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """`Observer` tells the search, because only it learns why a trial failed."""

    def save(self, checkpoint_path: str) -> None:
        """The results tables and the journal are the record."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Observer(Callback):  # type: ignore[misc]
    """Passes what happens to trials on to monitor and search."""

    def __init__(
        self,
        search: Search,
        monitor: Monitor,
        released: Callable[[str, int], None],
        reasons: Mapping[str, str] | None = None,
        give_up: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """
        Args:
            released: called with a trial and its attempt once it has ended.
            reasons: why trials were stopped that no scheduler stopped.
            give_up: called with the reason when nothing can be written any more.
        """
        self._search, self._monitor, self._released = search, monitor, released
        self._reasons, self._give_up = {} if reasons is None else reasons, give_up

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._monitor.resumed(_id(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "outcome" not in result:
            self._monitor.reported(_id(trial), result)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._monitor.retried(_id(trial), _problem(trial))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result or {}
        why = self._reasons.get(_id(trial), f"behind other trials at step {last.get('step', 0):g}")
        reason = f"{EARLY_STOP}: {why}"
        stopped_early = {"status": "stopped", "reason": reason}
        self._end(trial, last.get("outcome", stopped_early))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        problem = _problem(trial)
        status = "interrupted" if any(sign in problem for sign in filesystems.FULL_SIGNS) else "failed"
        self._end(trial, {"status": status, "reason": problem})

    def _end(self, trial: Any, outcome: dict[str, Any]) -> None:
        if outcome["status"] == "interrupted":  # stays open, for `resume`
            self._give_up(outcome["reason"])
            return
        self._search.ended(_id(trial), self._monitor.ended(_id(trial), outcome))
        self._released(_id(trial), int((trial.last_result or {}).get("attempt", 0)))

    def __getstate__(self) -> dict[str, Any]:
        return {}


class StudyStopper(Stopper):  # type: ignore[misc]
    """Ends the whole study when asked to, or when its time is over."""

    def __init__(
        self, max_hours: float | None, alive: Callable[[], bool] = lambda: True, watch: RuleMonitor | None = None
    ) -> None:
        """
        Args:
            alive: whether there still is a cluster to run on; asked every few seconds.
            watch: says which single trials should stop.
        """
        self.reason, self.watch = "", watch
        self._alive, self._asked = alive, time.monotonic()
        self._deadline = time.monotonic() + max_hours * 3600 if max_hours else None

    def request_stop(self, reason: str) -> None:
        self.reason = self.reason or reason

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        if self.watch is None or "outcome" in result or result["config"]["is_baseline"]:
            return False
        settings = result["config"]
        return self.watch.should_stop(settings["trial_id"], result, total_steps=settings["total_steps"])

    def stop_all(self) -> bool:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.request_stop("budget.max_hours is used up")
        if time.monotonic() - self._asked > _ALIVE_SECONDS:
            self._asked = time.monotonic()
            if not self._alive():
                self.request_stop(CLUSTER_DIED)
        return bool(self.reason)

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _id(trial: Any) -> str:
    return str(trial.config["trial_id"])


def _problem(trial: Any) -> str:
    """The last line of what Tune noted of a crash: the exception and its message."""
    path = trial.error_file
    lines = Path(path).read_text(errors="replace").split("\n") if path and Path(path).is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "the trial's process died")
    return textwrap.shorten(last, 200, placeholder="…")
