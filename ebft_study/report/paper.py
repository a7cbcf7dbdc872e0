"""The section of the report that puts the paper's numbers beside the study's: levels, orders of methods, pairs.

The six claims of `ordering` test what the paper says of its methods. Here stands what it measured: each of its columns
beside the study's and, for every pair of methods that the paper orders, whether this study orders it alike. A pair is
told apart when its p-value survives Holm's correction for all pairs of all orders on the page.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ebft_study import text
from ebft_study.analysis import paper
from ebft_study.analysis.beside_paper import Beside, Quantity, beside, deviations
from ebft_study.analysis.configuration import grouped
from ebft_study.analysis.methods import BASE, WARM_START
from ebft_study.analysis.statistics import CONFIDENCE, Interval, holm
from ebft_study.analysis.summary import StudySummary
from ebft_study.report.content import NAMES, SCORE_NAMES
from ebft_study.report.table import Table, slug
from ebft_study.report.verdicts import Ruling, decide, unless_stopped

SILENCE = "The paper states no number of seeds and no uncertainty, so its order of methods that are close may be luck."
RULINGS: tuple[Ruling, ...] = ("agrees", "disagrees", "cannot tell")


@dataclass(frozen=True)
class Pair:
    """Two methods that the paper orders, and whether the study agrees; the p-value is corrected."""

    better: str
    worse: str
    gap: Interval
    """The study's better minus worse, by the names of the paper's order."""
    ruling: Ruling
    p_value: float


@dataclass(frozen=True)
class Order:
    """The methods of a task by one quantity."""

    task: Beside
    quantity: Quantity
    pairs: tuple[Pair, ...]

    def count(self, ruling: Ruling) -> int:
        return sum(pair.ruling == ruling for pair in self.pairs)


@dataclass(frozen=True)
class Section:
    """What the page shows: a sentence on all pairs, tables of levels, orders, and the pairs that can be told apart."""

    summary: str
    notes: list[str]
    levels: list[Table]
    orders: Table
    pairs: Table | None

    @property
    def tables(self) -> list[Table]:
        return [self.orders, *([self.pairs] if self.pairs else []), *self.levels]


def orders(tasks: Sequence[Beside]) -> list[Order]:
    """The orders by CE, FM and the score of one sampled answer, each pair corrected for the number of all of them."""
    chosen = [(task, quantity) for task in tasks for quantity in task.quantities if _is_ordered(quantity)]
    tested = [[_tested(quantity, *pair) for pair in quantity.pairs()] for _, quantity in chosen]
    adjusted = iter(holm([pair.p_value for pairs in tested for pair in pairs]))
    return [
        Order(task, quantity, tuple(_corrected(pair, next(adjusted)) for pair in pairs))
        for (task, quantity), pairs in zip(chosen, tested, strict=True)
    ]


def _is_ordered(quantity: Quantity) -> bool:
    return not quantity.column.benchmark or quantity.column.is_sampled_once


def _tested(quantity: Quantity, better: str, worse: str) -> Pair:
    """The direction in which the study's difference points, with its own p-value."""
    gap = quantity.gap(better, worse)
    about = [s for name in (better, worse) if (s := quantity.methods[name].selected) is not None]
    finding = decide([(gap, "below" if quantity.is_better_below else "above")], "", *about)
    for each in about:
        finding = unless_stopped(finding, each)
    return Pair(better, worse, gap, finding.ruling, finding.p_value)


def _corrected(pair: Pair, p_value: float) -> Pair:
    ruling: Ruling = pair.ruling if p_value < 1 - CONFIDENCE else "cannot tell"
    return Pair(pair.better, pair.worse, pair.gap, ruling, p_value)


def section(study: StudySummary) -> Section | None:
    """The section; None for a study that has none of the paper's tasks."""
    tasks = beside(study)
    ordered = orders(tasks)
    if not ordered:
        return None
    return Section(
        summary(ordered),
        [_note(task) for task in tasks],
        [table for task in tasks for table in _levels(task, several=len(tasks) > 1)],
        _order_table(ordered),
        _pair_table(ordered),
    )


def summary(ordered: Sequence[Order]) -> str:
    """How many pairs agree, disagree and cannot be told apart, in sentences."""
    pairs = [pair for order in ordered for pair in order.pairs]
    n_tests = sum(not math.isnan(pair.p_value) for pair in pairs)
    if not n_tests:
        return (
            f"The paper orders {len(pairs)} pairs of methods; one seed allows no interval, so this study orders none."
        )
    trained = [pair for pair in pairs if not {pair.better, pair.worse} & {BASE, WARM_START}]
    return (
        f"Of {len(pairs)} pairs of methods that the paper orders, this study {_counts(pairs)}, after Holm's "
        f"correction for {n_tests} tests. Of the {len(trained)} among them without {BASE} and {WARM_START}, which most "
        f"training beats, it {_counts(trained)}. {SILENCE}"
    )


def _counts(pairs: Sequence[Pair]) -> str:
    agrees, disagrees, open_ = (sum(pair.ruling == ruling for pair in pairs) for ruling in RULINGS)
    return f"agrees on {agrees}, disagrees on {disagrees} and cannot tell {open_}"


