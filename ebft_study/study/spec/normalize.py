"""The normal form of a study file: settings by section, axes, links and exclusions by dotted paths, numbers as numbers.

Also the rules that hold between axes and links, which no profile changes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ebft_study import config
from ebft_study.config import RunConfig
from ebft_study.errors import Broken, ConfigError, rule_broken
from ebft_study.study.spec import links
from ebft_study.study.spec.axis import Axis
from ebft_study.study.spec.links import Link
from ebft_study.study.spec.study_spec import StudySpec, paths

# Identity of a run rather than a setting to study; seeds have their own key.
NEVER_AN_AXIS = {"name": "Each trial is named by its identifier", "seed": "List the seeds under 'seeds'"}


def axes(axes_of_file: Mapping[str, Axis], source: str) -> dict[str, Axis]:
    """Axes of a setting under its dotted path, axes of choices under their own name."""
    normalized_axes: dict[str, Axis] = {}
    for key, axis in axes_of_file.items():
        name = _own_name(key, source) if axis.choices is not None else config.resolve_key(key, source=f"{source}: axes")
        if name in normalized_axes:
            raise rule_broken(source=source, key="axes", given=key, rule="is listed twice", remedy="Keep one")
        if name in NEVER_AN_AXIS:
            raise ConfigError(f"{source}: axes.{name}: cannot be an axis. {NEVER_AN_AXIS[name]}")
        choices = axis.choices and {
            choice: choice_settings(settings, f"{source}: axes.{key}.{choice}")
            for choice, settings in axis.choices.items()
        }
        values = None if axis.values is None else _numbers(name, axis.values)
        when = {
            (other := _earlier(normalized_axes, parent, f"{source}: axes.{key}.when")): _values_of(
                normalized_axes[other], other, values_there, f"{source}: axes.{key}.when.{parent}"
            )
            for parent, values_there in axis.when.items()
        }
        normalized_axes[name] = axis.model_copy(update={"values": values, "choices": choices, "when": when})
    return normalized_axes


def choice_settings(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Settings of a choice, as dotted path -> value."""
    by_path = paths(config.nest(dict(settings), source=source))
    for path, remedy in NEVER_AN_AXIS.items():
        if path in by_path:
            raise ConfigError(f"{source}: {path}: cannot be part of an axis. {remedy}")
    return by_path


def exclusions(
    excluded: tuple[dict[str, tuple[Any, ...]], ...], axes: Mapping[str, Axis], source: str
) -> tuple[dict[str, tuple[Any, ...]], ...]:
    """Exclusions over the names and values of axes."""
    on_axes = []
    for index, exclusion in enumerate(excluded):
        where = f"{source}: exclude.{index}"
        named = {key: axis_of(axes, key) for key in exclusion}
        for key, name in named.items():
            if name is None:
                there = ", ".join(map(config.short_name, axes)) or "none"
                raise ConfigError(f"{where}: {key}: is no axis of this study. Its axes: {there}")
        on_axes.append(
            {
                name: _values_of(axes[name], name, exclusion[key], f"{where}.{key}")
                for key, name in named.items()
                if name is not None
            }
        )
    return tuple(on_axes)


def known(points: tuple[dict[str, Any], ...], axes: Mapping[str, Axis], source: str) -> tuple[dict[str, Any], ...]:
    """Known points over the names and values of axes, in the order of the axes."""
    on_axes = []
    for index, point in enumerate(points):
        where, given = f"{source}: search.known.{index}", {axis_of(axes, key) or key: key for key in point}
        for name, key in given.items():
            if name not in axes:
                there = ", ".join(map(config.short_name, axes)) or "none"
                raise ConfigError(f"{where}: {key}: is no axis of this study. Its axes: {there}")
        assignment: dict[str, Any] = {}
        for name in (name for name in axes if name in given):
            assignment[name] = _known_value(axes[name], name, point[given[name]], assignment, where)
        on_axes.append(assignment)
    return tuple(on_axes)


