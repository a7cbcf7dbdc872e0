"""Reads a study file into a `ResolvedStudy`: applies profile and overrides, and checks everything before a run.

One file describes a study from laptop to cluster. A *profile* (`cpu`, `gpu`) changes model, sizes and resources,
never what is studied. `study.yaml` in the study's folder records the resulting `StudySpec`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ebft_study import config
from ebft_study.errors import ConfigError, one_line, refuse, rule_broken
from ebft_study.study.cluster.capacity import ClusterCapacity, this_machine
from ebft_study.study.cluster.requests import wants_gpus
from ebft_study.study.folder.study_yaml import StudySource
from ebft_study.study.resolving import checks, plugin_use
from ebft_study.study.resolving.resolved import ResolvedStudy
from ebft_study.study.spec import enumeration, normalize, trials
from ebft_study.study.spec.normalize import dump, normalized
from ebft_study.study.spec.study_spec import Profile, StudySpec, is_used, paths

_MOST_CORNERS = 256
SECTIONS = ("seeds", "scheduler", "stopping", "objective", "budget", "resources", "search")
"""Sections of a study file that overrides may change, besides the settings of runs."""


def load_study(
    study: Path | Mapping[str, Any],
    profile: str | None = None,
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
) -> ResolvedStudy:
    """The study in a file, or in a mapping of the same content, with a profile and `key=value` overrides applied.

    Raises:
        ConfigError: a rule is broken, in one line that says which, and what to do.
    """
    if isinstance(study, Mapping):
        written = _as_yaml(study)
        source = StudySource.from_content("study", written.encode(), profile)
        content = config.parse_yaml(written, source=source.name)
    else:
        content = config.read_yaml(study)
        source = StudySource.from_content(str(study), study.read_bytes(), profile)
    spec = plugin_use.with_metrics(with_overrides(read_study(content, source.name, profile), overrides))
    if name is not None:
        spec = config.parse(StudySpec, {**dump(spec), "study": name}, source="command line")
    resolved = resolve(spec, source, plugin_folder=plugin_use.folder_of(source.name))
    # Not in `resolve`: a study that another version has begun can still be resumed.
    on_axes = [trial.run for trial in resolved.examples if trial.configuration.baseline is None]
    checks.check_comparable(spec, on_axes, source.name)
    checks.check_promotion(resolved)
    return resolved


def resolve(
    spec: StudySpec,
    source: StudySource,
    capacity: ClusterCapacity | None = None,
    *,
    plugin_folder: str | None = None,
) -> ResolvedStudy:
    """Make a study's trials and check it as a whole; on this machine by default. Imports its plug-ins, if any.

    Raises:
        ConfigError: see `load_study`.
    """
    checks.check_search(spec, source.name)
    listed, candidates = trials.listed(spec, source.name), []
    if spec.search.algorithm == "optuna":
        first = (*enumeration.known(spec), *enumeration.corners(spec, _MOST_CORNERS))
        configurations = [trials.on_axes(spec, assignment) for assignment in first]
        candidates = [
            trials.trial(spec, chosen, spec.seeds.all[0], len(listed), source.name) for chosen in configurations
        ]
    capacity = capacity or this_machine(gpus=wants_gpus(spec.resources))
    study = ResolvedStudy(spec, source, tuple(listed), tuple(candidates), capacity, plugin_folder)
    plugin_use.load(spec, study.runs, source=source.name, folder=plugin_folder)
    checks.check(study)
    return study


def _as_yaml(study: Mapping[str, Any]) -> str:
    try:
        return yaml.safe_dump(dict(study), sort_keys=False)
    except yaml.YAMLError as error:
        raise ConfigError(f"study: holds what no study file can ({one_line(error)}). Use plain values") from None


def read_study(content: Mapping[str, Any], source: str, profile: str | None = None) -> StudySpec:
    """A study file's content with a profile applied, before it is checked as a whole."""
    spec = normalized(config.parse(StudySpec, dict(content), source=source), source)
    for key in {"first_name", "extended_from", "defaults", "warm_start"} & content.keys():
        raise ConfigError(f"{source}: {key}: is written by the study itself. Remove it from the study file")
    _check_keys(spec, source)
    spec = _with_profile(spec, profile, source)
    _check_keys(spec, source)
    refuse(normalize.axes_rules(spec.axes, spec.linked), source=source)
    return spec


def _check_keys(spec: StudySpec, source: str) -> None:
    fixed = paths(spec.run)
    taken = dict.fromkeys(normalize.always_set(spec.axes), "varied under axes")
    for path, where in {**dict.fromkeys(spec.linked, "follows others under linked"), **taken}.items():
        if path in fixed:
            key, rule = f"run.{config.short_name(path)}", f"is fixed here and {where}"
            raise rule_broken(source=source, key=key, given=fixed[path], rule=rule, remedy="Keep one of the two")
    for path, remedy in normalize.NEVER_AN_AXIS.items():
        for where, settings in {"run": spec.run, **spec.baselines}.items():
            if path in settings:
                raise ConfigError(f"{source}: {where}: {path}={settings[path]!r}: is set by the study. {remedy}")


