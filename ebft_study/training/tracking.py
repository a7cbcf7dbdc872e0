"""Weights & Biases: the same numbers under the same names, one run a trial, grouped by study. Off unless asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebft_study.config import RunConfig, flatten

if TYPE_CHECKING:
    from ebft_study.training.loop import Recorder


class WandbRecorder:
    """Passes everything on to another recorder and logs metrics and evaluations to a W&B run as well.

    The run's id is that of study and trial, so a resumed trial goes on in its run. Credentials are W&B's own business
    (its environment variables or login file): none passes through here.
    """

    def __init__(self, inner: Recorder, config: RunConfig, *, study: str, trial_id: str, label: str, folder: Path):
        import wandb

        self.inner = inner
        self.run = wandb.init(
            project=config.tracking.wandb_project,
            group=study,
            name=label,
            id=f"{study}-{trial_id}",
            resume="allow",
            mode="offline" if config.tracking.wandb == "offline" else "online",
            dir=str(folder),
            config=flatten(config),
            settings=wandb.Settings(silent=True, disable_git=True, save_code=False),
        )
        # Steps repeat after a resume; with its own axis W&B accepts them in any order.
        self.run.define_metric("*", step_metric="step")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.inner.metrics(step, values)
        self.run.log({"step": step, **values})

    def evaluations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.inner.evaluations(step, rows)
        named = {
            f"{row['benchmark']}/{row['metric']}" + (f"/{row['position']}" if row["position"] else ""): row["value"]
            for row in rows
        }
        self.run.log({"step": step, **named})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.inner.samples(step, rows)

    def event(self, kind: str, message: str, **details: Any) -> None:
        self.inner.event(kind, message, **details)

    def close(self) -> None:
        """Flush and end the W&B run."""
        self.run.finish()


def tracked(recorder: Recorder, config: RunConfig, *, study: str, trial_id: str, label: str, folder: Path) -> Recorder:
    """`recorder`, with W&B beside it when the configuration asks for it."""
    if config.tracking.wandb == "off":
        return recorder
    return WandbRecorder(recorder, config, study=study, trial_id=trial_id, label=label, folder=folder)
