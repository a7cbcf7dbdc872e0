"""The methods of a study beside each other, as in the paper's Table 1: losses on held-out data, scores on benchmarks.

A row is a method from the base model or from a warm start (ws.), or one of these starts. Where a method has several
configurations, such as learning rates, each seed is scored by the one that the other seeds choose
(`analysis.selection.select`), by the study's objective on the validation split.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ebft_study import text
from ebft_study.analysis.configuration import BySeed, Configuration, Values, grouped
from ebft_study.analysis.selection import Selected, comparable, select
from ebft_study.analysis.statistics import Interval, mean_interval
from ebft_study.analysis.summary import StudySummary

BASE, WARM_START = "Base", "Warm start"
NAMES = {"sft": "SFT", "ebft": "EBFT", "rlvr": "RLVR"}
WARM = " (ws.)"
ORDER = (BASE, WARM_START, "SFT", "EBFT", f"EBFT{WARM}", "RLVR", f"RLVR{WARM}")
LOSSES = ("ce_answer_loss", "ce_loss", "cfm_loss")
OF_ANSWERS = ("greedy_pass_rate", "pass_at_k", "greedy_bleu", "best_of_k_bleu", "greedy_comet", "best_of_k_comet")


class Column(NamedTuple):
    """A number of the table: of a benchmark, or of the held-out split where that is empty."""

    benchmark: str
    metric: str
    position: int | None

    @property
    def is_sampled_once(self) -> bool:
        """Whether it scores one sampled answer: pass@1, or the mean."""
        return self.position == 1


_Scores = dict[tuple[str, str], dict[Column, float]]
"""Trial and moment (`StudySummary.benchmark_rows`) -> scores."""


@dataclass(frozen=True)
class Method:
    """A row: values by seed, and the configuration of each seed; None for the base model and the warm start."""

    name: str
    values: Mapping[Column, BySeed]
    selected: Selected | None = None

    @property
    def is_choice(self) -> bool:
        return self.selected is not None and self.selected.is_choice

    def mean(self, column: Column) -> Interval:
        return mean_interval(self.values.get(column, {}).values(), dependent=self.is_choice)

    def minus(self, other: Method, column: Column) -> BySeed:
        """Differences at the seeds that both have."""
        ours, theirs = self.values.get(column, {}), other.values.get(column, {})
        return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}

    def gap(self, other: Method, column: Column) -> Interval:
        """The mean over seeds of `minus`."""
        return mean_interval(self.minus(other, column).values(), dependent=other.is_choice or self.is_choice)


@dataclass(frozen=True)
class Task:
    """The methods that were trained from one model on one data set; `label` tells it from the study's others."""

    label: str
    columns: tuple[Column, ...]
    methods: Mapping[str, Method]
    unchosen: tuple[str, ...]
    """Methods with several configurations, between which no validation values can choose."""
    has_one_map: bool
    """Whether all methods measure CFM by one feature map; else no column has it."""


@functools.lru_cache(maxsize=1)
def tasks(study: StudySummary) -> tuple[Task, ...]:
    """A table per task with several methods; none for a study without benchmarks."""
    benchmarks = _benchmark_scores(study)
    if not benchmarks:
        return ()
    groups = grouped((c for c in study.configurations if c.is_scored), lambda c: c.base_of("ce_loss"))
    made = (_task(study.map_label(key), group, benchmarks) for key, group in groups.items())
    return tuple(task for task in made if sum(method.selected is not None for method in task.methods.values()) > 1)


def _task(label: str, configurations: list[Configuration], benchmarks: _Scores) -> Task:
    candidates = grouped((c for c in configurations if c.is_measured), _name)
    chosen = {name: select(group, group[0].objective[0]) for name, group in candidates.items()}
    selections = {name: selected for name, selected in chosen.items() if selected is not None and selected.by_seed}
    pairs = {name: list(selected.by_seed.items()) for name, selected in selections.items()}
    methods = [Method(name, _values(pairs[name], "end", benchmarks), selected) for name, selected in selections.items()]
    methods.append(Method(BASE, _values(itertools.chain(*pairs.values()), "base", benchmarks)))
    warm = [pair for name in pairs if name.endswith(WARM) for pair in pairs[name]]
    if len({_warm_start(c) for _, c in warm}) == 1:
        methods.append(Method(WARM_START, _values(warm, "start", benchmarks)))
    methods.sort(key=lambda method: ORDER.index(method.name) if method.name in ORDER else len(ORDER))
    every = [c for selected in selections.values() for c in selected.configurations]
    has_one_map = len(comparable(every, "cfm_loss", at_one_length=True)) <= 1
    unchosen = tuple(name for name, selected in chosen.items() if selected is None)
    columns = tuple(c for c in _columns(methods) if has_one_map or c.metric != "cfm_loss")
    return Task(label, columns, {method.name: method for method in methods}, unchosen, has_one_map)


def _name(c: Configuration) -> str:
    method = str(c.settings.get("method"))
    is_warm = c.warm_start_steps > 0 and method != "sft"
    return NAMES.get(method, method) + WARM * is_warm


def _warm_start(c: Configuration) -> tuple[object, ...]:
    rate = c.settings.get("warm_start_learning_rate") or c.settings.get("learning_rate")
    return c.warm_start_steps, rate, c.settings.get("batch_size")


def _columns(methods: list[Method]) -> list[Column]:
    """Losses, then each benchmark's scores; the cross-entropy of answers where every method has it, else of all."""
    shown = {column for method in methods for column in method.values}
    trained = [method for method in methods if method.selected is not None]
    of_answers, of_all = (Column("", metric, None) for metric in ("ce_answer_loss", "ce_loss"))
    shown -= {of_all if all(of_answers in method.values for method in trained) else of_answers}
    order = (*LOSSES, *OF_ANSWERS)
    return sorted(shown, key=lambda c: (c.benchmark, order.index(c.metric), c.position or 0))


def _values(chosen: Iterable[tuple[int, Configuration]], moment: str, benchmarks: _Scores) -> dict[Column, BySeed]:
    """Values of a moment (base, start, end) by column, at each seed those of its configuration."""
    values: dict[Column, BySeed] = {}
    for seed, c in chosen:
        losses: Values = {"end": c.final, "base": c.base, "start": c.start}[moment]
        measured = {Column("", metric, None): losses.get((metric, None), {}).get(seed) for metric in LOSSES}
        for trial in c.finished.loc[c.finished["seed"] == seed, "trial_id"]:
            measured |= benchmarks.get((str(trial), moment), {})
        for column, value in measured.items():
            if value is not None:
                values.setdefault(column, {})[seed] = value
    return values


def _benchmark_scores(study: StudySummary) -> _Scores:
    rows, names = study.benchmark_rows, ["trial_id", "moment", "benchmark", "metric", "position", "value"]
    rows = rows.loc[rows["metric"].isin(OF_ANSWERS) & (rows["moment"] != ""), names]
    scores: _Scores = {}
    for trial, moment, benchmark, metric, at, value in rows.to_numpy(dtype=object).tolist():
        column = Column(str(benchmark), str(metric), None if text.is_missing(at) else int(at))
        scores.setdefault((str(trial), moment), {})[column] = value
    return scores
