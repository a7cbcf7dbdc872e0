"""What the report's page says, as plain rows of text: the template only arranges it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ebft_study.report import text
from ebft_study.report.tables import Configuration, Study, best

# Settings worth naming even where they do not vary; the rest is in study.yaml and in the trials table.
NOTABLE = (
    *("method", "model", "dataset", "sequence_length", "packing", "steps", "batch_size", "learning_rate", "schedule"),
    *("warm_start_steps", "n_samples", "completion_length", "stride", "temperature", "anchor_region", "alpha", "gamma"),
    *("whitening", "baseline", "aggregation", "kl_coefficient", "ce_region", "feature_network", "depths", "pooling"),
    *("normalize", "precision", "validation_sequences", "heldout_sequences", "cfm_samples", "evaluation_seed"),
)
ROUTINE_EVENTS = ("started", "finished")
MAX_INCIDENTS = 30
MAX_CONTEXT_CHARACTERS = 240
Facts = list[tuple[str, str]]


def overview(study: Study) -> str:
    """One line: how much of the study is done."""
    statuses = study.results.trials["status"].value_counts()
    total, finished = int(statuses.sum()), int(statuses.get("finished", 0))
    others = [f"{count} {status}" for status, count in statuses.items() if status != "finished"]
    seeds = study.results.trials["seed"].nunique()
    line = f"{finished} of {total} trials finished" + (f" ({', '.join(others)})" if others else "")
    return f"{line} · {len(study.configurations)} configurations × {seeds} seed{'s' * (seeds != 1)}"


def asked(study: Study) -> Facts:
    """Axes, baselines, seeds and how configurations were chosen."""
    trials, spec = study.results.trials, study.results.spec
    on_axes = [c for c in study.configurations if c.baseline is None]
    rows = [(text.named(name), _values(on_axes, name)) for name in study.varying]
    baselines = [c.label for c in study.configurations if c.baseline]
    seeds = sorted({int(seed) for seed in trials["seed"].dropna()})
    rows += [("Baselines", text.listed(baselines) or "none"), ("Seeds", text.setting(seeds) or text.NOTHING)]
    for key in ("search", "scheduler", "objective", "budget"):
        stated = {k: v for k, v in _mapping(spec.get(key)).items() if v is not None}
        if stated:
            rows.append((key.capitalize(), ", ".join(f"{k} {text.setting(v)}" for k, v in stated.items())))
    return rows


def _values(configurations: Sequence[Configuration], name: str) -> str:
    values = {text.setting(c.settings[name]): c.settings[name] for c in configurations}
    if len(values) > 8 and all(isinstance(v, int | float) for v in values.values()):
        return f"{len(values)} values from {text.setting(min(values.values()))} to {text.setting(max(values.values()))}"
    return ", ".join(values)


def fixed_settings(study: Study) -> Facts:
    """Notable settings that all trials on the axes share."""
    on_axes = [c for c in study.configurations if c.baseline is None] or list(study.configurations)
    if not on_axes:
        return []
    names = [name for name in NOTABLE if name not in study.varying]
    return [(text.named(name), text.setting(on_axes[0].settings[name])) for name in names]


def provenance(spec: Mapping[str, Any]) -> list[tuple[str, Facts]]:
    """Versions, and what data and models the study used, as recorded when it started."""
    record = _mapping(spec.get("provenance"))
    groups = [(_title(key), _facts(value)) for key, value in record.items() if isinstance(value, Mapping)]
    loose = {key: value for key, value in record.items() if not isinstance(value, Mapping)}
    about = {key: spec[key] for key in ("created_at", "profile", "file", "git_revision") if spec.get(key)}
    software = list(_facts({**about, **loose})) + list(_facts(_mapping(spec.get("versions"))))
    return [*groups, *([("Study file and software", software)] if software else [])]


def _title(key: str) -> str:
    return key.replace("_", " ").capitalize()


def _facts(record: Mapping[str, Any]) -> Facts:
    """Nested values as rows; a name's path is spelt out, hashes are cut to what tells them apart."""
    return [(name.replace("_", " "), _fact(value)) for name, value in _leaves(record)]


def _leaves(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        name = f"{prefix} · {key}" if prefix else str(key)
        simple = not isinstance(value, Mapping) or not any(isinstance(v, Mapping) for v in value.values())
        if isinstance(value, Mapping) and (not simple or not prefix):
            yield from _leaves(value, name)
        else:
            yield name, value


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_fact(inner)}" for key, inner in value.items())
    if isinstance(value, str) and len(value) >= 32 and all(c in "0123456789abcdef" for c in value):
        return value[:16] + "…"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return text.count(value)
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else text.count(round(value))
    return text.setting(value)


def cost(study: Study) -> Facts:
    """Time and memory that the study took."""
    trials = study.results.trials
    known = trials.dropna(subset=["started_at", "finished_at"])
    wall = (known["finished_at"].max() - known["started_at"].min()).total_seconds() if len(known) else None
    used = float(trials["total_seconds"].sum()) if trials["total_seconds"].notna().any() else None
    resources = _mapping(study.results.spec.get("resources"))
    workers = int(resources.get("workers_per_trial", 1))
    cpus, gpus = (workers * float(resources.get(key, default)) for key, default in _RESOURCES)
    rows = [
        ("Wall-clock, first start to last end", text.duration(wall)),
        ("Trial time, summed", text.duration(used)),
        (f"CPU hours ({cpus:g} CPU per trial)", text.number(used * cpus / 3600, 2) if used else text.NOTHING),
    ]
    if gpus:
        rows.append((f"GPU hours ({gpus:g} GPU per trial)", text.number((used or 0.0) * gpus / 3600, 2)))
    return [
        *rows,
        ("Overhead per trial, start to first step (median)", text.duration(_statistic(trials, "startup_seconds"))),
        ("Training per trial (median)", text.duration(_statistic(trials, "train_seconds"))),
        ("Peak memory of a training process", text.size(_statistic(trials, "peak_memory_bytes", "max"))),
        ("Machines", text.listed(sorted(trials["host"].dropna().unique())) or text.NOTHING),
    ]


_RESOURCES = (("cpus_per_worker", 1), ("gpus_per_worker", 0))


def _statistic(trials: pd.DataFrame, column: str, how: str = "median") -> float | None:
    values = trials[column].dropna()
    return float(values.agg(how)) if len(values) else None


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


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