def _with_profile(spec: StudySpec, profile: str | None, source: str) -> StudySpec:
    if profile is None and not spec.profiles:
        return spec
    if profile is None:
        raise ConfigError(f"{source}: profile: none was chosen. Add --profile {' or --profile '.join(spec.profiles)}")
    if profile not in spec.profiles:
        profiles = ", ".join(spec.profiles) or "none"
        raise ConfigError(f"{source}: profile={profile!r}: the file has no such profile. Known profiles: {profiles}")
    chosen = _nested_profile(spec, profile, source)
    sizes = {key: value for key, value in chosen.model_dump().items() if key != "choices"}
    merged = config.merge({**dump(spec), "scheduler": spec.scheduler.given()}, sizes)
    for axis, choices in chosen.choices.items():
        merged["axes"][axis] = config.merge(merged["axes"][axis], {"choices": choices})
    return normalized(config.parse(StudySpec, merged, source=f"{source}: profiles.{profile}"), source)


def _profile_choices(spec: StudySpec, chosen: Profile, where: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The settings of choices in a profile; the choices themselves are part of the study."""
    nested = {}
    for axis, choices in chosen.choices.items():
        there = spec.axes[axis].choices if axis in spec.axes else None
        if there is None:
            axes_of_choices = ", ".join(name for name, a in spec.axes.items() if a.choices is not None) or "none"
            raise ConfigError(f"{where}: choices.{axis}: is no axis of choices. The study's are: {axes_of_choices}")
        for choice in choices:
            if choice not in there:
                raise ConfigError(f"{where}: choices.{axis}.{choice}: is no choice of it. It has: {', '.join(there)}")
        nested[axis] = {
            choice: normalize.choice_settings(settings, f"{where}: choices.{axis}.{choice}")
            for choice, settings in choices.items()
        }
    return nested


def _nested_profile(spec: StudySpec, name: str, source: str) -> Profile:
    """A profile with its settings nested by section; refuses one that changes what is studied."""
    where, chosen = f"{source}: profiles.{name}", spec.profiles[name]
    baselines = {}
    for baseline, settings in chosen.baselines.items():
        if baseline not in spec.baselines:
            baselines_of_study = ", ".join(spec.baselines) or "none"
            raise ConfigError(
                f"{where}: baselines.{baseline}: is no baseline of this study. Its baselines: {baselines_of_study}"
            )
        baselines[baseline] = config.nest(settings, source=f"{where}.baselines.{baseline}")
    run = config.nest(chosen.run, source=f"{where}.run")
    rule = "a profile changes model, sizes and resources"
    for path in paths(run):
        _refuse_studied(spec, path, where, rule)
    for path in {path for settings in baselines.values() for path in paths(settings)}:
        # No axis varies a baseline, so its own settings may differ from machine to machine.
        _refuse_studied(spec.model_copy(update={"axes": {}}), path, where, rule)
    choices = _profile_choices(spec, chosen, where)
    return chosen.model_copy(update={"run": run, "baselines": baselines, "choices": choices})


def with_overrides(spec: StudySpec, overrides: Sequence[str]) -> StudySpec:
    """The study with `key=value` laid over its fixed run settings, and over its sections: `budget.max_hours=2`."""
    of_sections = [item for item in overrides if section_of(item)]
    of_run = [item.removeprefix("run.") for item in overrides if not section_of(item)]
    return with_settings(with_sections(spec, of_sections), of_run)


def section_of(override: str) -> str:
    """The section of a study file that an override changes; '' for the settings of a run."""
    name = override.partition("=")[0].partition(".")[0].strip()
    return name if name in SECTIONS else ""


def with_settings(spec: StudySpec, overrides: Sequence[str]) -> StudySpec:
    """The study with `key=value` laid over its fixed run settings."""
    changes = {config.resolve_key(key): value for key, value in map(config.parse_override, overrides)}
    for path in changes:
        _refuse_studied(spec, path, "command line", "an override changes what is fixed")
    return spec.model_copy(update={"run": config.with_paths(spec.run, changes)})


def with_sections(spec: StudySpec, overrides: Sequence[str]) -> StudySpec:
    """The study with `section.key=value` laid over it; another scheduler keeps the settings that it uses."""
    changes: dict[str, Any] = {}
    for item in overrides:
        changes = config.merge(changes, _nested_override(item))
    if not changes:
        return spec
    if "objective" in changes and spec.objective.further:
        rule, remedy = "the file has several objectives, of which this names none", "Change the objective in the file"
        raise rule_broken(source="command line", key="objective", given=overrides, rule=rule, remedy=remedy)
    kind = changes.get("scheduler", {}).get("kind", spec.scheduler.kind)
    kept = {k: v for k, v in spec.scheduler.given().items() if is_used(k, kind)}
    before = {**dump(spec), "scheduler": kept, "stopping": spec.stopping.model_dump(exclude_none=True)}
    return normalized(config.parse(StudySpec, config.merge(before, changes), source="command line"), "command line")


def _nested_override(item: str) -> dict[str, Any]:
    """`stopping.divergence.margin=0.1` -> {stopping: {divergence: {margin: 0.1}}}."""
    key, value = config.parse_override(item)
    section, *path = key.split(".")
    if not path and section != "seeds":
        raise ConfigError(f"command line: {item!r}: {section} is a section. Write {section}.key=value")
    for part in reversed(path):
        value = {part: value}
    return {section: value}


def _refuse_studied(spec: StudySpec, path: str, source: str, rule: str) -> None:
    """Profiles and overrides do not change the axes, links and method of a study."""
    if any(path in normalize.settings_of(name, axis) for name, axis in spec.axes.items()):
        what = "an axis of the study"
    elif path in spec.linked:
        what = "linked to others"
    elif path in ("method", *normalize.NEVER_AN_AXIS):
        what = "part of what is studied"
    else:
        return
    raise ConfigError(f"{source}: {path}: {rule}, and this is {what}. Edit the study file itself")
