"""The paper's numbers beside a study's, by task, benchmark and method: which levels compare, and how both rank methods.

**Which task.** A study's task is one of the paper's where its data set is the paper's, or the generated one of the same
kind (`paper.Task.miniature`).

**Which column.** Losses stand beside Table 1. A benchmark of the paper stands beside its columns in Table 6; where a
study has all benchmarks of a task, their mean stands beside Table 1, as does the generated benchmark.

**Which levels compare** (`Quantity.obstacles` is empty): model (family and size) and data set are the paper's, and

- CE is that of answers, where the data have answers;
- FM has the paper's feature map and is measured at the completion length and temperature of its training (Table 2);
- scores are of the paper's benchmark, all of its problems, sampled at temperature 0.6; not of translations, as the
  paper does not name their language pairs.

Settings of training may differ: `deviations` names those of Tables 2, 4 and 5 and of the paper's sweeps that do.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from ebft_study import text
from ebft_study.analysis import methods, paper
from ebft_study.analysis.configuration import BySeed, Configuration
from ebft_study.analysis.methods import Column, Method
from ebft_study.analysis.statistics import Interval, pooled
from ebft_study.analysis.summary import StudySummary
from ebft_study.results import METRICS

FEATURES = {
    "feature_network": "base",
    "depths": (0.25, 0.5, 0.75),
    "pooling": "last_token",
    "normalize": "per_layer",
}
"""The paper's feature map (section 2.1)."""


@dataclass(frozen=True)
class Quantity:
    """A column of the paper beside a study's; `methods` are those that both have, with their values in `column`."""

    column: Column
    """By the paper's names."""
    benchmark: str
    """The study's benchmark; empty for losses."""
    place: str
    published: Mapping[str, float]
    methods: Mapping[str, Method]
    obstacles: tuple[str, ...]
    """The reasons why levels cannot be compared."""

    @property
    def is_better_below(self) -> bool:
        return METRICS[self.column.metric].direction == "min"

    def level(self, method: str) -> Interval:
        return self.methods[method].mean(self.column)

    def difference(self, method: str) -> Interval:
        """The study's level minus the paper's, which the paper gives no uncertainty."""
        return self.level(method).minus(self.published[method])

    def gap(self, one: str, other: str) -> Interval:
        """The study's difference of two methods, paired by seed."""
        return self.methods[one].gap(self.methods[other], self.column)

    def published_order(self) -> list[str]:
        """Methods by the paper, the best first."""
        return _order(self.published, self.is_better_below)

    def order(self) -> list[str]:
        """Methods by the study's means, the best first."""
        return _order({name: self.level(name).mean for name in self.methods}, self.is_better_below)

    def pairs(self) -> list[tuple[str, str]]:
        """Pairs of methods whose values differ in the paper, the better one first."""
        return [
            (better, worse)
            for better, worse in itertools.combinations(self.published_order(), 2)
            if self.published[better] != self.published[worse]
        ]

    def rank_agreement(self) -> float:
        """Kendall's tau-b between the paper's values and the study's means: 1 for one order, -1 for opposite ones."""
        from scipy.stats import kendalltau  # takes half a second to import

        names = list(self.methods)
        return float(kendalltau([self.published[n] for n in names], [self.level(n).mean for n in names]).statistic)


@dataclass(frozen=True)
class Beside:
    """One task of a study beside that of the paper."""

    task: paper.Task
    label: str
    """Tells the task from the study's others."""
    quantities: tuple[Quantity, ...]
    configurations: tuple[Configuration, ...]

    @property
    def compares(self) -> bool:
        """Whether any level can be compared."""
        return any(not quantity.obstacles for quantity in self.quantities)


@functools.lru_cache(maxsize=1)
def beside(study: StudySummary) -> tuple[Beside, ...]:
    """The tasks of a study that the paper has, too; none for a study without benchmarks."""
    return tuple(each for task in methods.tasks(study) if (each := _beside(study, task)) and each.quantities)


def _beside(study: StudySummary, task: methods.Task) -> Beside | None:
    selections = [method.selected for method in task.methods.values() if method.selected is not None]
    configurations = tuple({c.name: c for each in selections for c in each.configurations}.values())
    settings = [c.settings for c in configurations]
    name = dataset(settings[0])
    counterpart = next((each for each in paper.TASKS if name in (each.dataset, each.miniature[0])), None)
    if counterpart is None:
        return None
    general = [*_unlike(settings, "model", counterpart.model)] if not _is_model(settings, counterpart) else []
    general += [] if name == counterpart.dataset else [f"the data are {name}, the paper's {counterpart.dataset}"]
    quantities = []
    for column, own, benchmark in _columns(task, counterpart):
        table = paper.table_of(counterpart, column)
        if table is None:
            continue
        published, named = table.values(column), _with(task.methods, column, own)
        both = {n: method for n, method in named.items() if n in published and method.values[column]}
        if len(both) < 2:
            continue
        special = _obstacles(study, counterpart, column, own, benchmark, settings)
        shown = {n: published[n] for n in both}
        quantities.append(Quantity(column, benchmark, table.place, shown, both, (*general, *special)))
    return Beside(counterpart, task.label, tuple(quantities), configurations)


