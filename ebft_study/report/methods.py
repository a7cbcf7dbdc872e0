"""The table of methods of the report: the rows and columns of `analysis.methods` as text."""

from __future__ import annotations

from dataclasses import dataclass

from ebft_study import text
from ebft_study.analysis.methods import Column, Method, Task, tasks
from ebft_study.analysis.summary import StudySummary
from ebft_study.report.content import NAMES, SCORE_NAMES


@dataclass(frozen=True)
class MethodTable:
    """The methods of one task, as text."""

    label: str
    notes: str
    """What the table leaves out."""
    columns: list[str]
    rows: list[tuple[str, str, str, str, list[str]]]
    """Method, configurations, seeds, training sequences, and a value per column."""


def method_tables(study: StudySummary) -> list[MethodTable]:
    """A table per task; none for a study without benchmarks."""
    return [_table(task) for task in tasks(study)]


def column_name(column: Column) -> str:
    """`CE`, `mini: pass@1`."""
    if not column.benchmark:
        return NAMES[column.metric]
    return f"{column.benchmark}: {SCORE_NAMES[column.metric].format(k=column.position)}"


def _table(task: Task) -> MethodTable:
    notes = []
    if task.unchosen:
        notes.append(f"Nothing chooses between the configurations of {text.listed(list(task.unchosen))}.")
    if not task.has_one_map:
        notes.append("The methods measure CFM by different feature maps.")
    rows = [
        (name, *_of_training(method), [method.mean(column).as_level() for column in task.columns])
        for name, method in task.methods.items()
    ]
    return MethodTable(task.label, " ".join(notes), [column_name(column) for column in task.columns], rows)


def _of_training(method: Method) -> tuple[str, str, str]:
    """Configurations, seeds and training sequences of a method; nothing of a start."""
    if method.selected is None:
        return text.NOTHING, text.NOTHING, text.NOTHING
    chosen = method.selected.configurations
    seen = sorted({c.sequences_seen for c in chosen})
    return (
        "; ".join(c.label for c in chosen),
        text.count(len(method.selected.by_seed)),
        " to ".join(text.count(n) for n in dict.fromkeys((seen[0], seen[-1]))) if seen else text.NOTHING,
    )