def _known_value(axis: Axis, name: str, value: Any, assignment: Mapping[str, Any], where: str) -> Any:
    """An axis' own value of a known point, which also names what the axis depends on."""
    key, (value,) = config.short_name(name), (value,) if axis.choices is not None else _numbers(name, (value,))
    for parent, allowed in axis.when.items():
        if parent not in assignment or assignment[parent] not in allowed:
            values = " or ".join(map(str, allowed))
            rule = f"this axis exists with {config.short_name(parent)}={values} only"
            raise rule_broken(source=where, key=key, given=value, rule=rule, remedy="Name both, or drop it")
    own = axis.own(value)
    if not own:
        rule, remedy = "is no value of this axis", f"The nearest is {axis.nearest(value)}"
        raise rule_broken(source=where, key=key, given=value, rule=rule, remedy=remedy)
    return own[0]


def linked(links_of_file: Mapping[str, Link], source: str) -> dict[str, Link]:
    """Links under dotted paths, each after those that it is computed from."""
    by_path: dict[str, Link] = {}
    for key, link in links_of_file.items():
        path = config.resolve_key(key, source=f"{source}: linked")
        if path in NEVER_AN_AXIS:
            raise ConfigError(f"{source}: linked.{path}: cannot follow a setting. {NEVER_AN_AXIS[path]}")
        by_path[path] = link.resolved(f"{source}: linked.{key}")
    return links.in_order(by_path, source)


def axis_of(axes: Mapping[str, Axis], key: str) -> str | None:
    """The axis that people call `key`: by its path, its short name, or the name of its choices."""
    return key if key in axes else next((path for path in axes if config.short_name(path) == key), None)


def settings_of(name: str, axis: Axis, values: Collection[Any] | None = None) -> set[str]:
    """Dotted paths of all that an axis may set, at some of its values."""
    if axis.choices is None:
        return {name}
    return {path for choice, sets in axis.choices.items() if values is None or choice in values for path in sets}


def always_set(axes: Mapping[str, Axis]) -> set[str]:
    """Dotted paths that have a value from the axes in every configuration."""
    settings: set[str] = set()
    for name, axis in axes.items():
        if not axis.when:
            settings |= settings_of(name, axis).intersection(*map(set, (axis.choices or {name: {name: 0}}).values()))
    return settings


def axes_rules(axes: Mapping[str, Axis], linked: Mapping[str, Link]) -> Iterator[Broken]:
    """Yield settings that are given twice, and choices that do not differ."""
    for index, (name, axis) in enumerate(axes.items()):
        key = f"axes.{config.short_name(name)}"
        yield from _choice_rules(name, axis, axes)
        for other in list(axes)[:index]:
            both = settings_of(name, axis) & settings_of(other, axes[other], axis.when.get(other))
            if both and not _exclude_each_other(axis, axes[other]):
                remedy = "Keep one, or give both a 'when' that never holds for both"
                yield key, sorted(both)[0], f"is also set by axes.{config.short_name(other)}", remedy
        for path in settings_of(name, axis) & set(linked):
            rule = "follows other settings here and is varied under axes"
            yield f"linked.{config.short_name(path)}", config.short_name(name), rule, "Keep one of the two"


def _choice_rules(name: str, axis: Axis, axes: Mapping[str, Axis]) -> Iterator[Broken]:
    """Choices differ, by their settings or by the axes that exist only with one of them."""
    if axis.choices is None or any(name in other.when for other in axes.values()):
        return
    paths_of_axis = sorted(settings_of(name, axis))
    seen: dict[str, str] = {}
    for choice, settings in axis.choices.items():
        same = seen.setdefault(repr([settings.get(path, _NOTHING) for path in paths_of_axis]), choice)
        if same != choice:
            remedy = f"Give each its settings, here or under choices.{name} of the profile"
            yield f"axes.{name}", [same, choice], "have the same settings", remedy


