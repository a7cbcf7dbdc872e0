"""Results of studies: tables (schema), metrics (metrics), writing (writer, study_recorder), reading (reader).

    results = ebft_study.results.load("quickstart")     # a name in ./studies, a folder, or a URL
    results.trials, results.metrics, results.evaluations, results.samples, results.events    # pandas data frames
    ebft_study.results.catalog("studies").sql("SELECT ... FROM trials")      # all studies of a folder, with DuckDB

Importing this package imports neither pandas nor pyarrow: they are loaded when the first file is touched.
"""

from ebft_study.results.compaction import compact
from ebft_study.results.database import catalog
from ebft_study.results.fence import Fence
from ebft_study.results.metrics import METRICS, Metric, metric
from ebft_study.results.reader import (
    Results,
    cell_value,
    check_table,
    find_in,
    find_study,
    load,
    read_table,
    studies_in,
)
from ebft_study.results.schema import SKIPPED, TABLES
from ebft_study.results.study_recorder import StudyRecorder
from ebft_study.results.writer import TrialRecorder

__all__ = [
    "METRICS",
    "SKIPPED",
    "TABLES",
    "Fence",
    "Metric",
    "Results",
    "StudyRecorder",
    "TrialRecorder",
    "catalog",
    "cell_value",
    "check_table",
    "compact",
    "find_in",
    "find_study",
    "load",
    "metric",
    "read_table",
    "studies_in",
]
