"""The paper's ordering of methods (Table 1) put to the test, where a study has benchmarks and several methods.

Each claim is tested in every task that has its methods, from the base model and from a warm start, on each benchmark;
see `verdicts` for the rulings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ebft_study import text
from ebft_study.analysis.methods import BASE, WARM, Column, Method, Task, tasks
from ebft_study.analysis.statistics import Interval, mean_interval, paired_difference
from ebft_study.analysis.summary import StudySummary
from ebft_study.report.methods import column_name
from ebft_study.report.verdicts import Finding, Side, Verdict, decide, in_all, lacks, undecided, unless_stopped, verdict

SCORE_MARGIN = 0.02
"""Difference of scores, on a scale from 0 to 1, below which one counts as high as the other."""
SCORE, CE, CFM = "score of one sampled answer", "cross-entropy", "feature-matching loss"
Pair = tuple[str, str]
"""Names of two methods: the first minus the second."""


@dataclass(frozen=True)
class Claim:
    """A claim on the difference of two methods, or of two such differences, in a kind of column."""

    statement: str
    reference: str
    of: str
    side: Side
    comparisons: tuple[tuple[Pair, ...], ...]
    """Each is tested, where the study has its methods: a pair, or two whose differences are compared."""
    margin: float = 0.0


def _from_each_start(left: str, right: str) -> tuple[tuple[Pair, ...], ...]:
    return ((left, right),), ((left + WARM, right + WARM),)


def _against_one(left: str, right: str) -> tuple[tuple[Pair, ...], ...]:
    return ((left, right),), ((left + WARM, right),)


GAINS_FROM_WARM_START = ("RLVR" + WARM, "RLVR"), ("EBFT" + WARM, "EBFT")
CLAIMS = (
    Claim("EBFT scores higher on benchmarks than SFT.", "Table 1", SCORE, "above", _against_one("EBFT", "SFT")),
    Claim(
        f"EBFT scores as high on benchmarks as RLVR, or higher (margin {SCORE_MARGIN:g}).",
        "Table 1", SCORE, "above", _from_each_start("EBFT", "RLVR"), margin=-SCORE_MARGIN,
    ),
    Claim("RLVR raises the cross-entropy above the base model's.", "Figure 3, Table 1", CE, "above",
          _against_one("RLVR", BASE)),
    Claim("EBFT reaches a lower cross-entropy than RLVR.", "Figure 3, Table 1", CE, "below",
          _from_each_start("EBFT", "RLVR")),
    Claim("EBFT reaches a lower feature-matching loss than RLVR.", "Figure 3, Table 1", CFM, "below",
          _from_each_start("EBFT", "RLVR")),
    Claim("RLVR gains more from a warm start than EBFT.", "Section H.1, Table 1", SCORE, "above",
          (GAINS_FROM_WARM_START,)),
)  # fmt: skip


def verdicts(study: StudySummary) -> list[Verdict]:
    """A verdict per claim, not yet corrected for their number; none for a study without benchmarks."""
    all_tasks = tasks(study)
    return [_verdict(claim, all_tasks) for claim in CLAIMS] if all_tasks else []


def _verdict(claim: Claim, all_tasks: Sequence[Task]) -> Verdict:
    findings = [finding for task in all_tasks for finding in _findings(claim, task)]
    return verdict(claim.statement, claim.reference, in_all(findings) or _lacking(claim, all_tasks))


def _findings(claim: Claim, task: Task) -> Iterator[tuple[str, Finding]]:
    for names in claim.comparisons:
        if _missing(names, task):
            continue
        pairs = [(task.methods[one], task.methods[other]) for one, other in names]
        methods = [method for pair in pairs for method in pair]
        about = [method.selected for method in methods if method.selected is not None]
        for column in _columns(claim.of, task):
            if all(column in method.values for method in methods):
                sentence, gap = _difference(pairs, column)
                finding = decide([(gap.minus(claim.margin), claim.side)], sentence, *about)
                yield ", ".join(filter(None, (task.label, column_name(column)))), unless_stopped(finding, *about)


def _difference(pairs: Sequence[tuple[Method, Method]], column: Column) -> tuple[str, Interval]:
    """The difference of a pair, or of the differences of two, with its numbers in words."""
    dependent = any(method.is_choice for pair in pairs for method in pair)
    differences = [one.minus(other, column) for one, other in pairs]
    if len(pairs) == 1:
        gap = mean_interval(differences[0].values(), dependent=dependent)
        parts = [f"{method.name} {method.mean(column).as_level()}" for method in pairs[0]]
    else:
        gap = paired_difference(*differences, dependent=dependent)
        parts = [
            f"{one.name} minus {other.name} {mean_interval(d.values(), dependent=dependent).as_difference()}"
            for (one, other), d in zip(pairs, differences, strict=True)
        ]
    return f"{column_name(column)}: {', '.join(parts)}; difference {gap.in_words()}.", gap


def _columns(of: str, task: Task) -> list[Column]:
    """The columns of a task that a claim is about: of scores, those of one sampled answer."""
    if of == SCORE:
        return [column for column in task.columns if column.is_sampled_once]
    names = ("ce_answer_loss", "ce_loss") if of == CE else ("cfm_loss",)
    return [column for column in task.columns if column.metric in names]


def _missing(names: Sequence[Pair], task: Task) -> list[str]:
    return [name for pair in names for name in pair if name not in task.methods]


def _lacking(claim: Claim, all_tasks: Sequence[Task]) -> Finding:
    """What no task has: the methods that the nearest comparison lacks, or a value that can be compared."""
    missing, task = min(
        ((_missing(names, task), task) for task in all_tasks for names in claim.comparisons), key=lambda m: len(m[0])
    )
    unchosen = [name for name in missing if name in task.unchosen]
    if unchosen:
        several = text.listed(unchosen)
        return undecided(f"{several}: of several configurations, no validation values of the objective choose one.")
    if missing:
        return lacks(text.listed(missing))
    maps = "" if task.has_one_map or claim.of != CFM else ": they measure it by different feature maps"
    return undecided(f"The methods have no {claim.of} that can be compared{maps}.")
