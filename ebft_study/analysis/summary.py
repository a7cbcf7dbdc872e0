"""Summary of a study's tables: its configurations, each with its held-out values by seed.

A configuration is one setting of all hyperparameters but the seed. Its values are the held-out evaluations after
training; the base model's are those of step 0 of the same trials. Only finished trials enter comparisons, so that all
of a configuration's values are at the same amount of data.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from ebft_study import text
from ebft_study.analysis.configuration import DEFAULT_OBJECTIVE, HELDOUT, BySeed, Configuration, Map, Values, grouped
from ebft_study.analysis.selection import best, comparable
from ebft_study.analysis.settings import (
    Objective,
    assignments,
    choices_of,
    configuration_names,
    grouped_settings,
    objectives,
    sort_key,
    unread,
    unset,
    varying_settings,
    with_choices,
    without_unread,
)
from ebft_study.analysis.statistics import Score
from ebft_study.results import METRICS, Results, cell_value, schema

__all__ = ["COMPARED", "HELDOUT", "Configuration", "StudySummary", "best", "summarize"]

COMPARED = ("ce_loss", "cfm_loss")
"""Metrics by which every study compares configurations."""
VALIDATION = "validation"
LISTS = ["sequences", "counts", "values"]
"""Columns of `scores` with an entry per sequence."""
MAX_GROUPS = 6


@dataclass(frozen=True, eq=False)
class StudySummary:
    """A study's configurations, and the completion `length` at which their cfm_loss is compared.

    `varying` are settings, and axes of choices, which represent all settings that they change. Summaries are equal only
    to themselves: so what is made of one can be kept by it.
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

    @functools.cached_property
    def validation_rows(self) -> dict[str, pd.DataFrame]:
        """Trial -> its rows of `metrics` with an evaluation; losses are `Score`s where those of sequences are known."""
        rows, scores = self.results.metrics, self.results.scores
        rows, scores = rows[rows["ce_loss"].notna()], scores[scores["benchmark"] == VALIDATION]
        for metric in self.compared:
            of_metric = scores.loc[scores["metric"] == metric, ["trial_id", "step", *LISTS]]
            rows = _as_scores(rows.merge(of_metric, on=["trial_id", "step"], how="left"), metric).drop(columns=LISTS)
        return {str(trial): of_trial for trial, of_trial in rows.groupby("trial_id")}

    @functools.cached_property
    def benchmark_rows(self) -> pd.DataFrame:
        """Rows of `evaluations` on benchmarks; values are `Score`s where those of problems are known.

        `moment` is `base`, the base model; `start`, the end of a warm start; `end`, the last step after that with this
        benchmark; or empty.
        """
        rows = self.results.evaluations
        names = [name for name, entry in METRICS.items() if entry.of_benchmarks]
        rows = with_scores(rows[rows["metric"].isin(names) & rows["value"].notna()], self.results.scores)
        steps, last = rows["step"], rows.groupby(["trial_id", "benchmark"])["step"].transform("max")
        starts = _starts(rows, self.results.trials)
        conditions = {"base": steps == 0, "start": steps == starts, "end": (steps == last) & (steps > starts)}
        return rows.assign(moment=np.select(list(conditions.values()), list(conditions), default=""))

    @property
    def objective(self) -> Objective:
        """Metric and mode of the first objective, by which configurations are ranked."""
        return (objectives(self.results.spec) or [DEFAULT_OBJECTIVE])[0]

    @functools.cached_property
    def compared(self) -> tuple[str, ...]:
        """Metrics by which tables compare configurations; with those that only some studies have, if a trial does."""
        further = ["judge_cfm_loss", *(name for name, entry in METRICS.items() if entry.plugin)]
        measured = {metric for c in self.configurations for metric, _ in (*c.base, *c.final)}
        return (*COMPARED, *(metric for metric in further if metric in measured))

    def has_heldout(self, metric: str) -> bool:
        """Whether the held-out split was measured by a metric; else the validation split is all that was."""
        return any((metric, None) in c.final for c in self.configurations)

    def outcome(self, configuration: Configuration, metric: str) -> BySeed:
        """A configuration's values after training by seed: held-out ones where the study has them."""
        if self.has_heldout(metric):
            return configuration.final.get((metric, None), {})
        return configuration.validation.get(metric, {})

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

    def best_by_method(self) -> list[Configuration]:
        """SFT's, EBFT's and RLVR's best by the objective on the validation split, in each group that it can compare.

        Of many groups the first `MAX_GROUPS` of each method.
        """
        rlvr = [c for c in self.configurations if c.settings.get("method") == "rlvr"]
        methods = (self.sft, self.ebft, rlvr)
        groups = [group for each in methods for group in comparable(each, self.objective[0])[:MAX_GROUPS]]
        return [c for group in groups if (c := best(group))]

    @property
    def not_comparable(self) -> tuple[str, ...]:
        """Varying settings across which values of cfm_loss must not be compared, at one completion length either."""
        own_temperature = bool(self.results.trials["evaluation_temperature"].notna().all())
        names = METRICS["cfm_loss"].defined_by(own_temperature=own_temperature)
        return self._varying_in({*names} - {"completion_length"})

    @property
    def validated_at_other_lengths(self) -> tuple[str, ...]:
        """Varying settings across which validation values, by which configurations are chosen, are not comparable."""
        return self._varying_in({"completion_length"})

    def _varying_in(self, names: set[str]) -> tuple[str, ...]:
        settings = {name: name for name in self.varying} | self.shown_as
        return tuple(dict.fromkeys(settings[name] for name in settings if name in names))

    def base(self, metric: str, position: int | None = None) -> float:
        """The base model's mean held-out value; NaN where configurations differ in model, data or feature map."""
        if len(self.of_one_base(metric)) != 1:
            return math.nan
        return _mean([v for c in self.configurations for v in c.base.get((metric, position), {}).values()])

    def of_one_base(self, metric: str) -> list[list[Configuration]]:
        """Groups of configurations whose base models have one held-out value of `metric`."""
        return list(grouped(self.configurations, lambda c: c.base_of(metric)).values())

    def map_label(self, settings: Map) -> str:
        """`model=tiny-4m`: those of some settings that differ between the study's configurations."""
        varied = [name for name, _ in settings if len({repr(c.settings.get(name)) for c in self.configurations}) > 1]
        return assignments(dict(settings), varied)


