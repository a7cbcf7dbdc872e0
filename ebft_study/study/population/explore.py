"""What population-based training may change, and how: pure functions of settings, without Ray."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from ebft_study import config
from ebft_study.config import RunConfig
from ebft_study.errors import ConfigError
from ebft_study.study.spec import enumeration, links
from ebft_study.study.spec.axis import Axis
from ebft_study.study.spec.study_spec import SchedulerSpec, StudySpec

FACTORS = (0.8, 1.2)
_ATTEMPTS = 50  # to find settings that break no rule


def perturbed_axes(spec: StudySpec) -> tuple[str, ...]:
    """Dotted paths of the axes that are perturbed; the others are taken over from the donor as they are."""
    named = spec.scheduler.perturbed_axes
    if named is None:
        return tuple(spec.axes)
    return tuple(config.resolve_key(key, source="scheduler.perturbed_axes") for key in named)


def explore(
    spec: StudySpec, run: Mapping[str, Any], donor: Mapping[str, Any], generator: random.Random
) -> dict[str, Any]:
    """Settings near the donor's, of its axes, that the study allows in the trial's `run`; else the donor's own."""
    for _ in range(_ATTEMPTS):
        candidate = dict(donor)
        for path in perturbed_axes(spec):
            candidate[path] = _perturbed(spec.axes[path], donor[path], spec.scheduler, generator)
        if not enumeration.is_excluded(spec, candidate) and _is_sound(spec, run, candidate):
            return candidate
    return dict(donor)


def _is_sound(spec: StudySpec, run: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    try:
        applied(spec, run, settings)
    except ConfigError:
        return False
    return True


def applied(spec: StudySpec, run: Mapping[str, Any], settings: Mapping[str, Any]) -> RunConfig:
    """A run (as plain values) with other settings and whatever follows them.

    Raises:
        ConfigError: they break a rule between settings.
    """
    content = dict(run)
    for path, value in settings.items():
        change: dict[str, Any] = {}
        config.set_path(change, path, value)
        content = config.merge(content, change)
    where = "perturbed settings"
    return config.build_run(links.apply_links(spec.linked, content, given=settings, source=where), source=where)


def _perturbed(axis: Axis, value: Any, scheduler: SchedulerSpec, generator: random.Random) -> Any:
    """Drawn anew, or a neighbour: the value listed (or a step) before or after, or 0.8 or 1.2 times the number."""
    if generator.random() < scheduler.resample_probability:
        return axis.draw(generator)
    if axis.is_choice or axis.step is not None:
        values = list(axis.finite or ())
        place = values.index(value) + generator.choice((-1, 1))
        return values[min(max(place, 0), len(values) - 1)]
    factor = generator.choice(FACTORS)
    if axis.is_integer:
        step = max(1, abs(round(value * factor) - value))  # small numbers move too
        return int(min(max(value + (step if factor > 1 else -step), axis.low or 0), axis.high or 0))
    return axis.readable(value * factor)


# --- rules -----------------------------------------------------------------------------------------------------