def dataset(settings: Mapping[str, Any]) -> str:
    """The name of a data set without its file: that of a preset where it is one of the paper's."""
    name = str(settings.get("dataset")).partition(":")[0]
    return paper.HUB.get(name, name)


def _is_model(settings: Sequence[Mapping[str, Any]], task: paper.Task) -> bool:
    """Whether all have the paper's model, by hub id or as a folder of its name."""
    return all(PurePosixPath(str(each.get("model"))).name == PurePosixPath(task.model).name for each in settings)


def _columns(task: methods.Task, counterpart: paper.Task) -> Iterator[tuple[Column, list[Column], str]]:
    """Columns of the paper, the study's columns whose mean stands beside each, and the name of their benchmark."""
    for column in task.columns:
        if not column.benchmark:
            loss = "ce_loss" if column.metric == "ce_answer_loss" else column.metric
            yield column._replace(metric=loss), [column], ""
    scores: dict[tuple[str, int | None], dict[str, Column]] = {}
    for column in task.columns:
        if column.benchmark:
            scores.setdefault((column.metric, column.position), {})[column.benchmark] = column
    parts = {title: _named(names, task) for title, names in counterpart.benchmarks.items()}
    groups = {title: names for title, names in parts.items() if names}
    if len(groups) == len(counterpart.benchmarks):
        groups[paper.MEAN] = [name for names in parts.values() for name in names]
    elif counterpart.miniature[1] in _benchmarks(task):
        groups[paper.MEAN] = [counterpart.miniature[1]]
    for title, names in groups.items():
        for score, by_benchmark in scores.items():
            if all(name in by_benchmark for name in names):
                yield Column(title, *score), [by_benchmark[name] for name in names], text.listed(names)


def _benchmarks(task: methods.Task) -> list[str]:
    return list(dict.fromkeys(column.benchmark for column in task.columns if column.benchmark))


def _named(names: Sequence[str], task: methods.Task) -> list[str]:
    """The study's benchmarks that are one of the paper's: all of its languages, or a language pair each."""
    present = _benchmarks(task)
    if len(names) > 1:
        return list(names) if set(names) <= set(present) else []
    return [name for name in present if name == names[0] or (name.startswith(f"{names[0]}_") and "-" in name)]


def _with(named: Mapping[str, Method], column: Column, own: Sequence[Column]) -> dict[str, Method]:
    """The methods with the mean over `own` as `column`, at the seeds that have all."""
    found = {}
    for name, method in named.items():
        values = [method.values.get(each, {}) for each in own]
        seeds = sorted(set.intersection(*(set(each) for each in values)))
        by_seed: BySeed = {seed: pooled([each[seed] for each in values]) for seed in seeds}
        found[name] = replace(method, values={column: by_seed})
    return found


def _obstacles(
    study: StudySummary,
    task: paper.Task,
    column: Column,
    own: Sequence[Column],
    benchmark: str,
    settings: Sequence[Mapping[str, Any]],
) -> Iterator[str]:
    if column.metric == "ce_loss" and task.has_answers and own[0].metric != "ce_answer_loss":
        yield "CE is of all tokens, not of answers"
    if column.metric == "cfm_loss":
        for name, value in FEATURES.items():
            yield from _unlike(settings, name, value)
        if study.length != task.completion_length:
            yield f"FM is at {study.length} tokens, the paper trains on {task.completion_length}"
        measured = [
            {"evaluation_temperature": each.get("evaluation_temperature") or each.get("temperature")}
            for each in settings
        ]
        yield from _unlike(measured, "evaluation_temperature", paper.TEMPERATURE)
    if column.benchmark and benchmark == task.miniature[1]:
        yield f"the benchmark is {benchmark}"
    elif column.benchmark:
        if task is paper.TRANSLATION:
            yield "the paper does not name its language pairs"
        yield from _unlike(settings, "benchmark_problems", None)
        if column.position:
            yield from _unlike(settings, "benchmark_temperature", paper.TEMPERATURE)


def _unlike(settings: Sequence[Mapping[str, Any]], name: str, value: Any) -> Iterator[str]:
    """A sentence on the values of a setting that differ from the paper's."""
    others = list(dict.fromkeys(text.setting(each.get(name)) for each in settings if each.get(name) != value))
    if others:
        yield f"{name} is {text.listed(others)}, the paper's {text.setting(value)}"


def deviations(each: Beside) -> list[str]:
    """The settings of training that the study's methods have otherwise: `SFT: lr 3e-3 (paper: 5e-6 or 1e-5)`."""
    sentences = []
    for method, settings in paper.training(each.task).items():
        chosen = [c.settings for c in each.configurations if c.settings.get("method") == method]
        unlike = []
        for name, values in settings.items():
            others = sorted({s[name] for s in chosen if s.get(name) is not None and s[name] not in values})
            if others:
                tried = " or ".join(map(text.setting, values))
                unlike.append(f"{text.symbol(name)} {text.listed(list(map(text.setting, others)))} (paper: {tried})")
        if unlike:
            sentences.append(f"{methods.NAMES[method]}: {', '.join(unlike)}")
    return sentences


def _order(values: Mapping[str, float], is_better_below: bool) -> list[str]:
    return sorted(values, key=lambda name: values[name] if is_better_below else -values[name])
