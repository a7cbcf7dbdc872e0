"""All tables of a report that can be copied, by name: for notebooks, and for the archive of a study."""

from __future__ import annotations

from collections.abc import Sequence

from ebft_study.analysis.summary import StudySummary
from ebft_study.report import content, methods, paper
from ebft_study.report.table import Table, slug


def tables(study: StudySummary) -> dict[str, Table]:
    """Outcomes of the configurations, scores on benchmarks, methods, and the paper beside the study."""
    section = paper.section(study)
    each = [
        outcomes(study),
        *map(_benchmark, content.benchmark_tables(study)),
        *methods.method_tables(study),
        *(section.tables if section else ()),
    ]
    return {table.name: table for table in each}


def outcomes(study: StudySummary, lines: Sequence[content.ConfigurationRow] | None = None) -> Table:
    """Held-out values of configurations, and differences to the base model and to SFT.

    Args:
        lines: those of the table; default: all.
    """
    rows = [
        (
            row.label,
            row.seeds,
            row.validation,
            *(part[metric] for part in (row.levels, row.to_base, row.to_sft) for metric in study.compared),
        )
        for row in (content.configuration_rows(study) if lines is None else lines)
    ]
    kinds = [f"{content.NAMES[metric]}{versus}" for versus in ("", " − base", " − SFT") for metric in study.compared]
    which = "all" if lines is None or not content.omitted(study) else "the best"
    caption = f"Held-out values of {which} configurations: means over seeds ± half-width of the 95 % interval."
    columns = ("Configuration", "Seeds", f"Validation {study.objective[0]}", *kinds)
    return Table("outcomes", caption, columns, tuple(rows))


def _benchmark(scores: content.BenchmarkTable) -> Table:
    caption = f"{scores.name}: means over seeds ± half-width of the 95 % interval over seeds and problems."
    rows = tuple((label, seeds, *values) for label, seeds, values in scores.rows)
    return Table(slug(f"benchmark_{scores.name}"), caption, ("Configuration", "Seeds", *scores.columns), rows)
