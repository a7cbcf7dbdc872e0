"""Results of earlier studies that a search begins with (`search.warm_start_from`).

A configuration of an earlier study counts if all its seeds finished, its settings are values of this study's axes, and
all else is the same: the settings of training, what the objectives measure, and the validation texts. Whatever is left
out is counted by its reason. `study.yaml` records what was used, so a resumed search needs the earlier study no more.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ebft_study import config, results, text
from ebft_study.analysis.comparison import fingerprints
from ebft_study.analysis.configuration import Configuration
from ebft_study.analysis.identity import different, identifying, identity
from ebft_study.analysis.summary import summarize
from ebft_study.errors import ConfigError
from ebft_study.results import METRICS
from ebft_study.storage import Location
from ebft_study.study.spec import enumeration, trials
from ebft_study.study.spec.axis import frozen
from ebft_study.study.spec.enumeration import Assignment
from ebft_study.study.spec.study_spec import EarlierPoint, EarlierStudy, StudySpec

_VALIDATION = ("validation_sequences", "evaluation_seed")
"""Settings that choose the validation texts and the random numbers of evaluations."""
_NAMED = 3


def warm_started(spec: StudySpec, storage: Location) -> StudySpec:
    """The study with what its search is told of earlier ones.

    Raises:
        EbftError: one of them does not exist, or nothing of it can be used.
    """
    earlier: list[EarlierStudy] = []
    for name in spec.search.warm_start_from:
        earlier.append(_read(spec, name, storage, {_key(point) for each in earlier for point in each.points}))
    return spec.model_copy(update={"warm_start": tuple(earlier)})


def check_files(spec: StudySpec, provenance: Mapping[str, object]) -> None:
    """Refuse earlier studies of other data or models under the same names, as far as fingerprints are recorded."""
    here = {kind: fingerprints({"provenance": provenance}, kind) for kind in ("data", "models")}
    for earlier in spec.warm_start:
        for kind, theirs in (("data", earlier.data), ("models", earlier.models)):
            for name in sorted(theirs.keys() & here[kind].keys()):
                if theirs[name] != here[kind][name]:
                    raise ConfigError(
                        f"{spec.study}: search.warm_start_from={earlier.study}: its {kind} {name!r} differ from those "
                        f"here (fingerprints {theirs[name][:12]} and {here[kind][name][:12]}), and so do its values. "
                        "Drop it"
                    )


def described(earlier: EarlierStudy) -> str:
    """`12 configurations of rates; 3 not used (2: steps differ; 1: seeds are missing)`."""
    used = f"{len(earlier.points)} configurations of {earlier.study}"
    return f"{used}; {_counted(earlier.not_used)}" if earlier.not_used else used


def _counted(not_used: Mapping[str, int]) -> str:
    reasons = "; ".join(f"{count}: {reason}" for reason, count in not_used.items())
    return f"{sum(not_used.values())} not used ({reasons})"


def _read(spec: StudySpec, name: str, storage: Location, told: set[str]) -> EarlierStudy:
    study = summarize(results.load(results.find_in(name, storage)))
    where = f"{spec.study}: search.warm_start_from={name}"
    scheduler = study.results.spec.get("scheduler")
    if isinstance(scheduler, Mapping) and scheduler.get("kind") == "pbt":
        raise ConfigError(f"{where}: is a population, whose trials change their settings on the way. Drop it")
    points, not_used = list[EarlierPoint](), Counter[str]()
    for configuration in study.configurations:
        point = _point(spec, configuration)
        if isinstance(point, EarlierPoint) and _key(point) in told:
            point = "the search was told before"
        if isinstance(point, str):
            not_used[point] += 1
        else:
            points.append(point)
    if not points:
        raise ConfigError(f"{where}: nothing of it can be used: {_counted(not_used)}. Drop it")
    content = json.dumps([point.model_dump(mode="json") for point in points], sort_keys=True)
    return EarlierStudy(
        study=name,
        sha256=hashlib.sha256(content.encode()).hexdigest(),
        data=fingerprints(study.results.spec, "data"),
        models=fingerprints(study.results.spec, "models"),
        points=tuple(points),
        not_used=dict(not_used.most_common()),
    )


def _key(point: EarlierPoint) -> str:
    return json.dumps([point.assignment, point.values], sort_keys=True, default=str)


def _point(spec: StudySpec, earlier: Configuration) -> EarlierPoint | str:
    """What the search is told of a configuration, or why it is not."""
    if not earlier.is_complete or earlier.is_left_out:
        return "seeds are missing"
    assignment = _on_axes(spec, earlier.settings)
    if isinstance(assignment, str):
        return f"{config.short_name(assignment)} is not on the axes"
    if enumeration.is_excluded(spec, assignment):
        return "the study excludes it"
    try:
        run = config.flatten(trials.build(spec, trials.on_axes(spec, assignment), seed=0))
    except ConfigError:
        return "it breaks a rule between settings"
    metrics = [objective.metric for objective in spec.objective.all]
    also = {*_VALIDATION, *(name for metric in metrics for name in METRICS[metric].map_of(run))} - {*identifying()}
    others = list(different(identity(run, also=also), identity(earlier.settings, also=also)))
    if others:
        more = [f"{len(others) - _NAMED} more"] if len(others) > _NAMED else []
        return f"{text.listed([*others[:_NAMED], *more])} differ{'s' if len(others) == 1 else ''}"
    values = tuple(earlier.validated(metric) for metric in metrics)
    if any(value != value for value in values):
        return f"it has no {' and '.join(metrics)} on the validation split"
    return EarlierPoint(configuration=earlier.name, assignment=assignment, values=values)


def _on_axes(spec: StudySpec, settings: Mapping[str, Any]) -> Assignment | str:
    """The values of this study's axes that give these settings, or the axis that has none."""
    assignment: Assignment = {}
    for key, axis in spec.axes.items():
        if not enumeration.exists(axis, assignment):
            continue
        if axis.choices is None:
            own: Sequence[Any] = axis.own(settings.get(config.short_name(key)))
        else:
            own = [name for name, inner in axis.choices.items() if _gives(inner, settings)][:1]
        if not own:
            return key
        assignment[key] = own[0]
    return assignment


def _gives(choice: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    ours = {config.short_name(path): value for path, value in choice.items()}
    return all(frozen(settings.get(name)) == frozen(value) for name, value in ours.items())