def summarize(results: Results) -> StudySummary:
    """The configurations of a study, those on the axes first, each ordered by its settings."""
    trials = with_choices(results.trials, results.spec)
    shown_as = grouped_settings(results.spec, varying_settings(trials))
    varying = tuple(dict.fromkeys(shown_as.values()))
    trials = without_unread(trials, results.spec, shown_as)
    trials = trials.assign(group=configuration_names(trials, varying))
    length, lengths = _completion_lengths(results)
    final, base, start = _heldout(results, trials, length)
    last, validation_start = _validation(results)
    goal = (objectives(results.spec) or [DEFAULT_OBJECTIVE])[0]
    names = [*(column.name for column in schema.hyperparameters()), *choices_of(results.spec)]
    firsts = trials.drop_duplicates("group").set_index("group")[[*names, "named_baseline"]].to_dict("index")
    configurations = []
    for name, group in trials.groupby("group", sort=False):
        first = firsts[name]
        settings = {key: cell_value(first[key]) for key in names}
        baseline = cell_value(first["named_baseline"])
        ignored = unread(settings.get("method"), results.spec, shown_as) | unset(settings, results.spec)
        identity = group[["trial_id", "seed", "status"]]
        finished = identity[identity["status"] == "finished"].dropna(subset=["seed"])
        seeds = {str(trial): int(seed) for trial, seed in zip(finished["trial_id"], finished["seed"], strict=True)}
        read = [key for key in varying if key not in ignored]
        configurations.append(
            Configuration(
                name=str(name),
                label=_baseline_label(baseline) or assignments(settings, read) or str(name),
                baseline=baseline,
                settings=settings,
                trials=group,
                final=final.get(str(name), {}),
                base=base.get(str(name), {}),
                start=start.get(str(name), {}),
                validation=_by_seed(last, seeds),
                validation_start=_by_seed(validation_start, seeds),
                n_seeds=int(trials["seed"].nunique()),
                objective=goal,
                unread=ignored,
            )
        )
    configurations = _with_promotions(configurations, goal[0])
    ordered = sorted(configurations, key=lambda c: (c.baseline or "", *[sort_key(c.settings[n]) for n in varying]))
    return StudySummary(results, varying, _with_unique_labels(ordered), length, lengths, shown_as)


