"""What the report's script works on: curves, coordinates, and the details of every trial, as plain values for JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from ebft_study import text
from ebft_study.analysis.curves import series, spread
from ebft_study.analysis.settings import objectives
from ebft_study.analysis.summary import MAX_GROUPS, Configuration, StudySummary
from ebft_study.report import content, drawing, facts, importance, samples
from ebft_study.report.conclusion import last_checkpoint
from ebft_study.report.content import NAMES
from ebft_study.results import METRICS

CURVES = (
    *("ce_loss", "cfm_loss", "judge_cfm_loss", "ce_answer_loss", "benchmark_score", "reward", "verifier_reward"),
    *("loss", "policy_entropy", "kl", "grad_norm", "zero_variance_fraction", "duplicate_rate", "step_seconds"),
)
"""Metrics with curves, besides the objectives."""
MAX_CONFIGURATIONS = 60
"""Configurations with curves and samples: the best, and the baselines."""
MAX_VALUES = 60_000
"""Values of all curves together, which are half a megabyte."""
MIN_POINTS = 20
MAX_EVENTS = 20
MAX_MESSAGE_CHARACTERS = 600
DIGITS = 6
_OF_TRIAL = ["trial_id", "attempt", "status", "steps_done", "best_checkpoint"]


def data(study: StudySummary) -> dict[str, Any]:
    """Everything that can be toggled, read on hover, or opened."""
    shown = most_relevant(study)
    note = ""
    if len(shown) < len(study.configurations):
        note = (
            f"Curves and samples are those of the {len(shown)} best configurations by validation {study.objective[0]}, "
            f"baselines included, of {len(study.configurations)}."
        )
    return {
        "study": study.name,
        "objective": study.objective[0],
        "mode": study.objective[1],
        "note": note,
        **_curves(study, shown),
        "coordinates": [_coordinates(study, group) for group in importance.drawable(study)[:MAX_GROUPS]],
        "trials": _trials(study, shown),
    }


def as_json(values: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or begins another."""
    plain = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return plain.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def most_relevant(study: StudySummary) -> list[Configuration]:
    """The configurations with curves, in the study's order."""
    kept = {c.name for c in content.listed(study, MAX_CONFIGURATIONS)}
    return [c for c in study.configurations if c.name in kept]


# --- curves ----------------------------------------------------------------------------------------------------


