"""Summary of a study's tables: its configurations, each with its held-out values by seed.

A configuration is one setting of all hyperparameters but the seed. Its values are the held-out evaluations after
training; the base model's are those of step 0 of the same trials. Only finished trials enter comparisons, so that all
of a configuration's values are at the same amount of data.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from ebft_study import text
from ebft_study.analysis.settings import (
    assignments,
    choices_of,
    configuration_names,
    grouped_settings,
    sort_key,
    varying_settings,
    with_choices,
)
from ebft_study.analysis.statistics import Interval, mean_interval, paired_difference
from ebft_study.results import METRICS, Results, cell_value, schema

HELDOUT = "heldout"
COMPARED = ("ce_loss", "cfm_loss")
"""Metrics by which reports compare configurations."""
BySeed = dict[int, float]
Values = dict[tuple[str, int | None], BySeed]
"""(metric, position) -> seed -> value; ("cfm_loss", None) is the value at the completion length of comparisons."""


@dataclass(frozen=True)
class Configuration:
    """All trials of one setting, with their held-out values after training (`final`) and before it (`base`)."""

    name: str
    label: str
    baseline: str | None
    settings: dict[str, Any]
    trials: pd.DataFrame
    final: Values = field(repr=False)
    base: Values = field(repr=False)
    validation_cfm: float
    ce_rise: BySeed = field(default_factory=dict)
    """Validation CE at the end minus that at the method's first step, which a warm start moves; by seed."""

    @property
    def is_sft(self) -> bool:
        return self.settings.get("method") == "sft"

    @property
    def finished(self) -> pd.DataFrame:
        """The finished trials."""
        return self.trials[self.trials["status"] == "finished"]

    @property
    def n_finished(self) -> int:
        return len(self.finished)

    @property
    def sequences_seen(self) -> float:
        """Training sequences of a finished trial; NaN when unknown."""
        done = self.finished
        return float(done["sequences_seen"].fillna(done["steps_done"] * done["batch_size"]).median())

    def level(self, metric: str, position: int | None = None) -> Interval:
        """Mean held-out value after training."""
        return mean_interval(self.final.get((metric, position), {}).values())

    def change(self, metric: str, position: int | None = None) -> Interval:
        """Held-out value after training minus the base model's, paired by seed."""
        return paired_difference(self.final.get((metric, position), {}), self.base.get((metric, position), {}))

    def versus(self, other: Configuration, metric: str, position: int | None = None) -> Interval:
        """Held-out value minus that of `other`, paired by seed."""
        return paired_difference(self.final.get((metric, position), {}), other.final.get((metric, position), {}))


@dataclass(frozen=True)
class StudySummary:
    """A study's configurations, and the completion `length` at which their cfm_loss is compared.

    `varying` are settings, and axes of choices, which represent all settings that they change.
    """

    results: Results
    varying: tuple[str, ...]
    configurations: tuple[Configuration, ...]
    length: int | None
    lengths: tuple[int, ...]
    shown_as: dict[str, str] = field(default_factory=dict)
    """Varying setting -> the one of `varying` that represents it."""

    @property
    def name(self) -> str:
        names = self.results.trials["study"].dropna()
        return str(names.iloc[0]) if len(names) else self.results.folder.name

    @property
    def on_axes(self) -> tuple[Configuration, ...]:
        """All configurations but the named baselines."""
        return tuple(c for c in self.configurations if c.baseline is None)

    @property
    def ebft(self) -> tuple[Configuration, ...]:
        return tuple(c for c in self.configurations if c.settings.get("method") == "ebft")

    @property
    def sft(self) -> tuple[Configuration, ...]:
        return tuple(c for c in self.configurations if c.is_sft)

    @property
    def not_comparable(self) -> tuple[str, ...]:
        """Varying settings across which values of cfm_loss must not be compared, at one completion length either."""
        return self._varying_in({*METRICS["cfm_loss"].comparable_within} - {"completion_length"})

    @property
    def validated_at_other_lengths(self) -> tuple[str, ...]:
        """Varying settings across which validation values, by which configurations are chosen, are not comparable."""
        return self._varying_in({"completion_length"})

    def _varying_in(self, names: set[str]) -> tuple[str, ...]:
        settings = {name: name for name in self.varying} | self.shown_as
        if self.results.trials["evaluation_temperature"].notna().all():
            names = names - {"temperature"}  # evaluations follow it only where they have none of their own
        return tuple(dict.fromkeys(settings[name] for name in settings if name in names))

    def base(self, metric: str, position: int | None = None) -> float:
        """The base model's held-out value, averaged over all trials (they agree where they share a base model)."""
        return _mean([v for c in self.configurations for v in c.base.get((metric, position), {}).values()])


def best(configurations: Iterable[Configuration]) -> Configuration | None:
    """The lowest cfm_loss on the *validation* split, so that the held-out comparison stays unbiased by the choice."""
    done = [c for c in configurations if c.n_finished and c.final]
    return min(done, key=lambda c: (math.isnan(c.validation_cfm), c.validation_cfm), default=None)


