"""Training of one run: `loop.train` is the loop, `worker` runs it under Ray Train.

This module has the interface between a loop and its callers. Importing it loads no models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

Report = Callable[[dict[str, float], Path | None], None]
"""Called with the latest metrics and, where one was written, the folder of a new checkpoint."""


class Workers(NamedTuple):
    """The processes of a trial."""

    device: Literal["cpu", "cuda"] = "cpu"
    number: int = 1
    gpu_fraction: float = 1.0
    """The part of a GPU that each may use."""
    are_here: bool = True
    """They run on this machine, not on others of a cluster."""


class Recorder(Protocol):
    """Recorder of a run's measurements (`results.TrialRecorder`)."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def evaluations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def scores(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def event(self, kind: str, message: str, **details: Any) -> None: ...


@dataclass(frozen=True)
class RunResult:
    """Result of a run: its last step, and the latest metrics at that step."""

    status: Literal["finished", "stopped"]
    reason: str
    step: int
    metrics: dict[str, float]
    startup_seconds: float
    """Time until the first update; NaN without any."""
