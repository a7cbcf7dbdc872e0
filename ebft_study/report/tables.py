"""From raw results to what a report speaks about: configurations, each with its held-out values by seed.

A configuration is one setting of all hyperparameters but the seed. Its values are the held-out evaluations after
training; the base model's are those of step 0 of the same trials. Only finished trials enter comparisons, so that all
of a configuration's values are at the same amount of data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from ebft_study import text
from ebft_study.analysis.statistics import Interval, mean_interval, paired_difference
from ebft_study.report import together
from ebft_study.results import Results, cell_value, schema

HELDOUT = "heldout"
NOT_AN_AXIS = ("name", "seed")
# Settings that change what cfm_loss measures, so that its values are not comparable across them.
MEASURES_CFM = (
    *("model", "feature_network", "random_weights", "depths", "pooling", "normalize", "dataset", "sequence_length"),
    *("packing", "stride", "first_context_length", "anchor_region", "evaluation_temperature", "cfm_samples"),
)
Values = dict[int, float]


@dataclass(frozen=True)
class Configuration:
    """All trials of one setting. Values are keyed by (metric, position), then by seed."""

    name: str
    label: str
    baseline: str | None
    settings: dict[str, Any]
    trials: pd.DataFrame
    final: dict[tuple[str, int | None], Values] = field(repr=False)
    base: dict[tuple[str, int | None], Values] = field(repr=False)
    validation_cfm: float
    ce_rise: Values = field(default_factory=dict)
    """Validation CE at the end minus that at the method's first step, which a warm start moves; by seed."""

    @property
    def is_sft(self) -> bool:
        return self.settings.get("method") == "sft"

    @property
    def n_finished(self) -> int:
        return int((self.trials["status"] == "finished").sum())

    @property
    def sequences_seen(self) -> float:
        """Training sequences of a finished trial; NaN when unknown."""
        done = self.trials[self.trials["status"] == "finished"]
        counted = done["sequences_seen"].fillna(done["steps_done"] * done["batch_size"])
        return float(counted.median())

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
class Study:
    """A study as its report sees it. `length` is the completion length at which cfm_loss is compared.

    `varying` are settings, and axes of choices, which stand for all settings that they change.
    """

    results: Results
    varying: tuple[str, ...]
    configurations: tuple[Configuration, ...]
    length: int | None
    lengths: tuple[int, ...]
    shown_as: dict[str, str] = field(default_factory=dict)
    """Varying setting -> the one of `varying` that stands for it."""

    @property
    def name(self) -> str:
        names = self.results.trials["study"].dropna()
        return str(names.iloc[0]) if len(names) else self.results.folder.name

    @property
    def ebft(self) -> tuple[Configuration, ...]:
        return tuple(c for c in self.configurations if c.settings.get("method") == "ebft")

    @property
    def sft(self) -> tuple[Configuration, ...]:
        return tuple(c for c in self.configurations if c.is_sft)

    @property
    def not_comparable(self) -> tuple[str, ...]:
        """Varying settings across which values of cfm_loss must not be compared."""
        settings = {name: name for name in self.varying} | self.shown_as
        changing = [name for name in settings if name in MEASURES_CFM or self._sets_evaluation_temperature(name)]
        return tuple(dict.fromkeys(settings[name] for name in changing))

    def _sets_evaluation_temperature(self, name: str) -> bool:
        return name == "temperature" and bool(self.results.trials["evaluation_temperature"].isna().any())

    def base(self, metric: str, position: int | None = None) -> float:
        """The base model's held-out value, averaged over all trials (they agree where they share a base model)."""
        values = [v for c in self.configurations for v in c.base.get((metric, position), {}).values()]
        return float(np.mean(values)) if values else math.nan


def best(configurations: Iterable[Configuration]) -> Configuration | None:
    """The lowest cfm_loss on the *validation* split, so that the held-out comparison stays unbiased by the choice."""
    done = [c for c in configurations if c.n_finished and c.final]
    return min(done, key=lambda c: (math.isnan(c.validation_cfm), c.validation_cfm), default=None)


