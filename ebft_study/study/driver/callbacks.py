"""Callbacks of users: objects that are told, in the driver, how a study goes. They decide nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ebft_study import plugins
from ebft_study.errors import one_line
from ebft_study.study.folder.trial_states import TrialState

KEY = "callbacks"


@dataclass(frozen=True)
class TrialView:
    """A trial at the moment of a call."""

    trial_id: str
    label: str
    """Configuration and seed, as tables show them."""
    status: str
    step: int
    total_steps: int
    metrics: Mapping[str, float]
    """The latest value of everything that trials report."""
    reason: str
    """Why it has stopped early or failed; '' else."""


class StudyCallback(Protocol):
    """What a callback may have: any of these methods, and at least one.

    They are called one after the other by the process that runs the study, which waits for them: what takes long
    belongs into a thread. One that raises an error is not called again in this session; the study continues.
    Objects are also made to check a study file: what has effects belongs into `on_study_start`.
    """

    def on_study_start(self, study: str, folder: str) -> None: ...

    def on_trial_start(self, trial: TrialView) -> None: ...

    def on_report(self, trial: TrialView) -> None:
        """An evaluation, or a checkpoint."""

    def on_trial_end(self, trial: TrialView) -> None: ...

    def on_study_end(self, study: str, reason: str) -> None:
        """`reason`: why the session ended early, '' if every trial is over."""


class Callbacks:
    """The callbacks of a session."""

    def __init__(
        self,
        named: Mapping[str, Mapping[str, Any]] | None = None,
        on_error: Callable[[str], None] = lambda problem: None,
    ) -> None:
        """
        Args:
            named: import path -> options.
            on_error: called with the problem when one has failed.
        """
        self._on_error = on_error
        self._made = {path: plugins.call(path, key=KEY, options=options) for path, options in (named or {}).items()}

    def call(self, hook: str, *arguments: object) -> None:
        """Call a method of `StudyCallback` of all that have it."""
        for path, made in list(self._made.items()):
            method = getattr(made, hook, None)
            if method is None:
                continue
            try:
                method(*arguments)
            except Exception as error:
                del self._made[path]
                problem = f"{hook} has raised {type(error).__name__}: {one_line(error)}; it is not called again"
                self._on_error(f"{KEY}={path!r}: {problem}")

    def trial(self, hook: str, state: TrialState) -> None:
        """Call a method with a trial."""
        if self._made:
            metrics = dict(state.metrics)
            view = (state.trial_id, state.label, state.status, state.step, state.total_steps, metrics, state.note)
            self.call(hook, TrialView(*view))
