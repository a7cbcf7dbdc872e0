"""Importance of the settings that a study varies, for its first objective: which of them decide a configuration's rank.

The importance of a setting is the share of the variance of "is among the best k" that it explains alone, averaged over
k: PED-ANOVA (Watanabe, Bansal and Hutter 2023, as in Optuna) with exact frequencies, for all target quantiles. It lies
between 0 and 1, and the importances of a study do not sum to 1: what only a combination of settings explains, and
noise, belong to none. Under noise a setting of k values gets (k - 1) / (n - 1) on average, never 0, so each importance
has a threshold of its own: what it exceeds in 5 % of the shuffles of the values over the configurations, for one or
more of the settings.

Optuna's evaluator smooths settings with listed values, but not those with a range: two values that decide everything
get 0.25 instead of 1, with 1,000 configurations too. Ranks across both kinds would mislead. With its smoothing off, it
agrees with this module at each target quantile (`tests/analysis/test_importance.py`).

Units are complete configurations, with the mean over their seeds on the validation split, within one feature map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ebft_study.analysis.configuration import BySeed, Configuration, equal_but_for
from ebft_study.analysis.selection import comparable
from ebft_study.analysis.settings import is_number, sort_key
from ebft_study.analysis.statistics import CONFIDENCE, Interval, mean_interval
from ebft_study.analysis.summary import StudySummary
from ebft_study.results.lineage import EXPLOIT

MIN_CONFIGURATIONS = 9
"""With 8, a setting of two values that separates the better half has p = 2 / C(8, 4) = 0.029: not below 0.05 / 2."""
REPLICATES = 2000
PARTS = 3
"""A setting with a range counts in parts of equal size: its low, middle and high third."""
MAX_VALUES = 6
MIN_PER_VALUE = 3
"""A setting of numbers with more values, or with fewer configurations per value, counts as one with a range."""


@dataclass(frozen=True)
class Importance:
    """The importance of one setting, with its 95 % interval over configurations and seeds."""

    name: str
    share: float
    low: float
    high: float
    threshold: float
    """The share up to which a setting without any effect comes."""
    first: float
    """Part of the resamples in which no other setting is more important."""

    @property
    def is_clear(self) -> bool:
        """Whether the setting has more than a setting without any effect."""
        return self.share > self.threshold + 1e-9  # equal patterns of ranks differ by rounding


@dataclass(frozen=True)
class MarginalEffect:
    """The objective by value of one setting, less its mean over the values: paired by seed and all other settings."""

    name: str
    values: tuple[Any, ...]
    effects: tuple[Interval, ...]
    """Means over seeds, with intervals over them."""
    n_blocks: int
    """Number of combinations of the other settings, over which each effect is a mean."""


def varied_groups(study: StudySummary) -> list[list[Configuration]]:
    """Configurations on the axes whose objective may be compared, incomplete ones included; none of one setting."""
    if len(study.varying) < 2:
        return []
    return comparable(study.on_axes, study.objective[0])


def complete(group: Sequence[Configuration], metric: str | None = None) -> list[Configuration]:
    """Those with a validation value for every seed of the study, of its first objective by default."""
    return [c for c in group if c.is_complete and len(_values(c, metric)) >= c.n_seeds]


def varying_in(study: StudySummary, group: Sequence[Configuration]) -> list[str]:
    """The settings with two values or more in a group of configurations, as far as those read them."""
    return [name for name in study.varying if len(values_of(group, name)) > 1]


def values_of(group: Sequence[Configuration], name: str) -> list[Any]:
    """The values of a setting in the configurations that read it, in order."""
    return sorted({c.settings[name] for c in group if name not in c.unread}, key=sort_key)


def obstacle(study: StudySummary, group: Sequence[Configuration]) -> str:
    """The reason why the importance of settings cannot be told from a group of `varied_groups`; '' if it can."""
    measured = complete(group)
    if is_population(study):
        return "trials of a population change their settings while they train"
    if len(measured) < MIN_CONFIGURATIONS:
        return (
            f"{len(measured)} complete configuration{'s' * (len(measured) != 1)} that can be compared, and it takes "
            f"{MIN_CONFIGURATIONS}"
        )
    if len(varying_in(study, measured)) < 2:
        return "fewer than two settings vary between complete configurations that can be compared"
    if len({c.validated() for c in measured}) == 1:
        return "all configurations have one value"
    return ""


def importances(study: StudySummary, group: Sequence[Configuration]) -> list[Importance]:
    """The importance of each setting that varies in a group without `obstacle`, the most important first."""
    configurations = complete(group)
    names = varying_in(study, configurations)
    levels = [_levels(configurations, name) for name in names]
    sign = 1.0 if study.objective[1] == "min" else -1.0
    by_seed = sign * np.array([[_values(c)[seed] for seed in sorted(_values(c))] for c in configurations])
    random = np.random.default_rng(0)
    shares = [float(explained(of_one, by_seed.mean(axis=1))) for of_one in levels]
    thresholds = _thresholds(levels, by_seed.mean(axis=1), random)
    resampled = _resampled(levels, by_seed, random)
    leads = resampled == resampled.max(axis=0)
    tail = 100 * (1 - CONFIDENCE) / 2
    ranking = []
    for name, share, threshold, ours, lead in zip(names, shares, thresholds, resampled, leads, strict=True):
        # Repeated configurations look like an effect: the resamples are shifted to have the mean that was measured.
        low, high = np.clip(np.percentile(ours, [tail, 100 - tail]) - ours.mean() + share, 0, 1)
        ranking.append(Importance(name, share, float(low), float(high), float(threshold), float(lead.mean())))
    return sorted(ranking, key=lambda each: -each.share)


def explained(levels: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """The share of the variance of "is among the k lowest losses" that levels explain, averaged over k.

    For one k, with n_v of n configurations at level v of which f_v are among the lowest, and f of all that have a
    level: `sum_v n_v (f_v - f)^2 / n`, over `k/n (1 - k/n)`. Both are added over k before they are divided. A k that
    would separate equal losses does not count.

    Args:
        levels: [..., n], whole numbers; -1 where a configuration does not have the setting. Broadcast against losses.
        losses: [..., n].
    """
    levels, losses = np.broadcast_arrays(levels, losses)
    order = losses.argsort(axis=-1, kind="stable")
    separates = np.diff(np.take_along_axis(losses, order, axis=-1), axis=-1) > 0
    members = np.take_along_axis(levels, order, axis=-1)[..., None] == np.arange(levels.max() + 1)
    lowest, sizes = members.cumsum(axis=-2)[..., :-1, :], members.sum(axis=-2, keepdims=True)
    rates = lowest / np.maximum(sizes, 1)
    rate = lowest.sum(axis=-1, keepdims=True) / np.maximum(sizes.sum(axis=-1, keepdims=True), 1)
    n = losses.shape[-1]
    between = (sizes * (rates - rate) ** 2).sum(axis=-1) / n
    part = np.arange(1, n) / n
    total = (part * (1 - part) * separates).sum(axis=-1)
    shares: np.ndarray = (between * separates).sum(axis=-1) / np.where(total > 0, total, 1.0)
    return shares


def _thresholds(levels: Sequence[np.ndarray], losses: np.ndarray, random: np.random.Generator) -> list[float]:
    """For each setting, the quantile of its share among shuffles; Bonferroni's, so that 5 % have one or more above."""
    shuffled = random.permuted(np.tile(losses, (REPLICATES, 1)), axis=1)
    quantile = 1 - (1 - CONFIDENCE) / len(levels)
    return [float(np.quantile(explained(of_one, shuffled), quantile, method="higher")) for of_one in levels]


