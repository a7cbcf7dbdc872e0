"""From a study's spec to its trials: pure functions, so that a resumed study finds the very same trials.

A *configuration* is one setting of everything but the seed; a *trial* is a configuration with a seed. Trials are
ordered seed by seed, baselines first, so that a study that ends early holds whole replicates.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ebft_study import config
from ebft_study.config import RunConfig
from ebft_study.study.spec import Axis, StudySpec, paths

Settings = dict[str, Any]  # dotted path -> value
_DIGITS = 6  # of drawn values: enough to search, short enough to read


@dataclass(frozen=True)
class Configuration:
    """Everything but the seed. `label` names it in tables; `baseline` is its name, None on the axes."""

    label: str
    settings: Settings
    baseline: str | None = None


@dataclass(frozen=True)
class Trial:
    """One configuration and seed. `trial_id` is the same in every session of the study."""

    trial_id: str
    configuration: Configuration
    seed: int
    run: RunConfig

    @property
    def label(self) -> str:
        return f"{self.configuration.label} seed={self.seed}"


def baselines(spec: StudySpec) -> list[Configuration]:
    return [Configuration(name, paths(settings), baseline=name) for name, settings in spec.baselines.items()]


def enumerated(spec: StudySpec) -> list[Configuration]:
    """All configurations of a grid or random search, baselines first; of an Optuna search only the baselines."""
    chosen: dict[str, Any] = {"grid": _grid, "random": _random, "optuna": lambda _: []}
    return [*baselines(spec), *map(on_axes, chosen[spec.search.algorithm](spec))]


def trials_of(spec: StudySpec, configurations: list[Configuration]) -> list[Trial]:
    """Trials of `configurations` over all seeds, numbered in the order in which they run."""
    pairs = itertools.product(spec.seeds, configurations)
    return [trial(spec, configuration, seed, number) for number, (seed, configuration) in enumerate(pairs)]


def listed(spec: StudySpec) -> list[Trial]:
    """All trials that are known from the start. Those of a study that has grown keep the numbers they began with."""
    if not spec.grown_from:
        return trials_of(spec, enumerated(spec))
    seen: dict[tuple[str, int], Trial] = {}
    for stage in (*(extent.applied(spec) for extent in spec.grown_from), spec):
        for seed, configuration in itertools.product(stage.seeds, enumerated(stage)):
            key = (_identity(configuration), seed)
            seen[key] = seen.get(key) or trial(spec, configuration, seed, len(seen))
    return list(seen.values())


def _identity(configuration: Configuration) -> str:
    return configuration.baseline or json.dumps(configuration.settings, sort_keys=True, default=str)


def number_of_trials(spec: StudySpec) -> int:
    """Trials of the whole study, those that Optuna has yet to choose included."""
    chosen_later = spec.search.num_configurations or 0 if spec.search.algorithm == "optuna" else 0
    return len(spec.seeds) * (len(enumerated(spec)) + chosen_later)


def trial(spec: StudySpec, configuration: Configuration, seed: int, number: int) -> Trial:
    trial_id = f"t{number:04d}"
    return Trial(trial_id, configuration, seed, build(spec, configuration, seed=seed, name=trial_id))


def build(
    spec: StudySpec, configuration: Configuration, *, seed: int, name: str = "trial", source: str = ""
) -> RunConfig:
    """The complete settings of a run; raises `ConfigError` naming the configuration that breaks a rule."""
    settings = config.merge(spec.run, {"seed": seed, "name": name})
    for path, value in configuration.settings.items():
        change: dict[str, Any] = {}
        config.set_path(change, path, value)
        settings = config.merge(settings, change)
    where = f"{source or spec.study}: {configuration.label}"
    return config.build_run(settings, source=where)


def on_axes(settings: Settings) -> Configuration:
    """A configuration labelled by its settings: `alpha=0.5 gamma=0.1`."""
    parts = (f"{config.short_name(path)}={spell(value)}" for path, value in settings.items())
    return Configuration(" ".join(parts) or "only", dict(settings))


def spell(value: Any) -> str:
    """A value as people write it: 0.1, 1e-05, 0.25,0.5, tiny-1m."""
    if isinstance(value, list | tuple):
        return ",".join(map(spell, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "null" if value is None else str(value)


def _grid(spec: StudySpec) -> list[Settings]:
    """Every combination, the last axis varying fastest."""
    if not spec.axes:
        return [] if spec.baselines else [{}]
    combinations = itertools.product(*(axis.values or () for axis in spec.axes.values()))
    return [dict(zip(spec.axes, values, strict=True)) for values in combinations]


def _random(spec: StudySpec) -> list[Settings]:
    """`num_configurations` different draws; the first k of them do not depend on how many follow."""
    generator = random.Random(spec.search.search_seed)
    drawn: list[Settings] = []
    while len(drawn) < (spec.search.num_configurations or 0):
        settings = {path: _draw(axis, generator) for path, axis in spec.axes.items()}
        if settings not in drawn:
            drawn.append(settings)
    return drawn


def _draw(axis: Axis, generator: random.Random) -> Any:
    if axis.is_choice:
        return generator.choice(axis.values or ())
    low, high = float(axis.low or 0.0), float(axis.high or 0.0)
    if axis.distribution == "integer":
        return generator.randint(int(low), int(high))
    if axis.distribution == "uniform":
        return rounded(generator.uniform(low, high), low, high)
    return rounded(math.exp(generator.uniform(math.log(low), math.log(high))), low, high)


def rounded(value: float, low: float, high: float) -> float:
    """`value` to a readable number of digits, still within its range."""
    return min(max(float(f"{value:.{_DIGITS}g}"), low), high)


def number_of_choices(axes: Mapping[str, Axis]) -> float:
    """How many different configurations the axes hold; infinite with a continuous distribution."""
    return math.prod(_size(axis) for axis in axes.values())


def _size(axis: Axis) -> float:
    if axis.is_choice:
        return len(axis.values or ())
    if axis.distribution == "integer":
        return (axis.high or 0) - (axis.low or 0) + 1
    return math.inf
