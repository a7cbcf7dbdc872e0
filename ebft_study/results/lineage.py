"""Lineage of the trials of a population: the donors of each trial, as recorded in the events of a study."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ebft_study.results.reader import Results, find_study, read_table
from ebft_study.storage import Location

if TYPE_CHECKING:
    import pandas as pd

EXPLOIT = "exploit"
"""Kind of the event: a trial drops its own state and continues from another trial's checkpoint."""

_EVENT = ("time", "trial_id", "attempt")
_DETAILS = ("step", "donor", "donor_step", "donor_attempt", "score", "donor_score", "checkpoint", "before", "after")


def lineage(study: Results | Location) -> pd.DataFrame:
    """A row per exploit, in order of time.

    Columns: `trial_id` continued from `donor`'s checkpoint of `donor_step` instead of its own `step`; from `attempt`
    on, its rows belong to the new lineage. `score` and `donor_score` are the objectives compared, `before` and `after`
    the settings of the trial (short name -> value), `donor_attempt` the first attempt of the donor's own lineage,
    `checkpoint` the copy that the trial started from, below the study's folder.
    """
    import pandas as pd

    events = study.events if isinstance(study, Results) else read_table(find_study(study), "events")
    rows = [_row(event) for event in events[events["kind"] == EXPLOIT].to_dict("records")]
    return pd.DataFrame(rows, columns=[*_EVENT, *_DETAILS])


def _row(event: dict[Any, Any]) -> dict[str, Any]:
    details = json.loads(event["details"])
    row = {"time": event["time"], "trial_id": event["trial_id"], "attempt": int(event["attempt"])}
    return row | {name: details[name] for name in _DETAILS}


def settings_in_force(study: Results) -> pd.DataFrame:
    """The settings that a population's trials had in each of their lineages: a row per trial and lineage.

    `from_attempt` is the first attempt with these settings, 0 for those that the trial began with.
    """
    import pandas as pd

    exploits = lineage(study).to_dict("records")
    axes = sorted({name for row in exploits for name in row["after"]})
    columns = ["trial_id", "from_attempt", *axes]
    initial = study.trials[study.trials["named_baseline"].isna()].assign(from_attempt=0)[columns].to_dict("records")
    changed = [{"trial_id": row["trial_id"], "from_attempt": row["attempt"], **row["after"]} for row in exploits]
    return pd.DataFrame([*initial, *changed], columns=columns).sort_values(columns[:2], ignore_index=True)
