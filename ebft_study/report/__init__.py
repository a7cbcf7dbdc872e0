"""Reports of studies: figures, the paper's claims put to the test, one HTML file.

    ebft_study.report.write_report(Path("studies/quickstart"))

The parts are usable alone, in a notebook for instance, on the `StudySummary` of `ebft_study.analysis.summary`:
`claims.judge(summary)` gives the verdicts, `figures.draw_all(summary)` the figures. Importing this package imports
none of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ebft_study.storage import Location, StoragePath, storage_path

if TYPE_CHECKING:
    from ebft_study.report.table import Table


def write_report(study_folder: Location) -> Path | StoragePath:
    """Write `report.html` and `figures/` into the study's folder from its results; returns the HTML file."""
    from ebft_study.report.page import write  # pandas and matplotlib take a second that others need not pay

    return write(storage_path(study_folder))


def tables(study_folder: Location) -> dict[str, Table]:
    """The tables of a study's report that can be copied, by name."""
    from ebft_study.analysis.summary import summarize
    from ebft_study.report import collected
    from ebft_study.results import load

    return collected.tables(summarize(load(study_folder)))


__all__ = ["tables", "write_report"]