def _resampled(levels: Sequence[np.ndarray], by_seed: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """[settings, replicates]: shares in bootstrap samples of configurations and, within each, of seeds.

    Seeds are resampled without what they do to all configurations alike, which moves no rank.
    """
    n, n_seeds = by_seed.shape
    residuals = by_seed - by_seed.mean(axis=0)
    drawn = random.integers(0, n, (REPLICATES, n))
    seeds = random.integers(0, n_seeds, (REPLICATES, n, n_seeds))
    losses = residuals[drawn[..., None], seeds].mean(axis=-1)
    losses = np.round(losses / residuals.std(), 9)  # a configuration that was drawn twice ties with itself
    return np.array([explained(of_one[drawn], losses) for of_one in levels])


def _levels(configurations: Sequence[Configuration], name: str) -> np.ndarray:
    """The level of a setting in each configuration; -1 where it is not read."""
    values = values_of(configurations, name)
    read = [c.settings[name] for c in configurations if name not in c.unread]
    if all(map(is_number, values)) and len(values) > min(MAX_VALUES, len(read) / MIN_PER_VALUE):
        edges = np.quantile(read, np.arange(1, PARTS) / PARTS)
        by_value = {value: int(np.searchsorted(edges, value)) for value in values}
    else:
        by_value = {value: level for level, value in enumerate(values)}
    return np.array([-1 if name in c.unread else by_value[c.settings[name]] for c in configurations])


def is_population(study: StudySummary) -> bool:
    return bool((study.results.events["kind"] == EXPLOIT).any())


def _values(configuration: Configuration, metric: str | None = None) -> BySeed:
    """Finite values of a metric, the objective by default, on the validation split."""
    values = configuration.validation.get(metric or configuration.objective[0], {})
    return {seed: value for seed, value in values.items() if math.isfinite(value)}


def marginal_effect(study: StudySummary, group: Sequence[Configuration], name: str) -> MarginalEffect | None:
    """The effect of a setting over configurations that differ in it alone; None where no such set has all values.

    None in a population, too, whose trials change their settings.
    """
    if is_population(study):
        return None
    configurations = [c for c in complete(group) if name not in c.unread]
    values = values_of(configurations, name)
    blocks = [b for b in equal_but_for(name, study.varying, configurations).values() if len(b) == len(values)]
    if not blocks or len(values) < 2:
        return None
    seeds = sorted(_values(blocks[0][0]))
    table = np.array([[[_values(c)[seed] for seed in seeds] for c in _by_value(block, name)] for block in blocks])
    centred = (table - table.mean(axis=1, keepdims=True)).mean(axis=0)
    return MarginalEffect(name, tuple(values), tuple(map(mean_interval, centred)), len(blocks))


def _by_value(block: Sequence[Configuration], name: str) -> list[Configuration]:
    return sorted(block, key=lambda c: sort_key(c.settings[name]))
