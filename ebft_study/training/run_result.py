"""How a run ended, for processes that need not know how it ran."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    status: Literal["finished", "stopped"]
    reason: str
    step: int
    metrics: dict[str, float]
    startup_seconds: float
