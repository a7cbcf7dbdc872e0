"""Ray Tune's side of a study: thin adapters from its hooks to search, monitor, and requests to stop.

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
from ebft_study.study.spec.trial_task import TrialTask
from ebft_study.study.spec.trials import Trial
from ebft_study.study.stopping.rules import RuleMonitor

_ALIVE_SECONDS = 3.0


class StudySearcher(Searcher):  # type: ignore[misc]
    """Hands the trials of a `Search` to Tune."""

    def __init__(
        self,
        search: Search,
        monitor: Monitor,
        launched: Callable[[Trial], TrialTask],
        *,
        take_turns: bool = False,
        reason_not_to_start: Callable[[str], str] = lambda configuration: "",
    ) -> None:
        """
        Args:
            launched: starts the services of a trial and returns its task.
            take_turns: Tune gets more trials than there are slots, and decides when to start them.
            reason_not_to_start: of a configuration's trials; '' for one whose trials are to run.
        """
        super().__init__()
        self._search, self._monitor, self._launched, self._take_turns = search, monitor, launched, take_turns
        self._reason_not_to_start = reason_not_to_start

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        while (trial := self._search.next()) is not None and (reason := self._not_to_start(trial)):
            self._monitor.planned(trial)
            outcome = {"status": "stopped", "reason": f"{EARLY_STOP}: {reason}"}
            self._search.ended(trial.trial_id, self._monitor.ended(trial.trial_id, outcome))
        if trial is None:
            return str(Searcher.FINISHED) if self._search.exhausted else None
        self._monitor.planned(trial)
        if not self._take_turns:
            self._monitor.started(trial.trial_id)
        return self._launched(trial).to_config()

    def _not_to_start(self, trial: Trial) -> str:
        _, configuration, is_baseline = trial.unit
        return "" if is_baseline else self._reason_not_to_start(configuration)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """`Observer` notifies the search, because only it learns why a trial failed."""

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
            reasons: trial -> why it was stopped early.
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
        reason = self._reasons.get(_id(trial), f"behind other trials at step {last.get('step', 0):g}")
        stopped_early = {"status": "stopped", "reason": f"{EARLY_STOP}: {reason}"}
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
    """Stops single trials by the study's rules, and the whole study on request or when its time is over."""

    def __init__(
        self, max_hours: float | None, is_alive: Callable[[], bool] = lambda: True, rules: RuleMonitor | None = None
    ) -> None:
        """`is_alive`: whether there still is a cluster to run on; called every few seconds."""
        self.reason, self._rules = "", rules
        self._is_alive, self._asked_at = is_alive, time.monotonic()
        self._deadline = time.monotonic() + max_hours * 3600 if max_hours else None

    @property
    def rule_reasons(self) -> dict[str, str]:
        """Trial -> why a rule stopped it."""
        return self._rules.reasons if self._rules else {}

    def request_stop(self, reason: str) -> None:
        """End the study soon; the first reason counts."""
        self.reason = self.reason or reason

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        if self._rules is None or "outcome" in result:
            return False
        task = TrialTask.from_config(result["config"])
        return not task.is_baseline and self._rules.should_stop(
            task.trial_id,
            result,
            total_steps=task.total_steps,
            n_samples=task.run["rollout"]["n_samples"],
            warm_start_steps=task.run["training"]["warm_start_steps"],
        )

    def stop_all(self) -> bool:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.request_stop("budget.max_hours is used up")
        if time.monotonic() - self._asked_at > _ALIVE_SECONDS:
            self._asked_at = time.monotonic()
            if not self._is_alive():
                self.request_stop(CLUSTER_DIED)
        return bool(self.reason)

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _id(trial: Any) -> str:
    return TrialTask.from_config(trial.config).trial_id


def _problem(trial: Any) -> str:
    """The last line of Tune's error file: the exception and its message."""
    path = trial.error_file
    lines = Path(path).read_text(errors="replace").split("\n") if path and Path(path).is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "the trial's process died")
    return textwrap.shorten(last, 200, placeholder="…")
