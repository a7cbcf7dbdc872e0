"""The tables of methods of the report: the rows and columns of `analysis.methods` as text."""

from __future__ import annotations

from ebft_study import text
from ebft_study.analysis.methods import Column, Method, Task, tasks
from ebft_study.analysis.summary import StudySummary
from ebft_study.report.content import NAMES, SCORE_NAMES
from ebft_study.report.table import Table, slug


def method_tables(study: StudySummary) -> list[Table]:
    """A table per task; none for a study without benchmarks."""
    return [_table(task, study.objective[0]) for task in tasks(study)]


def column_name(column: Column) -> str:
    """`CE`, `mini: pass@1`."""
    if not column.benchmark:
        return NAMES[column.metric]
    return f"{column.benchmark}: {SCORE_NAMES[column.metric].format(k=column.position)}"


def _table(task: Task, objective: str) -> Table:
    notes = [
        f"{task.label}: means" if task.label else "Means",
        "over seeds ± half-width of the 95 % interval over seeds, and over held-out sequences or problems where they "
        "are known. Losses are held-out ones, better when lower; scores are from 0 to 1, at the end of training. "
        "(ws.): from a warm start. Of several configurations, each seed is scored by the one that the other seeds "
        f"choose by validation {objective}. Sequences are those of all training, warm start included.",
    ]
    if task.unchosen:
        notes.append(f"Nothing chooses between the configurations of {text.listed(list(task.unchosen))}.")
    if not task.has_one_map:
        notes.append("The methods measure CFM by different feature maps.")
    rows = [
        (name, *_of_training(method), *(method.mean(column).as_level() for column in task.columns))
        for name, method in task.methods.items()
    ]
    columns = ("Method", "Configuration", "Seeds", "Sequences", *map(column_name, task.columns))
    return Table(slug(f"methods_{task.label}"), " ".join(notes), columns, tuple(rows))


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
