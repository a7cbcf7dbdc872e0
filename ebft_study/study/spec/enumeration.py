"""Enumeration of configurations from axes: every combination, random draws, and exclusions.

An *assignment* is the value of every axis that exists in it. Axes are looked at in the order of the study file, so that
an axis with a condition comes after those that decide whether it exists.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ebft_study.errors import ConfigError
from ebft_study.study.spec.axis import Axis, frozen
from ebft_study.study.spec.study_spec import StudySpec

Assignment = dict[str, Any]  # axis -> value; a choice by its name
MOST_CONFIGURATIONS = 100_000
_NOWHERE: Mapping[str, Any] = {}
_TRIES = 1000  # draws in a row that bring nothing new


def exists(axis: Axis, assignment: Mapping[str, Any]) -> bool:
    """Whether the condition of an axis holds; an axis without a value fulfils none."""
    return all(key in assignment and assignment[key] in values for key, values in axis.when.items())


def is_excluded(spec: StudySpec, assignment: Mapping[str, Any]) -> bool:
    """Whether one of the exclusions matches in all that it names."""
    return any(
        all(key in assignment and assignment[key] in values for key, values in exclusion.items())
        for exclusion in spec.exclude
    )


def grid(spec: StudySpec) -> list[Assignment]:
    """Every combination of finitely many values once, the last axis varying fastest; a study without axes has one."""
    configurations = list(
        itertools.islice(_combinations(spec, lambda axis: axis.finite or ()), MOST_CONFIGURATIONS + 1)
    )
    if len(configurations) > MOST_CONFIGURATIONS:
        raise ConfigError(
            f"{spec.study}: axes: a grid holds more than {MOST_CONFIGURATIONS} configurations. "
            "List fewer values, or use search.algorithm: random"
        )
    return configurations


def corners(spec: StudySpec, most: int) -> Iterator[Assignment]:
    """Combinations of all choices and of both ends of ranges."""
    return itertools.islice(_combinations(spec, lambda axis: axis.extremes()), most)


def is_empty(spec: StudySpec) -> bool:
    """Whether nothing is left to run; exclusions look at finite axes only, so any value does for a continuous range."""
    return next(_combinations(spec, lambda axis: axis.extremes() if axis.finite is None else axis.finite), None) is None


def known(spec: StudySpec) -> list[Assignment]:
    """The known points, different ones, with random values for the axes that they do not name."""
    points: list[Assignment] = []
    for index, point in enumerate(spec.search.known):
        generator = random.Random(f"{spec.search.search_seed}-known-{index}")
        assignment = another(spec, generator, lambda found: _key(found) not in map(_key, points), point)
        if assignment is None:
            raise ConfigError(f"{spec.study}: search.known.{index}: is excluded, or a point above again. Drop it")
        points.append(assignment)
    return points


def draws(spec: StudySpec, number: int) -> list[Assignment]:
    """`number` different assignments, known points first; the first k of them do not depend on how many follow.

    Fewer where the axes hold no more.
    """
    generator = random.Random(spec.search.search_seed)
    drawn = known(spec)
    seen = set(map(_key, drawn))
    while len(drawn) < number:
        assignment = another(spec, generator, lambda found: _key(found) not in seen)
        if assignment is None:
            break
        seen.add(_key(assignment))
        drawn.append(assignment)
    return drawn


def another(
    spec: StudySpec,
    generator: random.Random,
    wanted: Callable[[Assignment], bool] = lambda _: True,
    point: Mapping[str, Any] = _NOWHERE,
) -> Assignment | None:
    """A random draw that is wanted and not excluded; None where there is none, or none among very many.

    Args:
        point: the values of some axes, which are not drawn.
    """
    for _ in range(_TRIES):
        assignment = _draw(spec, generator, point)
        if not is_excluded(spec, assignment) and wanted(assignment):
            return assignment
    if not math.isfinite(_most(spec)) or _most(spec) > MOST_CONFIGURATIONS:
        return None
    left = [each for each in grid(spec) if wanted(each) and point.items() <= each.items()]
    return generator.choice(left) if left else None


def number_of_choices(spec: StudySpec) -> float:
    """Different configurations that the axes hold, or more where they are too many to count."""
    most = _most(spec)
    return len(grid(spec)) if most <= MOST_CONFIGURATIONS else most


def settings(spec: StudySpec, assignment: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted path -> value of the settings that an assignment sets."""
    chosen: dict[str, Any] = {}
    for key, value in assignment.items():
        choices = spec.axes[key].choices
        chosen |= {key: value} if choices is None else choices[value]
    return chosen


def _most(spec: StudySpec) -> float:
    return math.prod(math.inf if axis.finite is None else len(axis.finite) for axis in spec.axes.values())


def _draw(spec: StudySpec, generator: random.Random, point: Mapping[str, Any]) -> Assignment:
    assignment: Assignment = {}
    for key, axis in spec.axes.items():
        if exists(axis, assignment):
            assignment[key] = point[key] if key in point else axis.draw(generator)
    return assignment


def _key(assignment: Assignment) -> Any:
    return frozen(list(assignment.items()))


def _combinations(spec: StudySpec, values: Callable[[Axis], Sequence[Any]]) -> Iterator[Assignment]:
    """Depth first, so that what an exclusion names is left out without looking at what follows."""

    def rest(axes: Sequence[tuple[str, Axis]], assignment: Assignment) -> Iterable[Assignment]:
        if not axes:
            yield assignment
            return
        (key, axis), later = axes[0], axes[1:]
        if not exists(axis, assignment):
            yield from rest(later, assignment)
            return
        for value in values(axis):
            longer = {**assignment, key: value}
            if not is_excluded(spec, longer):
                yield from rest(later, longer)

    yield from rest(list(spec.axes.items()), {})
