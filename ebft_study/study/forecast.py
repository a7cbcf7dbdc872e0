"""What a study was expected to take when it started, put on record for its report to compare with what it took."""

from __future__ import annotations

from typing import Any

from ebft_study.places import Location
from ebft_study.report import text
from ebft_study.study import checks, pace, plan, trials
from ebft_study.study.pace import Pace, Work
from ebft_study.study.spec import StudySpec
from ebft_study.study.trials import Trial

EVENT = "plan"


def forecast(spec: StudySpec, *, storage: Location, at_once: int) -> dict[str, Any] | None:
    """Seconds of the study and of each kind of trial as plain values; None where nothing was measured here yet."""
    known = pace.measured(storage)
    if not known:
        return None
    kinds: dict[Any, list[Trial]] = {}
    for trial in trials.listed(spec):
        kinds.setdefault(plan.cost_key(trial.run), []).append(trial)
    rows = [_kind(spec, known, alike, at_once) for alike in kinds.values()]
    to_choose = trials.number_of_trials(spec) - sum(len(row["trials"]) for row in rows)
    if to_choose:
        dearest = max(checks.check(spec, spec.study), key=pace.flops)
        work = Work.of(dearest, spec.resources.of(dearest).processes)
        rows.append(_row(plan.CHOSEN, dearest.total_steps, work, known, at_once) | {"trials": [], "number": to_choose})
    at_once = min(at_once, sum(row["number"] for row in rows))
    seconds = max([sum(row["number"] * row["seconds"] for row in rows) / at_once, *(row["seconds"] for row in rows)])
    return {"at_once": at_once, "seconds": seconds, "kinds": rows}


def message(found: dict[str, Any]) -> str:
    """For people: `about 6 min 5 s for 15 trials, 2 at a time`."""
    number = sum(row["number"] for row in found["kinds"])
    return f"about {text.duration(found['seconds'])} for {number} trials, {found['at_once']} at a time"


def mean_seconds(found: dict[str, Any]) -> float:
    """Of a trial."""
    kinds = found["kinds"]
    return float(sum(row["number"] * row["seconds"] for row in kinds) / sum(row["number"] for row in kinds))


def _kind(spec: StudySpec, known: Pace, alike: list[Trial], at_once: int) -> dict[str, Any]:
    run = alike[0].run
    work = Work.of(run, spec.resources.of(run).processes)
    own = {"trials": [trial.trial_id for trial in alike], "number": len(alike)}
    return _row(alike[0].configuration.label, run.total_steps, work, known, at_once) | own


def _row(label: str, steps: int, work: Work, known: Pace, at_once: int) -> dict[str, Any]:
    speed = known.of(work, at_once=at_once)
    seconds = {"seconds": round(speed.seconds(work), 3), "startup_seconds": round(speed.startup_seconds, 3)}
    return {"label": label, "steps": steps, **seconds}
