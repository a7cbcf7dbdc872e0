"""The driver's record of its trials: every change of state goes into the results tables and to the display."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ebft_study import config
from ebft_study.analysis.usage import REDONE_EVENT
from ebft_study.results import SKIPPED, StudyRecorder
from ebft_study.results.lineage import EXPLOIT
from ebft_study.study.driver.callbacks import Callbacks
from ebft_study.study.folder.trial_states import OPEN, TrialResult, TrialState, trial_result
from ebft_study.study.spec.trials import Trial, format_value
from ebft_study.study.view.display import Lines

SIZES = ("parameters", "trainable_parameters", "feature_parameters")
COUNTED = ("sequences_seen", "tokens_seen", "peak_memory_bytes", *SIZES)


class Monitor:
    """Keeps `results/trials` true at every moment. Plain Python; `tuning.Observer` is Ray's side of it."""

    def __init__(
        self, recorder: StudyRecorder, states: dict[str, TrialState], objective: str, further: Sequence[str] = ()
    ) -> None:
        """`states` starts with the trials that earlier sessions ended, and is shared with the display.

        `objective` and `further` are the metrics that the search optimizes.
        """
        self._recorder, self._states, self._objective, self._further = recorder, states, objective, further
        self._first_report: dict[str, tuple[int, float]] = {}
        self.display: Lines | None = None
        self.callbacks = Callbacks()

    def planned(self, trial: Trial) -> None:
        """A trial is known and pending."""
        self._recorder.trial(self._plan(trial))

    def all_planned(self, trials: Iterable[Trial]) -> None:
        """The same for all trials of a search that are known from the start."""
        self._recorder.trials(self._plan(trial) for trial in trials)

    def skipped(self, left_out: Iterable[tuple[Trial, str]]) -> None:
        """Trials that are not needed, each with the reason."""
        self._recorder.trials([self._skipped(trial, reason) for trial, reason in left_out])

    def _skipped(self, trial: Trial, reason: str) -> dict[str, Any]:
        row, state = self._plan(trial), self._states[trial.trial_id]
        state.status, state.note = SKIPPED, reason
        return {**row, "status": SKIPPED, "stop_reason": reason}

    def _plan(self, trial: Trial) -> dict[str, Any]:
        state = self._states.setdefault(trial.trial_id, TrialState(trial.trial_id, trial.label))
        state.status, state.total_steps, state.note = "pending", trial.run.total_steps, ""
        state.gpus = trial.resources.gpus
        state.started_at = state.ended_at = state.stopwatch = state.own_seconds = None
        return self._row(
            trial.trial_id,
            label=trial.label,
            configuration=trial.configuration.label,
            named_baseline=trial.configuration.baseline,
            stop_reason=None,
            error=None,
            hyperparameters=config.flatten(trial.run),
        )

    def started(self, trial_id: str) -> None:
        """A slot was free, and Ray starts the trial."""
        state = self._states[trial_id]
        state.status = "running"
        state.begin()
        first = {"started_at": _moment(state.started_at)} if state.attempt == 0 else {}
        self._record(trial_id, **first)
        self._changed(state, "starts")
        self.callbacks.trial("on_trial_start", state)

    def reported(self, trial_id: str, metrics: Mapping[str, Any]) -> None:
        """An evaluation or a checkpoint; its rows are in the tables already."""
        state = self._states[trial_id]
        attempt = int(metrics.get("attempt", 0))
        if attempt > state.attempt and "host" in metrics:
            self._record(trial_id, host=metrics["host"], attempt=attempt)
        if attempt > state.attempt and state.metrics:
            self._resumed(state, attempt, metrics)
        state.attempt = max(state.attempt, attempt)
        state.step = int(metrics["step"])
        self._first_report.setdefault(trial_id, (state.step, time.monotonic()))
        state.best_checkpoint = metrics.get("best_checkpoint") or state.best_checkpoint
        state.metrics = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        if metrics.get("evaluated_step", state.step) == state.step:
            names = (self._objective, *self._further)
            state.curve[state.step] = tuple(state.metrics.get(name, math.nan) for name in names)
        cfm = state.metrics.get("cfm_loss", math.nan)
        if math.isfinite(cfm):
            state.best_cfm = min(cfm, state.best_cfm)
        self._changed(state, f"step {state.step}/{state.total_steps}")
        self.callbacks.trial("on_report", state)

    def _resumed(self, state: TrialState, attempt: int, metrics: Mapping[str, Any]) -> None:
        """A new attempt begins at an earlier step: the work since then was in vain, but it was done."""
        lost = state.resume_cost(metrics)
        if any(lost.values()):
            message = f"attempt {attempt} begins at step {int(metrics['step'])}; what was done since counts as cost"
            self._recorder.event(REDONE_EVENT, message, trial_id=state.trial_id, attempt=attempt, **lost)

    def retried(self, trial_id: str, problem: str) -> None:
        """The trial crashed, and will be started again."""
        state = self._states[trial_id]
        self._first_report.pop(trial_id, None)
        self._recorder.event("retry", problem, trial_id=trial_id, attempt=state.attempt)
        self._changed(state, f"crashed and is started again ({problem})")

    def paused(self, trial_id: str, attempt: int) -> None:
        """The trial released its slot and waits for its next turn."""
        state = self._states[trial_id]
        state.attempt = max(state.attempt, attempt)
        state.earlier_seconds, state.started_at = state.seconds or 0.0, None
        state.status = "pending"
        self._record(trial_id, total_seconds=state.seconds)
        self._changed(state, "pauses")

    def resumed(self, trial_id: str) -> None:
        """A slot is free for a trial that waited."""
        if self._states[trial_id].status == "pending":
            self.started(trial_id)

    def exploited(self, trial_id: str, attempt: int, details: Mapping[str, Any]) -> None:
        """The trial continues from another one's checkpoint with new settings, from `attempt` on."""
        after = " ".join(f"{name}={format_value(value)}" for name, value in details["after"].items())
        message = (
            f"at step {details['step']} continues from {details['donor']}'s step {details['donor_step']} with {after}"
        )
        self._recorder.event(EXPLOIT, message, trial_id=trial_id, attempt=attempt, **details)
        self._changed(self._states[trial_id], message)

    def ended(self, trial_id: str, outcome: Mapping[str, Any]) -> TrialResult:
        """The trial is over. `outcome`: status, reason, and the return value of `worker.train_worker`."""
        state = self._states[trial_id]
        status, reason = outcome["status"], outcome.get("reason", "")
        state.status, state.note = status, reason
        state.end()
        reasons = {"stopped": {"stop_reason": reason}, "failed": {"error": reason}}.get(status, {})
        saved = self._saved(state) if state.stopped_early else {}
        self._record(trial_id, **reasons, **saved, **self._numbers(state, outcome))
        if status == "failed" or state.stopped_early:  # the loop records other stops itself
            self._recorder.event(status, reason, trial_id=trial_id, attempt=state.attempt)
        self._changed(state, f"{status}{f' ({reason})' if reason else ''}")
        self.callbacks.trial("on_trial_end", state)
        return trial_result(state, self._objective, self._further)

    def interrupted(self, reason: str) -> None:
        """The driver ends before these trials; `resume` continues them."""
        open_states = [state for state in self._states.values() if state.status in OPEN]
        self._recorder.trials([self._interrupted(state, reason) for state in open_states])

    def _interrupted(self, state: TrialState, reason: str) -> dict[str, Any]:
        running = state.status == "running"
        state.status, state.note = "interrupted", reason
        if running:
            state.end()
        return self._row(state.trial_id, stop_reason=reason, **(self._numbers(state, {}) if running else {}))

    def number_ended(self) -> int:
        """Trials that are over."""
        return sum(state.status not in OPEN for state in list(self._states.values()))

    def record(self, kind: str, message: str, **details: Any) -> None:
        """Something that concerns the study as a whole, for those who look it up."""
        self._recorder.event(kind, message, **details)

    def note(self, kind: str, message: str, **details: Any) -> None:
        """The same for everybody: it is also shown."""
        self.record(kind, message, **details)
        self.say(message)

    def say(self, message: str) -> None:
        """Show a line, unless it is empty; it is not recorded."""
        if self.display and message:
            self.display.say(message)

    def _numbers(self, state: TrialState, outcome: Mapping[str, Any]) -> dict[str, Any]:
        """Cost and metrics as columns of `trials`."""
        state.metrics |= outcome.get("metrics", {})
        metrics, startup = state.metrics, outcome.get("startup_seconds")
        columns: dict[str, Any] = {
            "finished_at": _moment(state.ended_at),
            "total_seconds": state.seconds,
            "train_seconds": outcome.get("train_seconds"),
            "steps_done": state.step,
            "final_ce_loss": metrics.get("ce_loss"),
            "final_cfm_loss": metrics.get("cfm_loss"),
            "best_cfm_loss": state.best_cfm if math.isfinite(state.best_cfm) else None,
            **({"best_checkpoint": state.best_checkpoint} if state.best_checkpoint else {}),
            **{name: int(metrics[name]) for name in COUNTED if math.isfinite(metrics.get(name, math.nan))},
            **state.cost,
            "gpu_seconds": None if state.seconds is None else state.gpus * state.seconds,
        }
        if startup is not None and math.isfinite(startup) and state.started_at is not None:
            # From the free slot to the first optimizer step: processes, imports, model, data, base evaluation.
            columns["startup_seconds"] = max(outcome["started_at"] - state.started_at, 0.0) + startup
        return columns

    def _saved(self, state: TrialState) -> dict[str, Any]:
        """Steps that an early stop saved, and their time by the trial's speed since its first report."""
        left, now = state.total_steps - state.step, time.monotonic()
        step, then = self._first_report.get(state.trial_id, (state.step, now))
        done, seconds = (state.step - step, now - then) if state.step > step else (state.step, state.seconds)
        return {"steps_saved": left, "seconds_saved": left * seconds / done if done and seconds else None}

    def _record(self, trial_id: str, **columns: Any) -> None:
        self._recorder.trial(self._row(trial_id, **columns))

    def _row(self, trial_id: str, **columns: Any) -> dict[str, Any]:
        state = self._states[trial_id]
        return {"trial_id": trial_id, "status": state.status, "attempt": state.attempt, **columns}

    def _changed(self, state: TrialState, what: str) -> None:
        if self.display:
            self.display.changed(state, what)


def _moment(seconds: float | None) -> datetime.datetime | None:
    return None if seconds is None else datetime.datetime.fromtimestamp(seconds, datetime.UTC)
