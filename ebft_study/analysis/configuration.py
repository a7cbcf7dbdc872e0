"""A configuration of a study: all trials of one setting, with their values by seed.

A configuration is its seeds: it is complete when it has a finished trial for every seed of the study.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from ebft_study.analysis.settings import Objective
from ebft_study.analysis.statistics import Interval, mean_interval, paired_difference
from ebft_study.results import METRICS, SKIPPED
from ebft_study.results.metrics import TEXT

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
HELDOUT = "heldout"
DEFAULT_OBJECTIVE: Objective = ("cfm_loss", "min")
"""Objective where study.yaml records none."""
BySeed = dict[int, float]
Map = tuple[tuple[str, Any], ...]
"""Names and values of settings that define what a metric measures."""
OF_BASE = ("model", *TEXT)
"""Settings that change the base model's own cross-entropy."""
Values = dict[tuple[str, int | None], BySeed]
"""(metric, position) -> seed -> value; ("cfm_loss", None) is the value at the completion length of comparisons."""


@dataclass(frozen=True)
class Configuration:
    """All trials of one setting, with their held-out values.

    `final` are those after training, `base` those of the base model, and `start` those where the method began: at the
    end of the warm start, or else the base model. `validation` and `validation_start` are values of the validation
    split by metric, the last ones of finished trials, and those where the method began.
    """

    name: str
    label: str
    baseline: str | None
    settings: dict[str, Any]
    trials: pd.DataFrame
    final: Values = field(repr=False)
    base: Values = field(repr=False)
    start: Values = field(repr=False)
    validation: dict[str, BySeed] = field(repr=False)
    validation_start: dict[str, BySeed] = field(repr=False)
    n_seeds: int
    """Number of seeds that the study has."""
    objective: Objective = DEFAULT_OBJECTIVE
    """The study's first objective."""
    unread: frozenset[str] = frozenset()
    """Settings and axes that the method does not read, and axes whose condition (`when`) does not hold."""
    promoted_by: frozenset[int] = frozenset()
    """Seeds by which it was promoted before others: luck at them is part of the choice, on every split."""

    @property
    def is_sft(self) -> bool:
        return self.settings.get("method") == "sft"

    @functools.cached_property
    def finished(self) -> pd.DataFrame:
        """The finished trials."""
        done = self.trials["status"] == "finished"
        return self.trials if done.all() else self.trials[done]  # a frame of many columns takes long to cut

    @property
    def n_finished(self) -> int:
        return len(self.finished)

    @functools.cached_property
    def finished_seeds(self) -> frozenset[int]:
        return frozenset(int(seed) for seed in self.finished["seed"].dropna())

    @property
    def is_complete(self) -> bool:
        """Whether every seed of the study has a finished trial."""
        return len(self.finished_seeds) >= self.n_seeds

    @functools.cached_property
    def first_skipped_seed(self) -> int | None:
        """The first seed that it did not get because others were promoted."""
        seeds = self.trials.loc[self.trials["status"] == SKIPPED, "seed"].dropna()
        return int(seeds.min()) if len(seeds) else None

    @property
    def is_left_out(self) -> bool:
        """Whether others were promoted to more seeds before it."""
        return self.first_skipped_seed is not None and not self.is_complete

    @property
    def scoring_seeds(self) -> frozenset[int]:
        """Seeds with a finished trial that no promotion has looked at."""
        return self.finished_seeds - self.promoted_by

    @property
    def is_scored(self) -> bool:
        """Whether claims may be about it: no promotion left it out, and some seed came after those by which it did."""
        return bool(self.scoring_seeds) or not self.promoted_by

    @property
    def is_measured(self) -> bool:
        """Whether a finished trial has held-out values."""
        return bool(self.n_finished and self.final)

    @property
    def warm_start_steps(self) -> int:
        return int(self.settings.get("warm_start_steps") or 0)

    @property
    def sequences_seen(self) -> float:
        """Training sequences of a finished trial; NaN when unknown."""
        done = self.finished
        return float(done["sequences_seen"].fillna(done["steps_done"] * done["batch_size"]).median())

    def validated(self, metric: str | None = None) -> float:
        """Mean validation value after training, of the study's objective by default; NaN where it was not measured."""
        values = list(self.validation.get(metric or self.objective[0], {}).values())
        return float(np.mean(values)) if values else math.nan

    def level(self, metric: str, position: int | None = None) -> Interval:
        """Mean held-out value after training."""
        return mean_interval(self.final.get((metric, position), {}).values())

    def change(self, metric: str, position: int | None = None) -> Interval:
        """Held-out value after training minus the base model's, paired by seed."""
        return paired_difference(self.final.get((metric, position), {}), self.base.get((metric, position), {}))

    def has_heldout_start(self, metric: str, position: int | None = None) -> bool:
        """Whether the held-out split was measured where the method began, which older studies did at step 0 only."""
        return self.final.get((metric, position), {}).keys() <= self.start.get((metric, position), {}).keys()

    def ends(self, metric: str, position: int | None = None, *, heldout: bool = True) -> tuple[BySeed, BySeed]:
        """Values where the method began and where it ended: held-out ones, or validation ones at training's G."""
        if heldout:
            return self.start.get((metric, position), {}), self.final.get((metric, position), {})
        return self.validation_start.get(metric, {}), self.validation.get(metric, {})

    def since_start(self, metric: str) -> Interval:
        """Value after training minus that where the method began, paired by seed; held-out ones where they exist."""
        start, end = self.ends(metric, heldout=self.has_heldout_start(metric))
        return paired_difference(end, start)

    def versus(self, other: Configuration, metric: str, position: int | None = None) -> Interval:
        """Held-out value minus that of `other`, paired by seed."""
        return paired_difference(self.final.get((metric, position), {}), other.final.get((metric, position), {}))

    def base_of(self, metric: str) -> Map:
        """The settings that define the base model's held-out value of a metric."""
        if metric in ("cfm_loss", "entropy"):
            return self.map_of("cfm_loss", at_one_length=True)
        if metric == "judge_cfm_loss":
            return (("model", self.settings.get("model")), *self.map_of(metric))
        return tuple((name, self.settings.get(name)) for name in OF_BASE)

    def map_of(self, metric: str, *, at_one_length: bool = False) -> Map:
        """The settings that define what `metric` measures: values compare between configurations that share them.

        Args:
            at_one_length: for held-out values, which reports compare at one completion length for all configurations.
        """
        settings = METRICS[metric].map_of(self.settings) if metric in METRICS else {}
        return tuple((k, v) for k, v in settings.items() if not (at_one_length and k == "completion_length"))


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items, such as configurations, by `key`, in their order."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def equal_but_for(
    name: str, varying: Sequence[str], configurations: Iterable[Configuration]
) -> dict[Map, list[Configuration]]:
    """Configurations that differ in setting `name` alone, by the values of the others that they read."""

    def others(c: Configuration) -> Map:
        return tuple((key, c.settings[key]) for key in varying if key != name and key not in c.unread)

    return grouped(configurations, others)
