"""Names of settings: dotted paths (`reward.alpha`) and the short names that people type (`alpha`)."""

from __future__ import annotations

import collections
import difflib
import functools
import math
from typing import Any

from ebft_study.config.sections import RunConfig, Section
from ebft_study.errors import ConfigError


@functools.cache
def all_keys() -> dict[str, Any]:
    """Every setting of a run as dotted path -> default value, in the order of the models."""
    found: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.default, Section):
            found |= {f"{name}.{leaf}": getattr(field.default, leaf) for leaf in type(field.default).model_fields}
        else:
            found[name] = field.default
    return found


@functools.cache
def short_names() -> dict[str, str]:
    """Short name -> dotted path."""
    return {short_name(path): path for path in all_keys()}


def resolve_key(key: str, *, source: str = "command line") -> str:
    """The dotted path of `key`, which may be a path or a short name; refuses others with the nearest name."""
    if key in all_keys():
        return key
    if key in short_names():
        return short_names()[key]
    raise ConfigError(f"{source}: unknown key {key!r}.{nearest(key, [*short_names(), *all_keys()])}")


def short_name(path: str) -> str:
    """The one name of a setting in tables and plots: `reward.alpha` -> `alpha`.

    Where two sections have a setting of one name, it goes with the section's: `rollout.backend` -> `rollout_backend`.
    """
    section, _, leaf = path.rpartition(".")
    return f"{section}_{leaf}" if leaf in _shared_leaves() else leaf


@functools.cache
def _shared_leaves() -> frozenset[str]:
    counts = collections.Counter(path.rpartition(".")[2] for path in all_keys())
    return frozenset(leaf for leaf, count in counts.items() if count > 1)


def flatten(config: RunConfig) -> dict[str, Any]:
    """All settings as short name -> value: the hyperparameter columns of the results."""
    return {name: getattr(getattr(config, section) if section else config, leaf) for name, section, leaf in _places()}


@functools.cache
def _places() -> tuple[tuple[str, str, str], ...]:
    """(short name, section or '', name there) of every setting."""
    return tuple((short_name(path), path.rpartition(".")[0], path.rpartition(".")[2]) for path in all_keys())


def nest(settings: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Settings in any mix of sections, dotted paths and short names, as sections only."""
    nested: dict[str, Any] = {}
    sections = {name for name, field in RunConfig.model_fields.items() if isinstance(field.default, Section)}
    for key, value in settings.items():
        if key in sections and isinstance(value, dict):
            for leaf, leaf_value in value.items():
                set_path(nested, f"{key}.{leaf}", as_number(leaf_value))
        elif key in sections:
            raise ConfigError(f"{source}: {key}={value!r}: is a section. Write its settings indented below it")
        else:
            set_path(nested, resolve_key(str(key), source=source), as_number(value))
    return nested


def set_path(settings: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path of at most two parts in nested settings."""
    section, _, leaf = path.rpartition(".")
    (settings.setdefault(section, {}) if section else settings)[leaf] = value


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with `changes` laid over `base`; neither is modified."""
    merged = dict(base)
    for key, value in changes.items():
        merged[key] = merge(base.get(key, {}), value) if isinstance(value, dict) else value
    return merged


def as_number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as a string; people mean the number."""
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
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" Known keys: {', '.join(sorted(set(candidates)))}"
