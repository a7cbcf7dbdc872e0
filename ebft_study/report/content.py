"""What the report's page says, as plain rows of text: the template only arranges it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ebft_study import text
from ebft_study.report.tables import HELDOUT, Configuration, Study, best
from ebft_study.results.lineage import EXPLOIT

ROUTINE_EVENTS = ("started", "finished", "plan", EXPLOIT)
MAX_INCIDENTS = 30
MAX_CONTEXT_CHARACTERS = 240


def overview(study: Study) -> str:
    """One line: how much of the study is done."""
    statuses = study.results.trials["status"].value_counts()
    total, finished = int(statuses.sum()), int(statuses.get("finished", 0))
    others = [f"{count} {status}" for status, count in statuses.items() if status != "finished"]
    seeds = study.results.trials["seed"].nunique()
    line = f"{finished} of {total} trials finished" + (f" ({', '.join(others)})" if others else "")
    return f"{line} · {len(study.configurations)} configurations × {seeds} seed{'s' * (seeds != 1)}"


# --- tables ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConfigurationRow:
    """A line of the configurations table: held-out means, and differences to the base model and to SFT, by metric."""

    label: str
    seeds: str
    levels: dict[str, str]
    to_base: dict[str, str]
    to_sft: dict[str, str]
    is_best: bool


def configuration_rows(study: Study) -> list[ConfigurationRow]:
    """The base model, then every configuration; "best" is EBFT's best by validation CFM."""
    sft, winner = best(study.sft), best(study.ebft)
    nothing = dict.fromkeys(_COMPARED, text.NOTHING)
    base = {name: text.number(study.base(name)) for name in _SHOWN}
    rows = [ConfigurationRow("base model", text.NOTHING, base, nothing, nothing, is_best=False)]
    for c in study.configurations:
        reference = sft if c is not sft else None
        rows.append(
            ConfigurationRow(
                c.label,
                f"{c.n_finished} of {len(c.trials)}",
                {name: text.level(c.level(name)) for name in _SHOWN},
                {name: text.difference(c.change(name)) for name in _COMPARED},
                {m: text.difference(c.versus(reference, m)) for m in _COMPARED} if reference else nothing,
                is_best=c is winner,
            )
        )
    return rows


_SHOWN = ("ce_loss", "ce_answer_loss", "cfm_loss")
_COMPARED = ("ce_loss", "cfm_loss")


def precision(study: Study) -> str:
    """How many contexts the held-out CFM was measured on, and how exact one model's value is."""
    rows = study.results.evaluations
    rows = rows[(rows["benchmark"] == HELDOUT) & (rows["metric"] == "cfm_loss") & (rows["position"] == study.length)]
    if not len(rows):
        return ""
    error = rows["standard_error"].median()
    known = "" if text.is_missing(error) else f", with a standard error of {text.number(error)} for one model"
    return f"CFM is measured on {text.count(rows['count'].median())} contexts at {study.length} tokens{known}."


def trial_rows(study: Study) -> list[dict[str, str]]:
    """One line per trial: state, settings that vary, held-out values."""
    return [
        {
            "trial": row["trial_id"],
            "status": row["status"],
            "configuration": c.label,
            **{name: text.NOTHING if c.baseline else text.setting(c.settings[name]) for name in study.varying},
            "seed": text.count(row["seed"]),
            "steps": text.count(row["steps_done"]),
            "ce": text.number(_of_seed(c, "ce_loss", row)),
            "cfm": text.number(_of_seed(c, "cfm_loss", row)),
            "time": text.duration(row["total_seconds"]),
            "reason": _reason(row),
        }
        for c in study.configurations
        for row in c.trials.sort_values("seed").to_dict("records")
    ]


def _of_seed(configuration: Configuration, metric: str, row: Mapping[Any, Any]) -> float | None:
    if row["status"] != "finished" or text.is_missing(row["seed"]):
        return None
    return configuration.final.get((metric, None), {}).get(int(row["seed"]))


