"""Points for scaling fits, from the tables of a study: what a run cost, and what it reached.

A point is a measurement at the end of a schedule. With a cosine schedule the middle of a run is none: its learning rate
is still high, and a run of that length would have ended lower. With a constant learning rate every evaluation is one.

Columns of the points: `trial_id`, `configuration`, `method`, `seed`, `step`, `parameters`, `tokens` (of the training
data, a warm start's included), `flops`, `seconds` (of updates), `start` (the base model's value) and `value`. Costs are
those of the run itself, without what was done twice; null where they were not recorded.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from ebft_study import text
from ebft_study.analysis.configuration import Configuration
from ebft_study.analysis.summary import StudySummary
from ebft_study.errors import FitError
from ebft_study.results import METRICS

COSTS = {"tokens": "tokens_seen", "flops": "flops", "seconds": "update_seconds"}
"""Column of points -> column of the table `metrics`."""
COLUMNS = (
    *("trial_id", "configuration", "method", "seed", "step", "parameters"),
    *(*COSTS, "start", "value"),
)


def final_points(
    study: StudySummary, metric: str = "ce_loss", configurations: Iterable[Configuration] | None = None
) -> pd.DataFrame:
    """The held-out value of every finished trial at its end.

    Raises:
        FitError: a trial's cosine schedule was not at its end, or values of `metric` do not compare.
    """
    rows = []
    for c in _comparable(study, metric, configurations):
        trials = c.finished.dropna(subset=["seed"])
        for trial in trials.to_dict("records"):
            seed = int(trial["seed"])
            _check_end(c, trial)
            if seed in (values := c.final.get((metric, None), {})):
                base = c.base.get((metric, None), {}).get(seed, np.nan)
                rows.append(_row(c, trial, trial["steps_done"], float(base), float(values[seed])))
    points, seen = _with_costs(study, rows), study.results.trials.set_index("trial_id")["tokens_seen"]
    return points.assign(tokens=points["tokens"].fillna(points["trial_id"].map(seen)).astype(float))


def curve_points(
    study: StudySummary, metric: str = "ce_loss", configurations: Iterable[Configuration] | None = None
) -> pd.DataFrame:
    """The validation values of all trials at every evaluation since their methods began.

    The first of them, at step 0, is no point but `start`.

    Raises:
        FitError: a schedule is not constant, or values of `metric` do not compare.
    """
    chosen = _comparable(study, metric, configurations)
    for c in chosen:
        if c.settings.get("schedule") != "constant":
            raise FitError(
                f"{c.label}: schedule={c.settings.get('schedule')}: the middle of a run is no final point. "
                "Fit final points of runs of several lengths, or study a constant schedule"
            )
    metrics = study.results.metrics
    evaluated = metrics[metrics[metric].notna()]
    by_trial = {str(trial): rows for trial, rows in evaluated.groupby("trial_id")}
    rows = []
    for c in chosen:
        for trial in c.trials.dropna(subset=["seed", "parameters"]).to_dict("records"):  # others have just begun
            curve = by_trial.get(str(trial["trial_id"]))
            if curve is None:
                continue
            base = curve.loc[curve["step"] == 0, metric]
            start = float(base.iloc[0]) if len(base) else np.nan
            since = curve[curve["step"] > c.warm_start_steps]
            rows += [_row(c, trial, step, start, v) for step, v in zip(since["step"], since[metric], strict=True)]
    return _with_costs(study, rows)


def as_gain(points: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Points whose values are improvements over `start`, which is then 0: the response for CFM, by `forms.sigmoid`."""
    sign = -1.0 if METRICS[metric].direction == "min" else 1.0
    return points.assign(value=sign * (points["value"] - points["start"]), start=0.0)


def _comparable(
    study: StudySummary, metric: str, configurations: Iterable[Configuration] | None
) -> list[Configuration]:
    chosen = list(study.configurations if configurations is None else configurations)
    maps = {c.map_of(metric, at_one_length=True) for c in chosen}
    if len(maps) > 1:
        first = dict(chosen[0].map_of(metric, at_one_length=True))
        names = sorted({name for settings in maps for name, value in settings if value != first.get(name)})
        raise FitError(
            f"{metric}: values do not compare between configurations that differ in {text.listed(names)}. Fit each "
            "group of `analysis.selection.comparable` alone, or judge_cfm_loss"
        )
    return chosen


def _check_end(c: Configuration, trial: dict) -> None:
    steps = c.warm_start_steps + int(c.settings.get("steps") or 0)
    if c.settings.get("schedule") == "cosine" and trial["steps_done"] < steps:
        raise FitError(
            f"{c.label} seed={int(trial['seed'])}: ended at step {int(trial['steps_done'])} of a cosine schedule of "
            f"{steps}: the middle of a run is no final point. Resume the study, or leave the configuration out"
        )


def _row(c: Configuration, trial: dict, step: float, start: float, value: float) -> dict:
    return {
        "trial_id": trial["trial_id"],
        "configuration": c.label,
        "method": c.settings.get("method"),
        "seed": int(trial["seed"]),
        "step": int(step),
        "parameters": float(trial["parameters"]),
        "start": start,
        "value": value,
    }


def _with_costs(study: StudySummary, rows: list[dict]) -> pd.DataFrame:
    points = pd.DataFrame(rows, columns=[name for name in COLUMNS if name not in COSTS])
    costs = study.results.metrics[["trial_id", "step", *COSTS.values()]]
    costs = costs.rename(columns={column: name for name, column in COSTS.items()})
    merged = points.merge(costs, on=["trial_id", "step"], how="left")
    return merged[list(COLUMNS)]
