"""What a study was expected to take when it started, put on record for its report to compare with what it took."""

from __future__ import annotations

from typing import Any

from ebft_study import text
from ebft_study.storage import Location
from ebft_study.study.forecast import throughput
from ebft_study.study.forecast.throughput import Pace
from ebft_study.study.forecast.trial_groups import Kind, kinds, wall_seconds
from ebft_study.study.spec.study_spec import StudySpec


def forecast(spec: StudySpec, *, storage: Location, concurrency: int) -> dict[str, Any] | None:
    """Seconds of the study and of each kind of trial as plain values; None where nothing was measured here yet."""
    known = throughput.measured(storage)
    if not known:
        return None
    rows = [_row(kind, known, concurrency) for kind in kinds(spec)]
    concurrency = min(concurrency, sum(row["number"] for row in rows))
    seconds = wall_seconds([(row["number"], row["seconds"]) for row in rows], concurrency)
    return {"at_once": concurrency, "seconds": seconds, "kinds": rows}


def message(found: dict[str, Any]) -> str:
    """For people: `about 6 min 5 s for 15 trials, 2 at a time`."""
    number = sum(row["number"] for row in found["kinds"])
    return f"about {text.duration(found['seconds'])} for {number} trials, {found['at_once']} at a time"


def mean_seconds(found: dict[str, Any]) -> float:
    """Of a trial."""
    rows = found["kinds"]
    return float(sum(row["number"] * row["seconds"] for row in rows) / sum(row["number"] for row in rows))


def _row(kind: Kind, known: Pace, concurrency: int) -> dict[str, Any]:
    speed = known.of(kind.work, concurrency=concurrency)
    return {
        "label": kind.label,
        "steps": kind.run.total_steps,
        "seconds": round(speed.seconds(kind.work), 3),
        "startup_seconds": round(speed.startup_seconds, 3),
        "trials": list(kind.trial_ids),
        "number": kind.number,
    }
