"""The effects of settings on outcomes: each of their values against a reference, all other settings equal.

Differences are paired by seed and by sequence, and averaged over all combinations of the other settings that have both
values. Only configurations with all seeds count: the mean over the seeds that are left is flattered by those that are
not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ebft_study.analysis.configuration import BySeed, Configuration, Map, grouped
from ebft_study.analysis.settings import sort_key
from ebft_study.analysis.statistics import Interval, mean_interval, mean_value
from ebft_study.analysis.summary import StudySummary

FEATURES = ("feature_network", "random_weights", "depths", "pooling", "normalize", "whitening")
"""Settings of the feature map of training: which network, from where in it, and in which metric."""


@dataclass(frozen=True)
class Effect:
    """`metric` at some values of settings minus that at the reference: the mean over `n_blocks` blocks."""

    settings: Map
    reference: Map
    metric: str
    difference: Interval
    n_blocks: int


def feature_settings(study: StudySummary) -> tuple[str, ...]:
    """The varying settings of the feature map, and axes of choices that set some of them."""
    axes = {study.shown_as.get(name, name) for name in FEATURES}
    return tuple(name for name in study.varying if name in axes)


def subjects(study: StudySummary) -> list[tuple[str, ...]]:
    """The settings whose effects a study can show: each varying one, those of the feature map together."""
    features = feature_settings(study)
    return [*([features] if features else []), *((name,) for name in study.varying if name not in features)]


def effects(study: StudySummary, names: Sequence[str], metric: str) -> list[Effect]:
    """The effects of settings `names` on the outcome by a metric, against the first of their values.

    The outcome is the held-out value; that of the validation split for what is measured on no other.

    Numbers are in order, choices as the study file lists them. Empty where no two configurations differ in these
    settings alone, or where the metric does not compare across them.
    """
    blocks = [block for block in _blocks(study, names) if len(block) > 1]
    settings = sorted({key for block in blocks for key in block}, key=lambda key: [sort_key(v) for _, v in key])
    pairs = ((other, _differences(study, blocks, settings[0], other, metric)) for other in settings[1:])
    return [
        Effect(other, settings[0], metric, mean_interval(by_seed.values()), n_blocks)
        for other, (by_seed, n_blocks) in pairs
        if by_seed
    ]


def left_out(study: StudySummary, names: Sequence[str]) -> list[Configuration]:
    """Configurations that read one of the settings and lack seeds, so that no effect counts them."""
    return [c for c in study.on_axes if not c.is_complete and any(name not in c.unread for name in names)]


def _blocks(study: StudySummary, names: Sequence[str]) -> list[dict[Map, Configuration]]:
    """Complete configurations by their values of `names`, in blocks that agree in all other settings."""

    def values(c: Configuration, of: Sequence[str]) -> Map:
        return tuple((name, c.settings[name]) for name in of if name not in c.unread)

    measured = [c for c in study.on_axes if c.is_measured and c.is_complete and values(c, names)]
    others = [name for name in study.varying if name not in names]
    return [{values(c, names): c for c in block} for block in grouped(measured, lambda c: values(c, others)).values()]


def _differences(
    study: StudySummary, blocks: Sequence[dict[Map, Configuration]], reference: Map, other: Map, metric: str
) -> tuple[BySeed, int]:
    """Differences by seed, averaged over the blocks that have both values; and the number of those."""
    both = [(block[other], block[reference]) for block in blocks if other in block and reference in block]
    at_one_length = study.has_heldout(metric)
    comparable = [pair for pair in both if len({c.map_of(metric, at_one_length=at_one_length) for c in pair}) == 1]
    values = [[study.outcome(c, metric) for c in pair] for pair in comparable]
    measured = [(left, right) for left, right in values if left.keys() & right.keys()]
    shared = set.intersection(*(left.keys() & right.keys() for left, right in measured)) if measured else set()
    return {seed: mean_value([left[seed] - right[seed] for left, right in measured]) for seed in sorted(shared)}, len(
        measured
    )
