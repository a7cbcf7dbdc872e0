"""Whose weights a trial went on with: population-based training as the events of a study record it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ebft_study.results.reader import Results, find_study, read_table
from ebft_study.storage import Location

if TYPE_CHECKING:
    import pandas as pd

EXPLOIT = "exploit"
"""Kind of the event: a trial drops its own state and continues from another trial's checkpoint."""

COLUMNS = (
    *("time", "trial_id", "attempt", "step", "donor", "donor_step", "donor_attempt"),
    *("score", "donor_score", "checkpoint", "before", "after"),
)


def lineage(study: Results | Location) -> pd.DataFrame:
    """A row per takeover, in order of time.

    Columns: `trial_id` went on from `donor`'s checkpoint of `donor_step` instead of its own `step`; from `attempt` on,
    its rows belong to the new line. `score` and `donor_score` are the objectives compared, `before` and `after` the
    settings of the trial (short name -> value), `donor_attempt` where the donor's own line began, `checkpoint` the
    copy that the trial started from, below the study's folder.
    """
    import pandas as pd

    events = study.events if isinstance(study, Results) else read_table(find_study(study), "events")
    rows = [_row(event) for event in events[events["kind"] == EXPLOIT].to_dict("records")]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def settings_in_force(study: Results) -> pd.DataFrame:
    """The settings that a population's trials had in each of their lines: a row per trial and line.

    `from_attempt` is the first attempt with these settings, 0 for those that the trial began with.
    """
    import pandas as pd

    taken = lineage(study)
    axes = sorted({name for settings in taken["after"] for name in settings})
    initial = study.trials[study.trials["named_baseline"].isna()][["trial_id", *axes]].assign(from_attempt=0)
    changed = [
        {"trial_id": row["trial_id"], "from_attempt": row["attempt"], **row["after"]}
        for row in taken.to_dict("records")
    ]
    columns = ["trial_id", "from_attempt", *axes]
    together = [*initial[columns].to_dict("records"), *changed]
    return pd.DataFrame(together, columns=columns).sort_values(columns[:2], ignore_index=True)


def _row(event: dict[Any, Any]) -> dict[str, Any]:
    details = json.loads(event["details"])
    return {
        "time": event["time"],
        "trial_id": event["trial_id"],
        "attempt": int(event["attempt"]),
        **{name: details[name] for name in COLUMNS[3:]},
    }