def _note(task: Beside) -> str:
    """Whether levels compare, why not, and what was trained otherwise."""
    reasons = [quantity.obstacles for quantity in task.quantities]
    if all(reasons):
        shared = [reason for reason in reasons[0] if all(reason in others for others in reasons)]
        return f"{task.task.title}: orders alone compare, levels do not: {'; '.join(shared or reasons[0])}."
    groups = grouped((quantity for quantity in task.quantities if quantity.obstacles), lambda q: q.obstacles)
    parts = [f"{text.listed([_name(q) for q in group])} does not ({'; '.join(why)})" for why, group in groups.items()]
    unlike = deviations(task)
    parts += [f"trained otherwise than in the paper: {'; '.join(unlike)}"] if unlike else []
    return f"{'; '.join([f'{task.task.title}: levels compare', *parts])}."


def _levels(task: Beside, *, several: bool) -> list[Table]:
    """A table for the losses and for each benchmark: the paper's levels, ours and, where they compare, differences."""
    tables = []
    label = f" ({task.label})" if several and task.label else ""
    for (_, place, is_comet), group in grouped(task.quantities, _table_of).items():
        names = [name for name in group[0].methods if all(name in q.methods for q in group)]
        about = _benchmark(group[0]) if group[0].column.benchmark else "losses"
        what = f"{task.task.title}{label}, {about}"
        stem = slug(f"paper_{what}{'_comet' * is_comet}")
        headings = [f"{_short(q)}: {whose}" for q in group for whose in ("paper", "ours")]
        levels = {name: [(text.number(q.published[name]), q.level(name).as_level()) for q in group] for name in names}
        rows = [(name, *itertools.chain(*pairs)) for name, pairs in levels.items()]
        caption = f"{what}: {place} of the paper, and ours ± half-width of the 95 % interval."
        tables.append(Table(stem, caption, ("Method", *headings), tuple(rows)))
        comparable = [q for q in group if not q.obstacles]
        if comparable:
            rows = [(name, *(q.difference(name).as_difference() for q in comparable)) for name in names]
            caption = (
                f"{what}: ours minus the paper's ({place}) ± half-width of our 95 % interval. {BASE} is one model in "
                "both: where its row differs, the quantity is measured otherwise."
            )
            tables.append(Table(f"{stem}_difference", caption, ("Method", *map(_short, comparable)), tuple(rows)))
    return tables


def _table_of(quantity: Quantity) -> tuple[str, str, bool]:
    """Quantities of one benchmark are a table, COMET apart from BLEU."""
    return quantity.column.benchmark, quantity.place, "comet" in quantity.column.metric


def _order_table(ordered: Sequence[Order]) -> Table:
    rows = [
        (
            f"{order.task.task.title}: {_name(order.quantity)}",
            " > ".join(order.quantity.published_order()),
            " > ".join(order.quantity.order()),
            text.number(order.quantity.rank_agreement(), 2),
            *(text.count(order.count(ruling)) for ruling in RULINGS),
        )
        for order in ordered
    ]
    caption = (
        "Methods from the best to the worst. Rank agreement is Kendall's tau-b between the paper's values and our "
        "means: 1 for one order, 0 for unrelated ones, −1 for opposite ones; it says nothing of uncertainty. Pairs "
        "that the paper orders count by the sign of our difference, paired by seed, corrected for all pairs here."
    )
    columns = ("Quantity", "Paper's order", "Our order", "Rank agreement", "Agree", "Disagree", "Cannot tell")
    return Table("paper_orders", caption, columns, tuple(rows))


def _pair_table(ordered: Sequence[Order]) -> Table | None:
    rows = [
        (
            f"{order.task.task.title}: {_name(order.quantity)}",
            f"{pair.better} before {pair.worse}",
            text.signed(order.quantity.published[pair.better] - order.quantity.published[pair.worse], 3),
            pair.gap.as_difference(),
            pair.ruling,
        )
        for order in ordered
        for pair in sorted(order.pairs, key=lambda pair: RULINGS.index(pair.ruling), reverse=True)
        if pair.ruling != "cannot tell"
    ]
    caption = "Pairs that this study tells apart, in the paper's order; differences are of the first minus the second."
    columns = ("Quantity", "Pair", "Paper's difference", "Our difference", "Ruling")
    return Table("paper_pairs", caption, columns, tuple(rows)) if rows else None


def _name(quantity: Quantity) -> str:
    """`CE`, `HumanEval: pass@1`, `mini: pass@1`."""
    return f"{_benchmark(quantity)}: {_short(quantity)}" if quantity.column.benchmark else _short(quantity)


def _benchmark(quantity: Quantity) -> str:
    title = quantity.column.benchmark
    if title != paper.MEAN:
        return title
    return (
        "mean of benchmarks"
        if quantity.benchmark not in {task.miniature[1] for task in paper.TASKS}
        else quantity.benchmark
    )


def _short(quantity: Quantity) -> str:
    metric = quantity.column.metric
    return SCORE_NAMES[metric].format(k=quantity.column.position) if metric in SCORE_NAMES else NAMES[metric]
