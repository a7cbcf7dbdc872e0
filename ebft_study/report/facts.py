"""What a study was and cost, as rows of name and text: what was asked, what was held fixed, provenance, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ebft_study import text
from ebft_study.report import pareto, planned, savings, together
from ebft_study.report.tables import Configuration, Study

# Settings worth naming even where they do not vary; the rest is in study.yaml and in the trials table.
NOTABLE = (
    *("method", "model", "dataset", "sequence_length", "packing", "steps", "batch_size", "learning_rate", "schedule"),
    *("warm_start_steps", "n_samples", "completion_length", "stride", "temperature", "anchor_region", "alpha", "gamma"),
    *("whitening", "baseline", "aggregation", "kl_coefficient", "ce_region", "feature_network", "depths", "pooling"),
    *("normalize", "precision", "validation_sequences", "heldout_sequences", "cfm_samples", "evaluation_seed"),
)
Facts = list[tuple[str, str]]


def asked(study: Study) -> Facts:
    """Axes, baselines, seeds and how configurations were chosen."""
    trials, spec = study.results.trials, study.results.spec
    on_axes = [c for c in study.configurations if c.baseline is None]
    choices = together.choices_of(spec)
    rows = [
        (text.named(name), _choices(choices[name]) if name in choices else _values(on_axes, name))
        for name in study.varying
    ]
    baselines = [c.label for c in study.configurations if c.baseline]
    seeds = sorted({int(seed) for seed in trials["seed"].dropna()})
    rows += [
        ("Baselines", text.listed(baselines) or "none"),
        ("Seeds", text.setting(seeds) or text.NOTHING),
    ]
    return [*rows, *_procedure(spec)]


def _procedure(spec: Mapping[str, Any]) -> Facts:
    """How configurations were chosen and stopped, as far as the study file says."""
    search, scheduler = (_mapping(spec.get(key)) for key in ("search", "scheduler"))
    rows: Facts = []
    if search:
        drawn = f", {search.get('num_configurations')} configurations" if search.get("num_configurations") else ""
        sampler = f" ({search.get('sampler')})" if search.get("algorithm") == "optuna" else ""
        rows.append(("Search", f"{search.get('algorithm')}{sampler}{drawn}"))
    if scheduler:
        rows.append(("Early stopping", _stopping(scheduler, _mapping(spec.get("stopping")))))
    objectives = pareto.objectives(spec)
    if objectives:
        rows.append(
            (
                "Objectives" if len(objectives) > 1 else "Objective",
                text.listed([f"{m} {n}" for n, m in objectives]),
            )
        )
    return rows


def _stopping(scheduler: Mapping[str, Any], rules: Mapping[str, Any]) -> str:
    """The scheduler, and the rules for single trials."""
    settings = {name: value for name, value in scheduler.items() if name != "kind"}
    named = [f"{scheduler.get('kind')} ({_fact(settings)})"] if scheduler.get("kind") != "none" else []
    named += [f"{name.replace('_', ' ')} ({_fact(rule)})" for name, rule in rules.items() if rule]
    return text.listed(named) or "none"


def _values(configurations: Sequence[Configuration], name: str) -> str:
    values = {text.setting(c.settings[name]): c.settings[name] for c in configurations}
    if len(values) > 8 and all(isinstance(v, int | float) for v in values.values()):
        return f"{len(values)} values from {text.setting(min(values.values()))} to {text.setting(max(values.values()))}"
    return ("; " if any(isinstance(value, tuple) for value in values.values()) else ", ").join(values)


def _choices(choices: Mapping[str, Mapping[str, Any]]) -> str:
    """`small (model tiny-1m), large (model tiny-4m)`."""
    meanings = {
        choice: ", ".join(f"{text.symbol(name)} {text.setting(value)}" for name, value in settings.items())
        for choice, settings in choices.items()
    }
    return "; ".join(f"{choice} ({meaning})" if meaning else choice for choice, meaning in meanings.items())


def fixed_settings(study: Study) -> Facts:
    """Notable settings that all trials on the axes share."""
    on_axes = [c for c in study.configurations if c.baseline is None] or list(study.configurations)
    if not on_axes:
        return []
    names = [name for name in NOTABLE if name not in {*study.varying, *study.shown_as}]
    return [(text.named(name), text.setting(on_axes[0].settings[name])) for name in names]


def provenance(spec: Mapping[str, Any]) -> list[tuple[str, Facts]]:
    """What data and models the study used, and the software, as recorded when it started."""
    groups = [
        (f"{_KINDS.get(kind, kind)}: {name}", _facts(record))
        for kind, entries in _mapping(spec.get("provenance")).items()
        for name, record in _mapping(entries).items()
        if isinstance(record, Mapping)
    ]
    about = {key: spec[key] for key in ("created_at", "profile", "file", "git_revision") if spec.get(key)}
    software = _facts({**about, "versions": _mapping(spec.get("versions"))})
    return [*groups, *([("Study file and software", software)] if software else [])]


_KINDS = {"data": "Data", "models": "Model"}


def _facts(record: Mapping[str, Any]) -> Facts:
    """A record as rows of text; a model's perplexity stands beside that of the trigram baseline."""
    rows = [(key.replace("_", " "), _fact(value)) for key, value in record.items() if not _says_nothing(value)]
    if {"perplexity", "trigram_perplexity"} <= record.keys():
        both = (
            f"{_fact(record['perplexity'])}, trigram baseline on the same tokens {_fact(record['trigram_perplexity'])}"
        )
        rows = [row for row in rows if row[0] not in ("perplexity", "trigram perplexity")]
        rows.insert(1, ("validation perplexity", both))
    return rows


def _says_nothing(value: Any) -> bool:
    """Counts that are all zero, such as of dropped examples, and empty records."""
    return isinstance(value, Mapping) and not any(value.values())


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
    workers = max(1, int(resources.get("workers_per_trial", 1)))  # 0: in the trial's own process
    cpus, gpus = (workers * float(resources.get(key, default)) for key, default in _RESOURCES)
    rows = [
        ("Wall-clock, first start to last end", text.duration(wall)),
        ("Trial time, summed", text.duration(used)),
        (
            f"CPU hours ({cpus:g} CPU per trial)",
            text.number(used * cpus / 3600, 2) if used else text.NOTHING,
        ),
    ]
    if gpus:
        rows.append((f"GPU hours ({gpus:g} GPU per trial)", text.number((used or 0.0) * gpus / 3600, 2)))
    saved = savings.saved(trials, resources)
    return [
        *rows,
        *planned.rows(trials, study.results.events),
        *([("Early stopping saved", saved)] if saved else []),
        (
            "Overhead per trial, start to first step (median)",
            text.duration(_statistic(trials, "startup_seconds")),
        ),
        ("Training per trial (median)", text.duration(_statistic(trials, "train_seconds"))),
        ("Peak memory of a training process", text.size(_statistic(trials, "peak_memory_bytes", "max"))),
        ("Machines", text.listed(sorted(trials["host"].dropna().unique())) or text.NOTHING),
    ]


_RESOURCES = (("cpus_per_worker", 1), ("gpus_per_worker", 0))


def _statistic(trials: pd.DataFrame, column: str, how: str = "median") -> float | None:
    values = trials[column].dropna()
    return float(values.agg(how)) if len(values) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