def _with_promotions(configurations: Sequence[Configuration], metric: str) -> list[Configuration]:
    """The configurations with the seeds by which rivals of theirs were left out, at whatever level."""
    promoted_by: dict[str, frozenset[int]] = {}
    for group in comparable((c for c in configurations if c.baseline is None), metric):
        first = max((c.first_skipped_seed or 0 for c in group), default=0)
        promoted_by |= {c.name: frozenset(range(first)) for c in group}
    return [replace(c, promoted_by=promoted_by.get(c.name, frozenset())) for c in configurations]


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


def _heldout(results: Results, trials: pd.DataFrame, length: int | None) -> list[dict[str, Values]]:
    """Held-out values by configuration: of finished trials at their last step, of all at step 0, and at their start."""
    rows = with_scores(_heldout_rows(results), results.scores)
    last = rows[(rows["step"] == rows.groupby("trial_id")["step"].transform("max")) & (rows["step"] > 0)]
    finished = trials[trials["status"] == "finished"]
    starts = _starts(rows, trials)
    parts = ((last, finished), (rows[rows["step"] == 0], trials), (rows[rows["step"] == starts], trials))
    return [_by_configuration(part, of_trials, length) for part, of_trials in parts]


def _starts(rows: pd.DataFrame, trials: pd.DataFrame) -> pd.Series[float]:
    """The step at which the method of each row's trial begins."""
    # No rows at all would else be of the type of identifiers.
    return rows["trial_id"].map(trials.set_index("trial_id")["warm_start_steps"]).astype(float).fillna(0.0)


def with_scores(rows: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Rows of `evaluations` with their values as `Score`, where those of sequences are recorded."""
    keys = ["trial_id", "step", "benchmark", "metric", "position"]
    return _as_scores(rows.merge(scores[[*keys, *LISTS]], on=keys, how="left"), "value")


def _as_scores(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The table with the numbers of a column as `Score`, where its `LISTS` are those of sequences."""
    cells = table[[column, *LISTS]].to_numpy(dtype=object).tolist()
    values = [value if isinstance(parts[0], float) else Score(value, *parts) for value, *parts in cells]
    return table.assign(**{column: pd.Series(values, index=table.index, dtype=object)})


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


def _validation(results: Results) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Metric -> trial -> value of the validation split: the last one, and that at the end of the warm start.

    Without a warm start the method begins at step 0.
    """
    rows = results.metrics.sort_values("step")
    names = [name for name, entry in METRICS.items() if entry.is_objective and name in rows]
    starts = _starts(rows, results.trials)
    tables = []
    for part in (rows, rows[rows["step"] == starts]):
        last = part.groupby("trial_id")[names].last()
        tables.append({name: {str(k): float(v) for k, v in last[name].dropna().items()} for name in names})
    return tables[0], tables[1]


def _by_seed(values: dict[str, dict[str, float]], seeds: dict[str, int]) -> dict[str, BySeed]:
    return {
        metric: {seed: of_trial[trial] for trial, seed in seeds.items() if trial in of_trial}
        for metric, of_trial in values.items()
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
