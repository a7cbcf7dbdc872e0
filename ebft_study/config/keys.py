"""Names of settings: dotted paths (`reward.alpha`) and short names (`alpha`), and dictionaries keyed by them."""

from __future__ import annotations

import collections
import difflib
import functools
import math
import operator
from collections.abc import Mapping
from typing import Any

from ebft_study.config.sections import RunConfig, Section
from ebft_study.errors import ConfigError

EARLIER_DEFAULTS: dict[str, Any] = {"loss.kl_estimator": "k3", "training.activation_checkpointing": False}
"""Dotted path -> default in version 0.1 of a setting that has another one now. Studies of that version keep it."""


@functools.cache
def all_keys() -> dict[str, Any]:
    """Dotted path -> default value of every setting of a run, in the order of the sections."""
    defaults: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.default, Section):
            defaults |= {f"{name}.{leaf}": value for leaf, value in field.default}
        else:
            defaults[name] = field.default
    return defaults


@functools.cache
def short_names() -> dict[str, str]:
    """Short name -> dotted path."""
    return {short_name(path): path for path in all_keys()}


def short_name(path: str) -> str:
    """Name of a setting in tables and plots: `reward.alpha` -> `alpha`.

    Where two sections share a setting's name, the section's name precedes it: `rollout.backend` -> `rollout_backend`.
    """
    section, _, leaf = path.rpartition(".")
    return f"{section}_{leaf}" if leaf in _shared_leaves() else leaf


@functools.cache
def _shared_leaves() -> frozenset[str]:
    counts = collections.Counter(path.rpartition(".")[2] for path in all_keys())
    return frozenset(leaf for leaf, count in counts.items() if count > 1)


def resolve_key(key: str, *, source: str = "command line") -> str:
    """Return the dotted path of a path or short name; refuse others with the nearest valid name."""
    if key in all_keys():
        return key
    if key in short_names():
        return short_names()[key]
    raise ConfigError(f"{source}: unknown key {key!r}.{nearest(key, [*short_names(), *all_keys()])}")


def flatten(config: RunConfig) -> dict[str, Any]:
    """All settings as short name -> value: the hyperparameter columns of the results."""
    return {name: read(config) for name, read in _readers().items()}


@functools.cache
def _readers() -> dict[str, operator.attrgetter]:
    return {name: operator.attrgetter(path) for name, path in short_names().items()}


def nest(settings: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Sort settings, given as sections, dotted paths or short names, into sections."""
    nested: dict[str, Any] = {}
    names: dict[str, str] = {}

    def put(path: str, value: Any, name: str) -> None:
        if names.setdefault(path, name) != name:
            raise ConfigError(f"{source}: {names[path]} and {name}: are one setting, which has one value. Keep one")
        _set_path(nested, path, as_number(value))

    sections = {name for name, field in RunConfig.model_fields.items() if isinstance(field.default, Section)}
    for key, value in settings.items():
        if key not in sections or (key in short_names() and not isinstance(value, dict)):  # `verifier: bleu`
            put(resolve_key(str(key), source=source), value, str(key))
        elif isinstance(value, dict):
            for leaf, leaf_value in value.items():
                put(f"{key}.{leaf}", leaf_value, f"{key}: {leaf}")
        else:
            raise ConfigError(f"{source}: {key}={value!r}: is a section. Write its settings indented below it")
    return nested


def _set_path(settings: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path of at most two parts in nested settings."""
    section, _, leaf = path.rpartition(".")
    (settings.setdefault(section, {}) if section else settings)[leaf] = value


def with_paths(settings: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with `values`, dotted path -> value, in them; neither is modified."""
    changed = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    for path, value in values.items():
        _set_path(changed, path, value)
    return changed


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings with `changes` applied to `base`; neither is modified."""
    merged = dict(base)
    for key, value in changes.items():
        before = base.get(key)
        merged[key] = merge(before if isinstance(before, dict) else {}, value) if isinstance(value, dict) else value
    return merged


def as_number(value: Any) -> Any:
    """Convert strings that write a finite number: YAML 1.1 reads `1e-4` as a string."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return number if math.isfinite(number) else value
    if isinstance(value, list):
        return [as_number(item) for item in value]
    return value


def nearest(name: str, candidates: list[str]) -> str:
    """Phrase that suggests the closest candidate, or lists all of them."""
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" Known keys: {', '.join(sorted(set(candidates)))}"
