"""Training one run: `loop.train` tells how, `worker` is its door from Ray Train.

Here is what a loop and its callers agree on. Importing it loads no models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Report = Callable[[dict[str, float], Path | None], None]
"""Called with the latest metrics and, where one was written, the folder of a new checkpoint."""


class Recorder(Protocol):
    """Where a run's numbers go (`results.TrialRecorder`)."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def evaluations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def event(self, kind: str, message: str, **details: Any) -> None: ...


@dataclass(frozen=True)
class RunResult:
    """How a run ended: its last step, and the metrics that were the latest there."""

    status: Literal["finished", "stopped"]
    reason: str
    step: int
    metrics: dict[str, float]
    startup_seconds: float
    """Until the first update; NaN without any."""