def summarize(results: Results) -> StudySummary:
    """The configurations of a study, those on the axes first, each ordered by its settings."""
    trials = with_choices(results.trials, results.spec)
    shown_as = grouped_settings(results.spec, varying_settings(trials))
    varying = tuple(dict.fromkeys(shown_as.values()))
    trials = trials.assign(group=configuration_names(trials, varying))
    length, lengths = _completion_lengths(results)
    final, base = _heldout(results, trials, length)
    validation, rises = _last_validation_cfm(results), _validation_ce_rise(results)
    names = [*(column.name for column in schema.hyperparameters()), *choices_of(results.spec)]
    configurations = []
    for name, group in trials.groupby("group", sort=False):
        settings = {key: cell_value(group.iloc[0][key]) for key in names}
        baseline = cell_value(group.iloc[0]["named_baseline"])
        finished = group[group["status"] == "finished"].dropna(subset=["seed"]).set_index("trial_id")["seed"]
        configurations.append(
            Configuration(
                name=str(name),
                label=_baseline_label(baseline) or assignments(settings, varying) or str(name),
                baseline=baseline,
                settings=settings,
                trials=group,
                final=final.get(str(name), {}),
                base=base.get(str(name), {}),
                validation_cfm=_mean([validation.get(trial_id, math.nan) for trial_id in finished.index]),
                ce_rise={int(seed): rises[trial_id] for trial_id, seed in finished.items() if trial_id in rises},
            )
        )
    ordered = sorted(configurations, key=lambda c: (c.baseline or "", *[sort_key(c.settings[n]) for n in varying]))
    return StudySummary(results, varying, _with_unique_labels(ordered), length, lengths, shown_as)


def _baseline_label(baseline: str | None) -> str | None:
    return "SFT" if baseline == "sft" else baseline


def _with_unique_labels(configurations: Sequence[Configuration]) -> tuple[Configuration, ...]:
    labels = [c.label for c in configurations]
    return tuple(replace(c, label=c.name) if labels.count(c.label) > 1 else c for c in configurations)


def _completion_lengths(results: Results) -> tuple[int | None, tuple[int, ...]]:
    """The length at which to compare cfm_loss: the commonest training G among those measured; and all measured."""
    measured = _heldout_rows(results)
    positions = measured.loc[measured["metric"] == "cfm_loss", "position"].dropna()
    lengths = tuple(sorted({int(p) for p in positions}))
    trained = results.trials["completion_length"].dropna().astype(int)
    usable = trained[trained.isin(lengths)]
    if len(usable):
        return int(usable.mode().min()), lengths
    return (lengths[len(lengths) // 2] if lengths else None), lengths


def _heldout_rows(results: Results) -> pd.DataFrame:
    rows = results.evaluations
    return rows[(rows["benchmark"] == HELDOUT) & rows["value"].notna()]


def _heldout(results: Results, trials: pd.DataFrame, length: int | None) -> tuple[dict[str, Values], dict[str, Values]]:
    """Held-out values by configuration: of finished trials at their last step, and of all trials at step 0."""
    rows = _heldout_rows(results)
    last = rows[(rows["step"] == rows.groupby("trial_id")["step"].transform("max")) & (rows["step"] > 0)]
    finished = trials[trials["status"] == "finished"]
    return _by_configuration(last, finished, length), _by_configuration(rows[rows["step"] == 0], trials, length)


def _by_configuration(rows: pd.DataFrame, trials: pd.DataFrame, length: int | None) -> dict[str, Values]:
    seeds = trials.loc[trials["seed"].notna(), ["trial_id", "group", "seed"]]
    table = rows[["trial_id", "metric", "position", "value"]].merge(seeds, on="trial_id")
    values: dict[str, Values] = defaultdict(lambda: defaultdict(dict))
    for _, metric, at, value, group, seed in table.to_numpy(dtype=object).tolist():
        position = None if text.is_missing(at) else int(at)
        values[group][metric, position][int(seed)] = value
        if metric == "cfm_loss" and position == length:
            values[group][metric, None][int(seed)] = value
    return values


def _last_validation_cfm(results: Results) -> dict[str, float]:
    measured = results.metrics.dropna(subset=["cfm_loss"]).sort_values("step")
    return {str(trial): float(value) for trial, value in measured.groupby("trial_id")["cfm_loss"].last().items()}


def _validation_ce_rise(results: Results) -> dict[str, float]:
    """Last validation CE of each trial minus the one at the end of its warm start (step 0 without one)."""
    measured = results.metrics.dropna(subset=["ce_loss"]).sort_values("step")
    starts = results.trials.set_index("trial_id")["warm_start_steps"].fillna(0)
    rises = {}
    for trial, rows in measured.groupby("trial_id"):
        at_start = rows.loc[rows["step"] == starts.get(trial, 0), "ce_loss"]
        if len(at_start):
            rises[str(trial)] = float(rows["ce_loss"].iloc[-1] - at_start.iloc[0])
    return rises


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
