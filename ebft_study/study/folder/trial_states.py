"""A trial as the driver sees it: its state, its evaluations, and its result."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ebft_study.results import SKIPPED
from ebft_study.results.metrics import COST

OPEN = ("pending", "running", "interrupted")


EARLY_STOP = "early stop"
"""Beginning of the `stop_reason` of a trial that scheduler or rules stopped; other trials stopped by themselves."""

CONFIGURATION_STOPPED = "configuration stopped"
"""What follows it where the scheduler stopped the whole configuration: all its seeds."""


Kind = Literal["finished", "early", "failed", "skipped"]


@dataclass
class TrialState:
    """One line of the table. Times are in seconds since the epoch; `earlier_seconds` were spent in earlier sessions."""

    trial_id: str
    label: str
    status: str = "pending"
    attempt: int = 0
    step: int = 0
    total_steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    started_at: float | None = None
    ended_at: float | None = None
    earlier_seconds: float = 0.0
    note: str = ""
    """Why it ended."""
    best_cfm: float = math.inf
    """The lowest cfm_loss of all attempts."""
    best_checkpoint: str | None = None
    gpus: float = 0.0
    """GPUs that the trial reserves."""
    curve: dict[int, tuple[float, ...]] = field(default_factory=dict)
    """Step -> the objectives that were evaluated then."""
    redone: dict[str, float] = field(default_factory=dict)
    """Cost of what earlier attempts did beyond the checkpoints that their next attempts began with, by metric."""
    stopwatch: float | None = None
    """Start of the trial by this process's monotonic clock; None in another process."""
    own_seconds: float | None = None
    """The stopwatch's time when it ended."""

    @property
    def seconds(self) -> float | None:
        if self.started_at is None:
            return self.earlier_seconds or None
        if self.own_seconds is not None:
            return self.earlier_seconds + self.own_seconds
        if self.stopwatch is not None:
            return self.earlier_seconds + time.monotonic() - self.stopwatch
        return self.earlier_seconds + max((self.ended_at or time.time()) - self.started_at, 0.0)

    @property
    def cost(self) -> dict[str, float]:
        """Cost of all attempts, as far as it is known, by metric."""
        return {name: self.metrics[name] + self.redone.get(name, 0.0) for name in COST if name in self.metrics}

    def resume_cost(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Take over the cost in the first report of a new attempt; returns what is lost with the attempt before.

        After an exploit a part may be negative: the donor had spent more.
        """
        begun = metrics if metrics["step"] > 0 else {}  # without a checkpoint, all that it reports is new
        lost = {
            name: self.metrics[name] - begun.get(name, 0.0)
            for name in COST
            if name in self.metrics and (name in begun or not begun)
        }
        self.redone |= {name: self.redone.get(name, 0.0) + amount for name, amount in lost.items()}
        return lost

    @property
    def stopped_early(self) -> bool:
        """By the scheduler."""
        return self.status == "stopped" and self.note.startswith(EARLY_STOP)

    def begin(self) -> None:
        """Now."""
        self.started_at, self.stopwatch = time.time(), time.monotonic()
        self.ended_at = self.own_seconds = None

    def end(self) -> None:
        """Now."""
        self.ended_at = time.time()
        if self.stopwatch is not None:
            self.own_seconds = time.monotonic() - self.stopwatch


@dataclass(frozen=True)
class Evaluation:
    """A trial's metrics when it was evaluated after `step` updates; step 0 is the base model."""

    step: int
    metrics: Mapping[str, float]

    def get(self, name: str) -> float:
        """NaN where it was not measured."""
        return self.metrics.get(name, math.nan)


@dataclass(frozen=True)
class TrialResult:
    """End of a trial: its outcome, its last objectives (NaN where it has none), their step, and all before."""

    kind: Kind
    value: float = math.nan
    step: int = 0
    further: tuple[float, ...] = ()
    curve: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """Step -> objectives at each evaluation."""


def trial_result(state: TrialState, objective: str, further: Sequence[str] = ()) -> TrialResult:
    """The result of a trial that is over. One that became non-finite says nothing about its settings."""
    value, *others = (state.metrics.get(name, math.nan) for name in (objective, *further))
    kind: Kind = "early" if state.stopped_early else "failed"
    kind = "finished" if state.status == "finished" else "skipped" if state.status == SKIPPED else kind
    return TrialResult(kind, value, state.step, tuple(others), dict(state.curve))
