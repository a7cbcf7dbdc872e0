"""Trials of a study, enumerated from its spec: pure functions, so that a resumed study finds the very same trials.

A *configuration* is one setting of everything but the seed; a *trial* is a configuration with a seed. Trials are
ordered seed by seed, baselines first, so that a study that ends early holds whole replicates.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ebft_study import config
from ebft_study.config import RunConfig
from ebft_study.study.spec import enumeration, links, promotion
from ebft_study.study.spec.study_spec import ResourcesSpec, StudySpec, paths

Settings = dict[str, Any]  # dotted path -> value
T = TypeVar("T")


@dataclass(frozen=True)
class Configuration:
    """Everything but the seed. `label` names it in tables; `baseline` is its name, None on the axes."""

    label: str
    settings: Settings
    baseline: str | None = None


@dataclass(frozen=True)
class Replicate:
    """A trial as schedulers compare it: one seed of a configuration."""

    trial_id: str
    configuration: str
    """Its label, by which all tables name it."""
    seed: int
    total_steps: int
    warm_start_steps: int = 0
    """Up to here its evaluations say nothing of the settings on the axes."""


@dataclass(frozen=True)
class Trial:
    """One configuration and seed. `trial_id` is the same in every session of the study."""

    trial_id: str
    configuration: Configuration
    seed: int
    run: RunConfig
    """Complete settings, validated."""
    resources: ResourcesSpec
    """The CPUs, GPUs and workers that it occupies."""

    @property
    def label(self) -> str:
        return f"{self.configuration.label} seed={self.seed}"

    @property
    def replicate(self) -> Replicate:
        """The trial as schedulers compare it."""
        run = self.run
        name, steps = self.configuration.label, run.total_steps
        return Replicate(self.trial_id, name, self.seed, steps, run.training.warm_start_steps)

    @property
    def unit(self) -> tuple[int, str, bool]:
        """For `shuffled`."""
        return self.seed, self.configuration.label, self.configuration.baseline is not None


def baselines(spec: StudySpec) -> list[Configuration]:
    return [Configuration(name, paths(settings), baseline=name) for name, settings in spec.baselines.items()]


def enumerated(spec: StudySpec) -> list[Configuration]:
    """All configurations of a grid or random search, baselines first; of an Optuna search only the baselines."""
    if spec.search.algorithm == "optuna" or (not spec.axes and spec.baselines):
        return baselines(spec)
    if spec.search.algorithm == "random":
        chosen = enumeration.draws(spec, spec.search.num_configurations or 0)
    else:
        chosen = enumeration.grid(spec)
    return [*baselines(spec), *(on_axes(spec, assignment) for assignment in chosen)]


def trials_of(spec: StudySpec, configurations: list[Configuration], source: str = "") -> list[Trial]:
    """Trials of `configurations` over all seeds, numbered in the order in which they run."""
    pairs = itertools.product(spec.seeds.all, configurations)
    return [trial(spec, configuration, seed, number, source) for number, (seed, configuration) in enumerate(pairs)]


def listed(spec: StudySpec, source: str = "") -> list[Trial]:
    """All trials that are known from the start. Those of an extended study keep the numbers that they began with."""
    if not spec.extended_from:
        return trials_of(spec, enumerated(spec), source)
    seen: dict[tuple[str, int], Trial] = {}
    for stage in (*(extent.applied(spec) for extent in spec.extended_from), spec):
        for seed, configuration in itertools.product(stage.seeds.all, enumerated(stage)):
            key = (_identity(configuration), seed)
            seen[key] = seen.get(key) or trial(spec, configuration, seed, len(seen), source)
    return list(seen.values())


def _identity(configuration: Configuration) -> str:
    return configuration.baseline or json.dumps(configuration.settings, sort_keys=True, default=str)


def known_labels(spec: StudySpec) -> list[str]:
    """The configurations that are tried first, by label."""
    return [on_axes(spec, assignment).label for assignment in enumeration.known(spec)]


def shuffled(
    listed: Sequence[T], study: str, unit: Callable[[T], tuple[int, str, bool]], *, first: Sequence[str] = ()
) -> list[T]:
    """Trials seed by seed, baselines first, configurations in an order that is random but always the same.

    The first trials that a scheduler sees have little to be compared with: that must not favour the first lines of a
    study file.

    Args:
        unit: a trial's seed, the label of its configuration, and whether that is a baseline.
        first: labels of configurations that come before the others, in this order.
    """
    seeds = {seed: position for position, seed in enumerate(dict.fromkeys(unit(trial)[0] for trial in listed))}

    def key(trial: T) -> tuple[int, bool, int, str]:
        seed, label, is_baseline = unit(trial)
        rank = first.index(label) if label in first else len(first)
        return seeds[seed], not is_baseline, rank, "" if is_baseline else draw(study, label)

    return sorted(listed, key=key)


def draw(*names: str) -> str:
    """A random number as hexadecimal digits, always the same for the same names."""
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def number_of_trials(spec: StudySpec) -> int:
    """Trials of the whole study that run, those that Optuna has yet to choose included."""
    if spec.seeds.promotes:
        on_axes = [each for each in enumerated(spec) if each.baseline is None]
        groups = promotion.rivals(on_axes, spec.objective.metric, lambda each: build(spec, each, seed=0))
        n_promoted = sum(promotion.number_of_trials(len(group), spec.seeds) for group in groups)
        return n_promoted + len(spec.seeds.all) * len(spec.baselines)
    chosen_later = spec.search.num_configurations or 0 if spec.search.algorithm == "optuna" else 0
    return len(spec.seeds.all) * (len(enumerated(spec)) + chosen_later)


def trial(spec: StudySpec, configuration: Configuration, seed: int, number: int, source: str = "") -> Trial:
    """Raises `ConfigError` naming `source` and the configuration where its settings break a rule."""
    trial_id = f"t{number:04d}"
    run = build(spec, configuration, seed=seed, name=trial_id, source=source)
    return Trial(trial_id, configuration, seed, run, spec.resources.for_run(run))


def build(
    spec: StudySpec, configuration: Configuration, *, seed: int, name: str = "trial", source: str = ""
) -> RunConfig:
    """The complete settings of a run; raises `ConfigError` naming the configuration that breaks a rule."""
    run = config.merge(config.with_paths({}, spec.defaults), {**spec.run, "seed": seed, "name": name})
    return with_settings(spec, run, configuration.settings, source=f"{source or spec.study}: {configuration.label}")


def with_settings(spec: StudySpec, run: Mapping[str, Any], settings: Mapping[str, Any], *, source: str) -> RunConfig:
    """A run (as plain values) with other settings and whatever is linked to them.

    Raises:
        ConfigError: they break a rule between settings.
    """
    content = config.with_paths(run, settings)
    return config.build_run(links.apply_links(spec.linked, content, given=settings, source=source), source=source)


def on_axes(spec: StudySpec, assignment: Settings) -> Configuration:
    """A configuration labelled by the values of its axes: `alpha=0.5 size=small`."""
    parts = (f"{config.short_name(key)}={format_value(value)}" for key, value in assignment.items())
    return Configuration(" ".join(parts) or "only", enumeration.settings(spec, assignment))


def format_value(value: Any) -> str:
    """A value as a label has it: 0.1, 1e-05, 0.25,0.5, tiny-1m."""
    if isinstance(value, list | tuple):
        return ",".join(map(format_value, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "null" if value is None else str(value)
