"""Ray Tune's side of a study: thin adapters from its hooks to search, monitor, and requests to stop.

Tune pickles all of them into snapshots that nothing here ever reads, so they pickle to nothing.
"""

from __future__ import annotations

import functools
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.search import Searcher

from ebft_study.errors import ConfigError, StorageError
from ebft_study.storage import filesystems
from ebft_study.study.cluster.own import CLUSTER_DIED
from ebft_study.study.driver.monitor import Monitor
from ebft_study.study.folder.history import BUDGET_USED
from ebft_study.study.folder.trial_states import EARLY_STOP
from ebft_study.study.search.listed import Search
from ebft_study.study.spec.trial_task import TrialTask
from ebft_study.study.spec.trials import Trial
from ebft_study.study.stopping.rules import RuleMonitor

_ALIVE_SECONDS = 3.0
_NODE_LOST = ("its node has died", "the node it was running on is dead", "is temporarily unavailable")
"""Parts of Ray's errors when the node of an actor is gone; it says the last one before it knows why an actor is silent.

Of a process that ended by itself it says that "its worker process has died".
"""
_MOST_NODES_LOST = 5
"""Lost nodes of one trial in a session that are not its failures: a trial that takes its nodes down is to end, too."""


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
        give_up: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """
        Args:
            launched: starts the services of a trial and returns its task.
            take_turns: Tune gets more trials than there are slots, and decides when to start them.
            reason_not_to_start: of a configuration's trials; '' for one whose trials are to run.
            give_up: called with the problem when the search cannot choose.
        """
        super().__init__()
        self._give_up = give_up
        self._search, self._monitor, self._launched, self._take_turns = search, monitor, launched, take_turns
        self._reason_not_to_start = reason_not_to_start

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        try:
            return self._suggest()
        except ConfigError as error:
            self._give_up(error.message)
            return None

    def _suggest(self) -> dict[str, Any] | str | None:
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


def _giving_up(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook of `Observer` that ends the study where nothing can be written: Tune would make a traceback of the error.

    Or, of one at a trial's end, it would start the trial again.
    """

    @functools.wraps(hook)
    def guarded(self: Observer, *arguments: Any, **keywords: Any) -> None:
        try:
            hook(self, *arguments, **keywords)
        except StorageError as error:
            self._give_up(str(error))

    return guarded


class Observer(Callback):  # type: ignore[misc]
    """Passes what happens to trials on to monitor and search."""

    def __init__(
        self,
        search: Search,
        monitor: Monitor,
        released: Callable[[str, int], None],
        reasons: Mapping[str, str] | None = None,
        give_up: Callable[[str], None] = lambda reason: None,
        *,
        max_failures: int = 0,
        may_lose_nodes: bool = True,
    ) -> None:
        """
        Args:
            released: called with a trial and its attempt once it has ended.
            reasons: trial -> why it was stopped early.
            give_up: called with the reason when nothing can be written any more.
            max_failures: how often a trial may crash and be started again; Tune itself has no limit.
            may_lose_nodes: whether the study survives the loss of a node.
        """
        self._search, self._monitor, self._released = search, monitor, released
        self._reasons, self._give_up = {} if reasons is None else reasons, give_up
        self._max_failures, self._may_lose_nodes = max_failures, may_lose_nodes
        self._crashes, self._nodes_lost = Counter[str](), Counter[str]()

    @_giving_up
    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._monitor.resumed(_id(trial))

    @_giving_up
    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "outcome" not in result:
            self._monitor.reported(_id(trial), result)

    @_giving_up
    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune starts the trial again; after too many crashes only to end it, because it has no other way to."""
        trial_id, problem = _id(trial), _problem(trial)
        is_lost = self._may_lose_nodes and any(sign in _last_error(trial) for sign in _NODE_LOST)
        if is_lost and self._nodes_lost[trial_id] < _MOST_NODES_LOST:
            self._nodes_lost[trial_id] += 1
            self._monitor.retried(trial_id, f"its node or a service was lost: {problem}")
            return
        self._crashes[trial_id] += 1
        if self._crashes[trial_id] <= self._max_failures:
            self._monitor.retried(trial_id, problem)
        elif _failed(problem)["status"] == "interrupted":
            self._give_up(problem)
        else:
            trial.set_config({**trial.config, "failed": problem})
            trial.max_failures = 0  # should it not even start

    @_giving_up
    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result or {}
        reason = self._reasons.get(_id(trial), f"behind other trials at step {last.get('step', 0):g}")
        stopped_early = {"status": "stopped", "reason": f"{EARLY_STOP}: {reason}"}
        self._end(trial, last.get("outcome", stopped_early))

    @_giving_up
    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, _failed(trial.config["failed"] or _problem(trial)))

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
        """
        Args:
            max_hours: left of the study's budget.
            is_alive: whether there still is a cluster to run on; called every few seconds.
        """
        self.reason, self._rules = "", rules
        self._is_alive, self._asked_at = is_alive, time.monotonic()
        self._deadline = None if max_hours is None else time.monotonic() + max_hours * 3600

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
        try:
            return not task.is_baseline and self._rules.should_stop(
                task.trial_id,
                result,
                total_steps=task.total_steps,
                n_samples=task.run["rollout"]["n_samples"],
                warm_start_steps=task.run["training"]["warm_start_steps"],
            )
        except ConfigError as error:  # of a rule of the user: what it would have said is not known
            self.request_stop(str(error))
            return False

    def stop_all(self) -> bool:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.request_stop(BUDGET_USED)
        if time.monotonic() - self._asked_at > _ALIVE_SECONDS:
            self._asked_at = time.monotonic()
            if not self._is_alive():
                self.request_stop(CLUSTER_DIED)
        return bool(self.reason)

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _id(trial: Any) -> str:
    return TrialTask.from_config(trial.config).trial_id


def _failed(problem: str) -> dict[str, str]:
    """The outcome of a trial that is not started again; a full disk is no fault of its own."""
    is_full = any(sign in problem for sign in filesystems.FULL_SIGNS)
    return {"status": "interrupted" if is_full else "failed", "reason": problem}


def _last_error(trial: Any) -> str:
    """The last error in Tune's error file, to which it adds each failure of a trial."""
    path = trial.error_file
    text = Path(path).read_text(errors="replace") if path and Path(path).is_file() else ""
    return text.rpartition("\nFailure # ")[2]


def _problem(trial: Any) -> str:
    """The last line of the last error: the exception and its message."""
    lines = reversed(_last_error(trial).split("\n"))
    last = next((line.strip() for line in lines if line.strip()), "the trial's process died")
    return textwrap.shorten(last, 200, placeholder="…")