def unfinished_rows(study: Study) -> list[dict[str, str]]:
    """Trials that are not finished, with the reason on record."""
    return [row for row in trial_rows(study) if row["status"] != "finished"]


def _reason(row: Mapping[Any, Any]) -> str:
    given = [row[key] for key in ("stop_reason", "error") if not text.is_missing(row[key])]
    return "; ".join(str(reason) for reason in given)


def incidents(study: Study) -> list[dict[str, str]]:
    """Events out of the ordinary, the last ones first."""
    events = study.results.events
    unusual = events[~events["kind"].isin(ROUTINE_EVENTS)].sort_values("time", ascending=False)
    return [
        {
            "time": row["time"].strftime("%Y-%m-%d %H:%M:%S"),
            "trial": text.NOTHING if text.is_missing(row["trial_id"]) else row["trial_id"],
            "kind": row["kind"],
            "message": row["message"],
        }
        for row in unusual.head(MAX_INCIDENTS).to_dict("records")
    ]


@dataclass(frozen=True)
class SampleGroup:
    """Completions of one context by one trial at its last recorded step."""

    title: str
    context: str
    ground_truth: str
    completions: list[dict[str, str]]


def sample_groups(study: Study, limit: int = 2) -> list[SampleGroup]:
    """What the best EBFT model and SFT wrote for the same contexts."""
    groups = []
    for configuration in (best(study.ebft), best(study.sft)):
        if configuration is not None:
            rows = _last_samples(study, configuration)
            for _, group in list(rows.groupby(["sequence", "anchor"]))[:limit]:
                groups.append(_sample_group(configuration, group))
    return groups


def _last_samples(study: Study, configuration: Configuration) -> pd.DataFrame:
    finished = configuration.trials.loc[configuration.trials["status"] == "finished", "trial_id"]
    rows = study.results.samples
    of_one_trial: pd.DataFrame = rows[rows["trial_id"] == finished.min()]
    last: pd.DataFrame = of_one_trial[of_one_trial["step"] == of_one_trial["step"].max()]
    return last


def _sample_group(configuration: Configuration, group: pd.DataFrame) -> SampleGroup:
    first = group.iloc[0]
    context = str(first["context"])
    cut = "…" + context[-MAX_CONTEXT_CHARACTERS:] if len(context) > MAX_CONTEXT_CHARACTERS else context
    completions = [
        {"text": str(row["completion"]), **{key: text.number(row[key], 2) for key in _REWARD_PARTS}}
        for row in group.sort_values("reward", ascending=False).to_dict("records")
    ]
    title = f"{configuration.label}, step {first['step']}"
    return SampleGroup(title, cut, str(first["ground_truth"]), completions)


_REWARD_PARTS = ("reward", "alignment", "diversity")


# --- what is not there -----------------------------------------------------------------------------------------


def missing(study: Study, drawn: Sequence[str]) -> list[str]:
    """Plain sentences on what the reader may look for in vain, and what limits the numbers."""
    notes = []
    statuses = study.results.trials["status"]
    if not len(statuses):
        notes.append("No trial has been recorded yet.")
    elif not (statuses == "finished").any():
        notes.append("No trial has finished, so there are no held-out comparisons.")
    if study.results.trials["seed"].nunique() == 1:
        notes.append("One seed only: there are no intervals, and no claim can be judged.")
    if len(statuses) and not study.sft:
        notes.append("No SFT trial: differences to SFT are empty.")
    if study.not_comparable:
        names = text.listed([text.named(name) for name in study.not_comparable])
        notes.append(
            f"The study varies {names}, which changes what CFM measures: compare each configuration's CFM with its "
            "own base model, not with other configurations."
        )
    for name, absent in _NEEDS.items():
        if name not in drawn:
            notes.append(absent)
    return [*notes, *(f"Could not be read, left out: {problem}" for problem in study.results.problems)]


_NEEDS = {
    "learning_curves": "No learning curves: no trial has reported metrics.",
    "cfm_over_length": "No CFM over completion length: no held-out evaluation at two lengths or more.",
    "entropy": "No entropy by position: no held-out evaluation recorded it.",
}