def _curves(study: StudySummary, shown: Sequence[Configuration]) -> dict[str, Any]:
    wanted = dict.fromkeys([study.objective[0], *(name for name, _ in objectives(study.results.spec)), *CURVES])
    rows = study.results.metrics
    metrics = [name for name in wanted if name in rows and rows[name].notna().any()]
    points = max(MIN_POINTS, MAX_VALUES // max(1, 3 * len(shown) * len(metrics)))
    styles = drawing.configuration_styles(study)
    return {
        "metrics": [{"name": name, "title": _title(name), "unit": METRICS[name].unit} for name in metrics],
        "configurations": [
            {
                "label": c.label,
                "color": styles[c.name].color,
                "dash": _dash(styles[c.name].linestyle),
                "value": _number(c.validated()),
                "seeds": f"{len(c.finished_seeds)} of {c.n_seeds}",
                "baseline": c.baseline is not None,
                "curves": {name: curve for name in metrics if (curve := _curve(study, c, name, points))},
            }
            for c in shown
        ],
    }


def _title(name: str) -> str:
    where = "Validation" if METRICS[name].is_objective and name not in ("reward", "verifier_reward") else "Training"
    return f"{where} {NAMES.get(name, name.replace('_', ' '))}"


def _curve(study: StudySummary, c: Configuration, metric: str, points: int) -> dict[str, Any] | None:
    """The mean over finished trials with the lowest and the highest, and each trial that did not finish."""
    finished, unfinished = series(study, c, metric)
    curve: dict[str, Any] = {}
    if len(finished):
        line = _thinned(spread(finished), points)
        curve = {
            "x": [int(step) for step in line["step"]],
            "n": [int(n) for n in line["n"]],
            **{name: [_number(v) for v in line[name]] for name in ("mean", "low", "high")},
        }
    alone = [_thinned(each.dropna(), points) for each in unfinished]
    if alone:
        curve["open"] = [
            {"trial": str(each.name), "x": [int(step) for step in each.index], "y": [_number(v) for v in each]}
            for each in alone
            if len(each)
        ]
    return curve or None


def _thinned(rows: Any, points: int) -> Any:
    """About `points` of the rows, evenly, the last one included."""
    every = max(1, math.ceil(len(rows) / points))
    places = sorted({*range(0, len(rows), every), len(rows) - 1}) if len(rows) else []
    return rows.iloc[places]


def _number(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _dash(linestyle: Any) -> str:
    return "" if isinstance(linestyle, str) else " ".join(f"{2 * length:g}" for length in linestyle[1])


# --- parallel coordinates --------------------------------------------------------------------------------------


def _coordinates(study: StudySummary, group: Sequence[Configuration]) -> dict[str, Any]:
    found = importance.coordinates(study, group)
    return {
        "label": study.map_label(group[0].map_of(study.objective[0])),
        "axes": [*map(text.named, found.names), f"validation {study.objective[0]}"],
        "ticks": [[[round(height, 4), label] for height, label in of_axis] for of_axis in found.ticks],
        "lines": [
            {"label": c.label, "value": _number(c.validated()), "at": [round(height, 4) for height in heights]}
            for c, heights in zip(found.measured, found.lines, strict=True)
        ],
    }


# --- trials ----------------------------------------------------------------------------------------------------


def _trials(study: StudySummary, shown: Sequence[Configuration]) -> dict[str, Any]:
    """By trial: its configuration, settings beside the baseline's, events, checkpoints, and samples beside others'."""
    events = _events(study)
    reference = next((c for c in study.configurations if c.baseline), study.configurations[0] if shown else None)
    sampled = samples.Samples(study)
    rivals = {c.label: samples.first_trial(c.finished) for c in study.best_by_method() if c.is_sft}
    with_samples = {c.name for c in shown}
    found = {}
    for c in content.listed(study, content.MAX_CONFIGURATIONS):
        for row in c.trials[_OF_TRIAL].to_dict("records"):
            trial = str(row["trial_id"])
            others = {label: rival for label, rival in rivals.items() if rival != trial}
            prompts = samples.side_by_side(sampled, {**others, f"{c.label}, {trial}": trial})
            found[trial] = {
                "configuration": c.label,
                "reference": reference.label if reference else "",
                "differs": _differences(study, c, reference) if reference and reference is not c else [],
                "events": events.get(trial, []),
                "checkpoint": last_checkpoint(row) if row["status"] == "finished" else "",
                "best": "" if text.is_missing(row["best_checkpoint"]) else str(row["best_checkpoint"]),
                "samples": [_prompt(each) for each in prompts] if c.name in with_samples else [],
            }
    return found


def _differences(study: StudySummary, c: Configuration, reference: Configuration) -> list[list[str]]:
    """Settings that the configuration reads and the reference does not have so: name, value, and the reference's.

    Of those that the reference does not read, the ones that vary or are worth naming.
    """
    rows = []
    for name in [name for name in c.settings if name not in c.unread and name not in ("seed", "name")]:
        value, other = c.settings[name], reference.settings[name]
        if name in reference.unread:
            if name in {*study.varying, *study.shown_as, *facts.NOTABLE}:
                rows.append([name, text.setting(value), "not read"])
        elif value != other and not (text.is_missing(value) and text.is_missing(other)):
            rows.append([name, text.setting(value), text.setting(other)])
    return rows


def _events(study: StudySummary) -> dict[str, list[list[str]]]:
    """The events of each trial, in order; of many the last."""
    events = study.results.events.dropna(subset=["trial_id"])
    return {
        str(trial): [
            [row["time"].strftime("%Y-%m-%d %H:%M:%S"), str(row["kind"]), str(row["message"])[:MAX_MESSAGE_CHARACTERS]]
            for row in of_trial.tail(MAX_EVENTS).to_dict("records")
        ]
        for trial, of_trial in events.groupby("trial_id")
    }


def _prompt(each: samples.SamplePrompt) -> dict[str, Any]:
    return {"context": each.context, "truth": each.ground_truth, "models": list(each.models.items())}