_NOTHING = object()


def _exclude_each_other(one: Axis, other: Axis) -> bool:
    return any(
        not set(map(repr, one.when[key])) & set(map(repr, other.when.get(key, ())))
        for key in one.when
        if key in other.when
    )


def _own_name(key: str, source: str) -> str:
    if key in config.all_keys() or key in config.short_names() or key in RunConfig.model_fields:
        remedy = "Give the axis a name of its own, or list values of this setting alone"
        raise rule_broken(source=source, key="axes", given=key, rule="is a setting, but has choices", remedy=remedy)
    if not key.replace("_", "").replace("-", "").isalnum():
        remedy = "Use letters, digits, '-' and '_'"
        raise rule_broken(source=source, key="axes", given=key, rule="is not a name", remedy=remedy)
    return key


def _earlier(axes: Mapping[str, Axis], parent: str, source: str) -> str:
    name = axis_of(axes, parent)
    if name is None:
        above = ", ".join(map(config.short_name, axes)) or "none"
        raise ConfigError(f"{source}: {parent}: is no axis above this one. List it first; those above are: {above}")
    return name


def _values_of(axis: Axis, name: str, values: tuple[Any, ...], source: str) -> tuple[Any, ...]:
    """Some of an axis' own values, by which conditions and exclusions recognise it."""
    there = axis.finite
    if there is None:
        raise ConfigError(
            f"{source}: {config.short_name(name)} is drawn from a continuous range, where no value comes twice. "
            "Give it a step, or list its values"
        )
    wanted = tuple(map(str, values)) if axis.choices is not None else _numbers(name, values)
    for value in wanted:
        if value not in there:
            key, remedy = config.short_name(name), f"Use some of {', '.join(map(str, there[:12]))}"
            raise rule_broken(source=source, key=key, given=value, rule="is no value of this axis", remedy=remedy)
    return wanted


def _numbers(path: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(paths(config.nest({path: value}, source=path)).get(path, value) for value in values)


def from_record(content: Mapping[str, Any], *, source: str) -> StudySpec:
    """The spec that a study's own study.yaml records, which holds further keys."""
    fields = {key: value for key, value in content.items() if key in StudySpec.model_fields}
    if "grown_from" in content:  # the name in versions before 0.2
        fields["extended_from"] = content["grown_from"]
    recorded = content.get("defaults", {})
    if not isinstance(recorded, Mapping):
        raise ConfigError(f"{source}: defaults={recorded!r}: is not a mapping. Restore it")
    fields["defaults"] = {**config.EARLIER_DEFAULTS, **recorded}
    return normalized(config.parse(StudySpec, fields, source=source), source)


def dump(spec: StudySpec) -> dict[str, Any]:
    """The spec as plain values, as it is written to study.yaml."""
    unused = {name for name in ("first_name", "extended_from", "warm_start") if not getattr(spec, name)}
    return spec.model_dump(mode="json", exclude={"profiles", *unused})


def normalized(spec: StudySpec, source: str) -> StudySpec:
    """Run settings nested by section, axes under their dotted paths, numbers as numbers."""
    named = axes(spec.axes, source)
    return spec.model_copy(
        update={
            "run": config.nest(spec.run, source=f"{source}: run"),
            "axes": named,
            "linked": linked(spec.linked, source),
            "exclude": exclusions(spec.exclude, named, source),
            "search": spec.search.model_copy(update={"known": known(spec.search.known, named, source)}),
            "baselines": {
                name: config.nest(settings, source=f"{source}: baselines.{name}")
                for name, settings in spec.baselines.items()
            },
            "resources": spec.resources.model_copy(update={"by": _by_short_name(spec, source)}),
        }
    )


def _by_short_name(spec: StudySpec, source: str) -> dict[str, Any]:
    where = f"{source}: resources.by"
    return {config.short_name(config.resolve_key(key, source=where)): of for key, of in spec.resources.by.items()}
