"""What early stops saved, from a study's trials table, for the report and for `status`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from ebft_study import text


def saved(trials: pd.DataFrame, resources: Mapping[str, Any]) -> str:
    """`840 of 2 400 steps (about 1 h 10 min)` of all trials that are known; '' where no early stop is on record."""
    stopped = trials[trials["steps_saved"].notna()]
    if not len(stopped):
        return ""
    planned = trials["steps"].sum() + trials["warm_start_steps"].sum()
    return f"{text.count(stopped['steps_saved'].sum())} of {text.count(planned)} steps{_time(stopped, resources)}"


def _time(stopped: pd.DataFrame, resources: Mapping[str, Any]) -> str:
    """Trial time by each stopped trial's own pace, which one that was stopped at once does not have."""
    seconds = stopped["seconds_saved"].sum(min_count=1)
    if text.is_missing(seconds):
        return ""
    gpus = max(1, int(resources.get("workers_per_trial", 1))) * float(resources.get("gpus_per_worker", 0))
    spared = f", {text.number(seconds * gpus / 3600, 2)} GPU hours" if gpus else ""
    return f" (about {text.duration(seconds)} of trials{spared})"
