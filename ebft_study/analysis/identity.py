"""The identity of a configuration across studies: the settings that decide what its trials train.

Two configurations are one if they agree in these, whatever their studies, labels and numbers are called. Settings that
their method does not read do not count, nor do those that change only where, how fast, or how often something happens.
"""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from ebft_study import config
from ebft_study.config import EARLIER_DEFAULTS, RunConfig, all_keys, short_name, short_names

_NO_PART = (
    *("name", "seed", "evaluation.", "checkpoint.", "tracking.", "vllm.", "features.backend", "features.cache_"),
    *("features.service_timeout_seconds", "training.device", "training.attention", "training.sharding"),
    *("training.micro_batch_size", "training.anchors_at_once", "training.memory_budget_gib"),
    *("training.activation_checkpointing", "training.log_every_steps", "training.sample_every_steps"),
    *("verifier.verifier_workers", "verifier.comet_python", "verifier.comet_timeout_seconds"),
)
"""Settings, or whole sections, that are no part of what a trial trains. What evaluations measure is the metric's own
matter (`Metric.map_of`)."""
_MOOT: dict[str, tuple[str, Any]] = {
    "kl_estimator": ("kl_coefficient", 0.0),
    "lora_alpha": ("lora_rank", 0),
    "lora_targets": ("lora_rank", 0),
    "warm_start_learning_rate": ("warm_start_steps", 0),
    "final_learning_rate_fraction": ("schedule", "constant"),
}
"""Setting -> another one, and its value with which the first has no effect."""
Identity = dict[str, Any]
"""Short name of a setting -> its value."""


def identity(settings: Mapping[str, Any], *, also: Collection[str] = ()) -> Identity:
    """The settings of a configuration, by short name, that make it what it is.

    Args:
        settings: all of a run; None for what the version that ran it did not have.
        also: further ones that count.
    """
    unread = config.unread_settings(str(settings.get("method")))
    names = [name for name in (*identifying(), *also) if name not in unread]
    values = {name: _value(name, settings.get(name)) for name in names}
    moot = {name for name, (other, value) in _MOOT.items() if other in values and values[other] == value}
    return {name: value for name, value in values.items() if name not in moot}


@functools.cache
def identifying() -> tuple[str, ...]:
    """Short names of the settings that can tell configurations apart."""
    return tuple(short_name(path) for path in all_keys() if not path.startswith(_NO_PART))


def different(one: Identity, other: Identity) -> dict[str, tuple[Any, Any]]:
    """Settings in which two configurations differ, with both values; None for one that the method does not read."""
    names = dict.fromkeys((*one, *other))
    return {
        n: (one.get(n), other.get(n)) for n in names if n not in one or n not in other or not same(one[n], other[n])
    }


def same(value: Any, other: Any) -> bool:
    """Whether two values of a setting are one, numbers up to the digits that searches round to."""
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=1e-5)
    return bool(value == other)


def _value(name: str, value: Any) -> Any:
    """A value as a tuple where it is a list; that of a version without the setting is the default of then."""
    if value is None and not _may_be_none(name):
        path = short_names()[name]
        value = EARLIER_DEFAULTS.get(path, all_keys()[path])
    return tuple(value) if isinstance(value, list) else value


@functools.cache
def _may_be_none(name: str) -> bool:
    section, _, leaf = short_names()[name].rpartition(".")
    model = type(RunConfig.model_fields[section].default) if section else RunConfig
    annotation = model.model_fields[leaf].annotation
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return is_union and type(None) in typing.get_args(annotation)
