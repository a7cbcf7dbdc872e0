"""A callback: a line of JSON for every change of a trial."""

import json
from pathlib import Path

from ebft_study.study.driver.callbacks import TrialView


class Log:
    """Appends to a file."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def on_trial_start(self, trial: TrialView) -> None:
        self._write("start", trial)

    def on_report(self, trial: TrialView) -> None:
        self._write("report", trial)

    def on_trial_end(self, trial: TrialView) -> None:
        self._write("end", trial)

    def on_study_end(self, study: str, reason: str) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"event": "over", "study": study, "reason": reason}) + "\n")

    def _write(self, event: str, trial: TrialView) -> None:
        line = {"event": event, "trial": trial.trial_id, "step": trial.step, "status": trial.status}
        with self._path.open("a") as file:
            file.write(json.dumps({**line, "ce_loss": trial.metrics.get("ce_loss")}) + "\n")
