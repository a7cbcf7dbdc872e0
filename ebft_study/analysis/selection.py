"""The choice of configurations: the best one of several, and one that does not know the seed that scores it.

A choice uses validation values. This alone does not keep held-out numbers unbiased: a trial's luck in training moves
both. `best` names a configuration; `select` is for claims about the chosen one. It leaves a seed out, chooses by all
others, and scores the choice on the seed that was left out, for each seed in turn.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ebft_study.analysis.configuration import BySeed, Configuration, grouped
from ebft_study.analysis.settings import Objective
from ebft_study.analysis.statistics import Interval, mean_interval, paired_difference
from ebft_study.results import METRICS


def comparable(
    configurations: Iterable[Configuration], metric: str, *, at_one_length: bool = False
) -> list[list[Configuration]]:
    """Groups of configurations between which values of `metric` may be compared: of one feature map, one data set."""
    return list(grouped(configurations, lambda c: c.map_of(metric, at_one_length=at_one_length)).values())


def ranked(configurations: Iterable[Configuration], metric: str | None = None) -> list[Configuration]:
    """Measured configurations, the best first by the mean of `metric` on the validation split.

    Complete configurations come before those that lack seeds: the mean over the seeds that are left is flattered by
    those that are not. Configurations that are not comparable take turns, each group in its own order.

    Args:
        metric: the study's first objective by default.
    """
    measured = [c for c in configurations if c.is_measured]
    if not measured:
        return []
    goal = _objective(measured[0], metric)
    ranks: dict[str, tuple[bool, int]] = {}
    for group in comparable(measured, goal[0]):
        ordered = sorted(group, key=lambda c: (*_completeness(c), *_loss(c.validated(goal[0]), goal)))
        ranks |= {c.name: (not c.is_complete, rank) for rank, c in enumerate(ordered)}
    return sorted(measured, key=lambda c: ranks[c.name])


def best(configurations: Iterable[Configuration], metric: str | None = None) -> Configuration | None:
    """The best configuration by the mean of `metric` on the validation split, over all seeds of the study.

    None where nothing has finished, and where `metric` is not measured or must not be compared between the candidates.

    Args:
        metric: the study's first objective by default.
    """
    order = ranked(configurations, metric)
    if len(order) <= 1:
        return order[0] if order else None
    name = _objective(order[0], metric)[0]
    if len(comparable(order, name)) > 1 or math.isnan(order[0].validated(name)):
        return None
    return order[0]


def best_trial(configurations: Iterable[Configuration], metric: str | None = None) -> dict[Hashable, Any] | None:
    """The row of `trials` of the best configuration at its best seed, both by validation; None where `best` is."""
    chosen = best(configurations, metric)
    if chosen is None:
        return None
    name, mode = _objective(chosen, metric)
    values = chosen.validation.get(name, {})
    if not values:
        return None
    seed = (min if mode == "min" else max)(values, key=values.__getitem__)
    row: dict[Hashable, Any] = chosen.finished.set_index("seed", drop=False).loc[seed].to_dict()
    return row


@dataclass(frozen=True)
class Selected:
    """The configuration that was chosen without each seed, out of `n_candidates`, with the values of that seed."""

    by_seed: Mapping[int, Configuration]
    n_candidates: int

    @property
    def configurations(self) -> list[Configuration]:
        """The chosen ones, each once."""
        return list({c.name: c for c in self.by_seed.values()}.values())

    @property
    def is_choice(self) -> bool:
        return self.n_candidates > 1

    def final(self, metric: str, position: int | None = None) -> BySeed:
        """Held-out values after training."""
        return self._at_seeds({s: c.final.get((metric, position), {}) for s, c in self.by_seed.items()})

    def base(self, metric: str, position: int | None = None) -> BySeed:
        """Held-out values of the base model."""
        return self._at_seeds({s: c.base.get((metric, position), {}) for s, c in self.by_seed.items()})

    @property
    def began_at_base(self) -> bool:
        """Whether the method began at the base model, without a warm start."""
        return all(c.warm_start_steps == 0 for c in self.by_seed.values())

    def has_heldout_start(self, metric: str, position: int | None = None) -> bool:
        """Whether the held-out split was measured where the method began."""
        return all(c.has_heldout_start(metric, position) for c in self.by_seed.values())

    def ends(self, metric: str, position: int | None = None) -> tuple[BySeed, BySeed]:
        """Values where the method began and where it ended: held-out ones, or validation ones (`Configuration.ends`).

        In older studies the end of a warm start was measured on the validation split only.
        """
        heldout = self.has_heldout_start(metric, position)
        ends = {seed: c.ends(metric, position, heldout=heldout) for seed, c in self.by_seed.items()}
        start, end = (self._at_seeds({seed: pair[k] for seed, pair in ends.items()}) for k in (0, 1))
        return start, end

    def progress(self, metric: str, position: int | None = None) -> BySeed:
        """Value where the method ended minus that where it began."""
        start, end = self.ends(metric, position)
        return {seed: end[seed] - start[seed] for seed in sorted(start.keys() & end.keys())}

    def mean(self, values: BySeed) -> Interval:
        """The mean over seeds of scores of this choice."""
        return mean_interval(values.values(), dependent=self.is_choice)

    def minus(self, values: BySeed, reference: BySeed, *, other: Selected | None = None) -> Interval:
        """Mean difference by seed between values of this choice and a reference, which may be of another choice."""
        return paired_difference(values, reference, dependent=self.is_choice or (other is not None and other.is_choice))

    @staticmethod
    def _at_seeds(values: Mapping[int, BySeed]) -> BySeed:
        return {seed: of_seed[seed] for seed, of_seed in values.items() if seed in of_seed}


def select(candidates: Iterable[Configuration], metric: str) -> Selected | None:
    """For each seed, the best candidate by `metric` on the validation split over the *other* seeds.

    Only complete candidates are chosen among; where there are none, those with the most finished seeds. One candidate
    is no choice. None where `best` is None: nothing has finished, or the candidates cannot be compared.

    A seed by which candidates were promoted helps to choose and scores nothing: that a candidate is one at all depends
    on it.
    """
    measured = [c for c in candidates if c.is_measured]
    if not measured:
        return None
    fullest = min(map(_completeness, measured))
    eligible = [c for c in measured if _completeness(c) == fullest]
    seeds = sorted({seed for c in eligible for seed in c.finished_seeds})
    scoring = [seed for seed in seeds if not any(seed in c.promoted_by for c in eligible)]
    if len(eligible) == 1:
        return Selected(dict.fromkeys(scoring, eligible[0]), 1)
    goal = _objective(eligible[0], metric)
    if len(comparable(eligible, metric)) > 1 or all(math.isnan(c.validated(metric)) for c in eligible):
        return None
    return Selected({seed: _best_without(eligible, goal, seed, seeds) for seed in scoring}, len(eligible))


def _best_without(candidates: list[Configuration], goal: Objective, seed: int, seeds: list[int]) -> Configuration:
    others = [s for s in seeds if s != seed] or seeds  # with one seed there is no interval that a bias could move

    def loss(c: Configuration) -> tuple[bool, float]:
        values = [c.validation.get(goal[0], {}).get(s, math.nan) for s in others if s in c.finished_seeds]
        return _loss(float(np.mean(values)) if values else math.nan, goal)

    return min(candidates, key=loss)


def _objective(configuration: Configuration, metric: str | None) -> Objective:
    """Metric and mode; a metric that is not the study's objective has its registered direction."""
    if metric is None or metric == configuration.objective[0]:
        return configuration.objective
    return metric, (METRICS[metric].direction if metric in METRICS else None) or "min"


def _completeness(configuration: Configuration) -> tuple[bool, int]:
    """Sorts complete configurations first, then by the number of finished seeds."""
    return (not configuration.is_complete, 0 if configuration.is_complete else -len(configuration.finished_seeds))


def _loss(value: float, goal: Objective) -> tuple[bool, float]:
    """Sorts values the best first, missing ones last."""
    return (math.isnan(value), 0.0 if math.isnan(value) else value if goal[1] == "min" else -value)
