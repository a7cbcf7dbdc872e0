"""Explore: which settings a trial gets near its donor's. Pure functions of settings, without Ray."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping
from typing import Any

from ebft_study import config
from ebft_study.config import RunConfig
from ebft_study.errors import ConfigError
from ebft_study.study.spec import enumeration, trials
from ebft_study.study.spec.axis import Axis
from ebft_study.study.spec.study_spec import SchedulerSpec, StudySpec

_ATTEMPTS = 50  # to find settings that break no rule


def explore(
    spec: StudySpec, run: Mapping[str, Any], donor: Mapping[str, Any], generator: random.Random
) -> dict[str, Any]:
    """Settings near the donor's, of its axes, that the study allows in the trial's `run`; else the donor's own."""
    named = spec.scheduler.perturbed_axes
    perturbed = (
        spec.axes if named is None else [config.resolve_key(key, source="scheduler.perturbed_axes") for key in named]
    )
    for _ in range(_ATTEMPTS):
        candidate = dict(donor)
        for path in perturbed:
            candidate[path] = _perturbed(spec.axes[path], donor[path], spec.scheduler, generator)
        if not enumeration.is_excluded(spec, candidate):
            with contextlib.suppress(ConfigError):
                perturbed_run(spec, run, candidate)
                return candidate
    return dict(donor)


def perturbed_run(spec: StudySpec, run: Mapping[str, Any], settings: Mapping[str, Any]) -> RunConfig:
    """A run (as plain values) with perturbed settings; raises `ConfigError` where they break a rule."""
    return trials.with_settings(spec, run, settings, source="perturbed settings")


def _perturbed(axis: Axis, value: Any, scheduler: SchedulerSpec, generator: random.Random) -> Any:
    """A new draw, or a neighbour: the value listed (or a step) before or after, or 0.8 or 1.2 times the number."""
    if generator.random() < scheduler.resample_probability:
        return axis.draw(generator)
    if axis.is_choice or axis.step is not None:
        values = list(axis.finite or ())
        index = values.index(value) + generator.choice((-1, 1))
        return values[min(max(index, 0), len(values) - 1)]
    factor = generator.choice((0.8, 1.2))
    if axis.is_integer:
        step = max(1, abs(round(value * factor) - value))  # so that small numbers also change
        return int(min(max(value + (step if factor > 1 else -step), axis.low or 0), axis.high or 0))
    return axis.readable(value * factor)