def summarize(results: Results) -> Study:
    """The configurations of a study, those on the axes first, each ordered by its settings."""
    trials = together.with_choices(results.trials, results.spec)
    shown_as = together.stand_ins(results.spec, varying_settings(trials))
    varying = tuple(dict.fromkeys(shown_as.values()))
    length, lengths = _completion_lengths(results)
    final, base = _heldout(results, length)
    validation, rises = _last_validation_cfm(results), _validation_ce_rise(results)
    configurations = []
    names = [*(column.name for column in schema.hyperparameters()), *together.choices_of(results.spec)]
    for name, group in trials.groupby(_configuration_names(trials, varying), sort=False):
        seeds = _seeds(group)
        finished = _seeds(group[group["status"] == "finished"])
        settings = {key: cell_value(group.iloc[0][key]) for key in names}
        baseline = cell_value(group.iloc[0]["named_baseline"])
        configurations.append(
            Configuration(
                name=str(name),
                label=_label(str(name), baseline, settings, varying),
                baseline=baseline,
                settings=settings,
                trials=group,
                final=_by_seed(final, finished),
                base=_by_seed(base, seeds),
                validation_cfm=_mean([validation.get(trial_id, math.nan) for trial_id in finished]),
                ce_rise={seed: rises[trial_id] for trial_id, seed in finished.items() if trial_id in rises},
            )
        )
    ordered = sorted(configurations, key=lambda c: (c.baseline or "", *[order(c.settings[n]) for n in varying]))
    return Study(results, varying, _with_unique_labels(ordered), length, lengths, shown_as)


def _seeds(trials: pd.DataFrame) -> dict[str, int]:
    known = trials.dropna(subset=["seed"])
    return {str(trial): int(seed) for trial, seed in zip(known["trial_id"], known["seed"], strict=True)}


def varying_settings(trials: pd.DataFrame) -> tuple[str, ...]:
    """Settings that differ between trials on the axes (named baselines and seeds aside), in schema order."""
    on_axes = trials[trials["named_baseline"].isna()]
    names = [c.name for c in schema.hyperparameters() if c.name not in NOT_AN_AXIS]
    return tuple(name for name in names if len({repr(cell_value(v)) for v in on_axes[name]}) > 1)


def _configuration_names(trials: pd.DataFrame, varying: Sequence[str]) -> pd.Series:
    """The configuration of each trial; without one, a trial stands alone.

    Names hold rounded numbers, so two configurations of a search can share one: their exact settings tell them apart.
    """
    names = trials["configuration"].fillna(trials["label"]).fillna(trials["trial_id"])
    exact = [
        repr([cell_value(value) for value in row]) for row in trials[list(varying)].to_numpy(dtype=object).tolist()
    ]
    distinct = names.to_frame("name").assign(exact=exact).drop_duplicates()["name"].value_counts()
    shared = names.map(distinct) > 1
    return names.where(~shared, names + " " + pd.Series(exact, index=trials.index, dtype="str"))


def _label(name: str, baseline: str | None, settings: dict[str, Any], varying: Sequence[str]) -> str:
    if baseline:
        return "SFT" if baseline == "sft" else baseline
    return ", ".join(f"{text.symbol(key)}={text.setting(settings[key])}" for key in varying) or name


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


Measured = dict[str, dict[tuple[str, int | None], float]]


def _heldout(results: Results, length: int | None) -> tuple[Measured, Measured]:
    """Held-out values of each trial at its last step, and at step 0."""
    rows = _heldout_rows(results)
    last = rows[rows["step"] == rows.groupby("trial_id")["step"].transform("max")]
    return _measured(last[last["step"] > 0], length), _measured(rows[rows["step"] == 0], length)


def _measured(rows: pd.DataFrame, length: int | None) -> Measured:
    """trial -> (metric, position) -> value; (cfm_loss, None) is the value at the compared length."""
    found: Measured = {}
    for trial, metric, at, value in rows[["trial_id", "metric", "position", "value"]].to_numpy().tolist():
        position = None if text.is_missing(at) else int(at)
        values = found.setdefault(trial, {})
        values[metric, position] = value
        if metric == "cfm_loss" and position == length:
            values[metric, None] = value
    return found


def _by_seed(measured: Measured, seeds: dict[str, int]) -> dict[tuple[str, int | None], Values]:
    by_seed: dict[tuple[str, int | None], Values] = {}
    for trial_id, seed in seeds.items():
        for key, value in measured.get(trial_id, {}).items():
            by_seed.setdefault(key, {})[seed] = value
    return by_seed


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


def order(value: Any) -> tuple[int, float, str]:
    """A sort key for settings of any type: numbers by size, choices as listed, lists by length, the rest by text."""
    if isinstance(value, int | float):
        return (0, float(value), "")
    if value is None:
        return (2, 0.0, "")
    if isinstance(value, together.Choice):
        return (1, float(value.rank), "")
    return (1, float(len(value)) if isinstance(value, tuple) else 0.0, str(value))
