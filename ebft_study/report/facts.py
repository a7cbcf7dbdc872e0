"""The study's design and origin, as rows of name and text: axes, procedure, fixed settings, provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ebft_study import text
from ebft_study.analysis.settings import choices_of, is_number, objectives
from ebft_study.analysis.summary import Configuration, StudySummary
from ebft_study.analysis.usage import Facts

# Settings worth naming even where they do not vary; the rest is in study.yaml and in the trials table.
NOTABLE = (
    *("method", "model", "dataset", "sequence_length", "packing", "steps", "batch_size", "learning_rate", "schedule"),
    *("warm_start_steps", "n_samples", "completion_length", "stride", "temperature", "anchor_region", "alpha", "gamma"),
    *("whitening", "baseline", "aggregation", "kl_coefficient", "kl_estimator", "ce_region", "feature_network"),
    *("depths", "pooling", "normalize", "precision", "validation_sequences", "heldout_sequences", "cfm_samples"),
    "evaluation_seed",
)
MAX_VALUES = 8
HASH_LENGTH = 32


def asked(study: StudySummary) -> Facts:
    """Axes, baselines, seeds and how configurations were chosen."""
    choices = choices_of(study.results.spec)
    baselines = [c.label for c in study.configurations if c.baseline]
    seeds = sorted({int(seed) for seed in study.results.trials["seed"].dropna()})
    return [
        *(
            (text.named(name), _choices(choices[name]) if name in choices else _values(study.on_axes, name))
            for name in study.varying
        ),
        ("Baselines", text.listed(baselines) or "none"),
        ("Seeds", text.setting(seeds) or text.NOTHING),
        *_procedure(study.results.spec),
    ]


def _values(configurations: Sequence[Configuration], name: str) -> str:
    values = {text.setting(c.settings[name]): c.settings[name] for c in configurations if name not in c.unread}
    if len(values) > MAX_VALUES and all(map(is_number, values.values())):
        return f"{len(values)} values from {text.setting(min(values.values()))} to {text.setting(max(values.values()))}"
    return ("; " if any(isinstance(value, tuple) for value in values.values()) else ", ").join(values)


def _choices(choices: Mapping[str, Mapping[str, Any]]) -> str:
    """`small (model tiny-1m), large (model tiny-4m)`."""
    meanings = {
        choice: ", ".join(f"{text.symbol(name)} {text.setting(value)}" for name, value in settings.items())
        for choice, settings in choices.items()
    }
    return "; ".join(f"{choice} ({meaning})" if meaning else choice for choice, meaning in meanings.items())


def _procedure(spec: Mapping[str, Any]) -> Facts:
    """Search, scheduler and stopping rules, as far as the study file names them."""
    search, scheduler, rules = (_mapping(spec.get(key)) for key in ("search", "scheduler", "stopping"))
    rows: Facts = []
    if search:
        number = f", {search.get('num_configurations')} configurations" if search.get("num_configurations") else ""
        sampler = f" ({search.get('sampler')})" if search.get("algorithm") == "optuna" else ""
        rows.append(("Search", f"{search.get('algorithm')}{sampler}{number}"))
        if search.get("known"):
            rows.append(("Known points, tried first", str(len(search["known"]))))
        told = [f"{each['study']} ({len(each['points'])} configurations)" for each in spec.get("warm_start") or ()]
        if told:
            rows.append(("The search was told results of", text.listed(told)))
    if scheduler:
        settings = {name: value for name, value in scheduler.items() if name != "kind"}
        stopping = [f"{scheduler.get('kind')} ({_value(settings)})"] if scheduler.get("kind") != "none" else []
        stopping += [f"{name.replace('_', ' ')} ({_value(rule)})" for name, rule in rules.items() if rule]
        rows.append(("Early stopping", text.listed(stopping) or "none"))
    goals = [f"{mode} {metric}" for metric, mode in objectives(spec)]
    if goals:
        rows.append(("Objectives" if len(goals) > 1 else "Objective", text.listed(goals)))
    return rows


def fixed_settings(study: StudySummary) -> Facts:
    """Notable settings that all trials on the axes share, as far as their methods read them."""
    configurations = study.on_axes or study.configurations
    names = [name for name in NOTABLE if name not in {*study.varying, *study.shown_as}]
    readers = {name: next((c for c in configurations if name not in c.unread), None) for name in names}
    return [(text.named(name), text.setting(c.settings[name])) for name, c in readers.items() if c]


def provenance(spec: Mapping[str, Any]) -> list[tuple[str, Facts]]:
    """Data, models and software that the study used, as recorded when it started."""
    titles = {"data": "Data", "models": "Model"}
    groups = [
        (f"{titles.get(kind, kind)}: {name}", _rows(record))
        for kind, entries in _mapping(spec.get("provenance")).items()
        for name, record in _mapping(entries).items()
        if isinstance(record, Mapping)
    ]
    about = {key: spec[key] for key in ("created_at", "profile", "file", "git_revision") if spec.get(key)}
    software = _rows({**about, "versions": _mapping(spec.get("versions"))})
    return [*groups, *([("Study file and software", software)] if software else [])]


def _rows(record: Mapping[str, Any]) -> Facts:
    """A record as rows of text, without empty ones; a model's perplexity comes with that of the trigram baseline."""
    values = {name: value for name, value in record.items() if not isinstance(value, Mapping) or any(value.values())}
    rows = {name.replace("_", " "): _value(value) for name, value in values.items()}
    if {"perplexity", "trigram perplexity"} <= rows.keys():
        both = f"{rows.pop('perplexity')}, trigram baseline on the same tokens {rows.pop('trigram perplexity')}"
        others = list(rows.items())
        return [*others[:1], ("validation perplexity", both), *others[1:]]
    return list(rows.items())


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(inner)}" for key, inner in value.items())
    if isinstance(value, str) and len(value) >= HASH_LENGTH and all(c in "0123456789abcdef" for c in value):
        return value[:16] + "…"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return text.count(value)
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else text.count(round(value))
    return text.setting(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
