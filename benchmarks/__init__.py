"""The proof of speed: one EBFT step against the published way of computing it, and against the machine's ceiling.

    ebft-study bench                             at the settings that targets are stated for
    python -m benchmarks --device cuda     the same where ray, vllm, datasets, pandas, typer or rich are missing
    ebft-study bench rollouts                    strided rollouts against a vLLM engine; needs ray and vllm
    ebft-study bench features                    feature networks of a grid of trials against one service; needs ray

Both sides of a comparison run in turn in one process, so that a noisy machine disturbs both alike; every number is a
median with its spread. What they compute is compared first (`agreement`). Importing this package imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from benchmarks.settings import SECTIONS, Settings

if TYPE_CHECKING:
    from benchmarks.rows import Row

__all__ = ["SECTIONS", "Settings", "run"]

Report = Callable[[str, "list[Row]"], None]


def run(settings: Settings, sections: Sequence[str] = SECTIONS, *, report: Report | None = None) -> list[Row]:
    """Measure the chosen sections, in the order of `SECTIONS`.

    Args:
        report: called with a section's name and rows as soon as they are there; first with `setting`.

    Returns:
        All rows. A section that cannot be run leaves one row `<section>/failed`, and the others go on.

    Raises:
        ConfigError: settings that cannot be measured at all.
    """
    from benchmarks import running

    return running.run(settings, sections, report)
