"""The paper's results: Tables 1 and 6, every number with its place, and the settings that they were measured at.

    paper.frame()     # a row per number: place, task, method, benchmark, metric, position, value

All scores are from 0 to 1. Greedy answers are at temperature 0, the others at 0.6; training settings are those of
Tables 2, 4 and 5. The paper states no number of seeds, no interval, no nucleus (top-p), no number of samples per
problem, no language pairs of its translation benchmarks, and no length or temperature at which FM was measured.

Where both tables have a score, Table 1's is the mean over the benchmarks of one model per method. Table 6 chooses the
best model for each benchmark instead: its means are as high, or higher (by up to 0.016 for SFT on Q&A coding). Its
cross-entropies are others than Table 1's (0.524 and 0.338 for one base model), which the paper does not explain; in
the warm start's row of translation alone they agree (2.648 and 2.647). So no study is compared with Table 6's.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ebft_study.analysis.methods import Column

if TYPE_CHECKING:
    import pandas as pd

MEAN = "mean"
"""The benchmark of Table 1's scores: the mean over a task's benchmarks."""
TEMPERATURE = 0.6
"""Temperature of all answers that are not greedy."""
KS = (1, 4, 16)


@dataclass(frozen=True)
class Task:
    """A task of the paper, and what stands for it in this project.

    `benchmarks` are the paper's by the names that this project's have before a language pair, or a language each.
    """

    title: str
    model: str
    dataset: str
    miniature: tuple[str, str]
    """The generated data set of the same kind, and the benchmark that goes with it."""
    benchmarks: Mapping[str, tuple[str, ...]]
    completion_length: int
    stride: int
    has_answers: bool = True


MULTIPL_E = tuple(f"multipl_e_{language}" for language in ("cpp", "js", "ts", "rs", "cs", "go", "php", "java"))
QA = Task(
    *("Q&A coding", "Qwen/Qwen2.5-1.5B", "open_code_instruct", ("mini_functions", "mini")),
    {"HumanEval": ("humaneval",), "MBPP": ("mbpp",), "MultiPL-E": MULTIPL_E},
    *(8, 8),
)
UNSTRUCTURED = Task(
    *("Unstructured coding", "Qwen/Qwen2.5-1.5B", "swallow_code", ("mini_unstructured", "mini")),
    {"HumanEval": ("humaneval",), "MBPP": ("mbpp",)},
    *(8, 8),
    has_answers=False,
)
TRANSLATION = Task(
    *("Translation", "meta-llama/Llama-3.2-1B", "alma_human_parallel", ("mini_translation", "mini_translation")),
    {"WMT'22": ("wmt22",), "MTNT": ("mtnt",), "OpenSubtitles": ("opensubtitles",)},
    *(4, 2),
)
TASKS = (QA, UNSTRUCTURED, TRANSLATION)
HUB = {
    "nvidia/OpenCodeInstruct": QA.dataset,
    "tokyotech-llm/swallow-code": UNSTRUCTURED.dataset,
    "haoranxu/ALMA-Human-Parallel": TRANSLATION.dataset,
}


def training(task: Task) -> dict[str, dict[str, tuple[Any, ...]]]:
    """Method -> settings with the values that the paper tried (Tables 2, 4 and 5, sections 2.3 and H.1)."""
    return {
        "ebft": {
            "learning_rate": (1e-6,),
            "batch_size": (16,),
            "sequence_length": (1024,),
            "temperature": (0.6,),
            "n_samples": (4,),
            "completion_length": (task.completion_length,),
            "stride": (task.stride,),
            "whitening": ("variant_i",),
            "alpha": (0.0, 0.5, 1.0),
            "gamma": (0.0, 0.03, 0.1),
        },
        "sft": {"learning_rate": (5e-6, 1e-5), "batch_size": (64, 128), "sequence_length": (2048,)},
        "rlvr": {
            "learning_rate": (1e-6,),
            "batch_size": (128, 256) if task is TRANSLATION else (32, 64),
            "temperature": (1.0,),
            "n_samples": (8,),
        },
    }


@dataclass(frozen=True)
class Table:
    """A part of a table of the paper: values by method and column, None where the paper has a dash. CE is `ce_loss`."""

    place: str
    task: Task
    columns: tuple[Column, ...]
    rows: Mapping[str, tuple[float | None, ...]]

    def values(self, column: Column) -> dict[str, float]:
        """The column's values by method, without dashes."""
        index = self.columns.index(column)
        return {method: value for method, row in self.rows.items() if (value := row[index]) is not None}


def _scores(benchmarks: Sequence[str], greedy: str, sampled: str) -> tuple[Column, ...]:
    of_one = ((greedy, None), *((sampled, k) for k in KS))
    return tuple(Column(benchmark, *each) for benchmark, each in itertools.product(benchmarks, of_one))


def _table(place: str, task: Task, columns: Sequence[Column], text: str) -> Table:
    """A table of rows as printed: the method, then a number, or a dash, per column."""
    rows = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        words = line.split()
        cells = words[-len(columns) :]
        rows[" ".join(words[: -len(columns)])] = tuple(None if cell == "-" else float(cell) for cell in cells)
    return Table(place, task, tuple(columns), rows)


CODE = ("greedy_pass_rate", "pass_at_k")
COMET, BLEU = (("greedy_comet", "best_of_k_comet"), ("greedy_bleu", "best_of_k_bleu"))
CE, FM = Column("", "ce_loss", None), Column("", "cfm_loss", None)
CE_6 = Column("", "ce_of_table_6", None)
"""The cross-entropy of Table 6, which is not that of Table 1."""

TABLES = (
    _table("Table 1, Q&A Coding", QA, (CE, FM, *_scores([MEAN], *CODE)), """
        Base        0.338 0.361 0.484 0.424 0.606 0.715
        Warm start  0.301 0.344 0.483 0.440 0.611 0.723
        SFT         0.289 0.315 0.483 0.455 0.617 0.728
        EBFT        0.207 0.258 0.548 0.510 0.659 0.771
        EBFT (ws.)  0.190 0.255 0.534 0.508 0.658 0.756
        RLVR        0.774 0.442 0.535 0.510 0.660 0.752
        RLVR (ws.)  0.389 0.402 0.524 0.529 0.662 0.749
    """),
    _table("Table 1, Unstructured Coding", UNSTRUCTURED, (CE, FM, *_scores([MEAN], *CODE)), """
        Base        0.631 0.369 0.473 0.419 0.596 0.702
        Warm start  0.499 0.317 0.508 0.458 0.638 0.743
        SFT         0.501 0.321 0.504 0.467 0.644 0.747
        EBFT        0.499 0.320 0.548 0.524 0.664 0.769
        EBFT (ws.)  0.481 0.312 0.536 0.514 0.659 0.769
        RLVR        - - - - - -
        RLVR (ws.)  - - - - - -
    """),
    _table("Table 1, Translation", TRANSLATION, (CE, FM, *_scores([MEAN], *COMET), *_scores([MEAN], *BLEU)), """
        Base        1.870 0.637 0.644 0.611 0.701 0.745 0.074 0.124 0.186 0.231
        Warm start  2.647 0.695 0.711 0.691 0.759 0.793 0.158 0.169 0.233 0.279
        SFT         1.782 0.690 0.717 0.696 0.761 0.795 0.160 0.172 0.235 0.280
        EBFT        1.670 0.578 0.725 0.713 0.765 0.795 0.182 0.194 0.244 0.283
        EBFT (ws.)  1.671 0.580 0.734 0.724 0.772 0.800 0.185 0.197 0.247 0.286
        RLVR        2.454 0.641 0.697 0.691 0.735 0.761 0.176 0.194 0.226 0.248
        RLVR (ws.)  2.311 0.718 0.724 0.718 0.759 0.781 0.195 0.210 0.245 0.269
    """),
    _table("Table 6, Q&A Coding", QA, (CE_6, *_scores(list(QA.benchmarks), *CODE)), """
        Base        0.524 0.348 0.324 0.490 0.622 0.599 0.514 0.703 0.782 0.506 0.433 0.626 0.742
        Warm start  0.571 0.415 0.385 0.540 0.665 0.595 0.527 0.691 0.774 0.440 0.408 0.602 0.731
        SFT         0.408 0.457 0.427 0.578 0.713 0.576 0.558 0.701 0.790 0.465 0.406 0.596 0.723
        EBFT        0.326 0.494 0.448 0.616 0.750 0.650 0.603 0.728 0.813 0.524 0.488 0.645 0.753
        EBFT (ws.)  0.337 0.512 0.500 0.642 0.756 0.638 0.584 0.727 0.817 0.476 0.452 0.621 0.734
        RLVR        0.806 0.451 0.443 0.602 0.695 0.623 0.583 0.722 0.794 0.531 0.502 0.658 0.767
        RLVR (ws.)  0.713 0.482 0.516 0.640 0.738 0.607 0.596 0.712 0.782 0.484 0.475 0.632 0.729
    """),
    _table("Table 6, Unstructured Coding", UNSTRUCTURED, _scores(list(UNSTRUCTURED.benchmarks), *CODE), """
        Base        0.348 0.324 0.490 0.622 0.599 0.514 0.703 0.782
        Warm start  0.463 0.419 0.586 0.707 0.553 0.497 0.690 0.778
        SFT         0.451 0.417 0.596 0.707 0.556 0.516 0.691 0.786
        EBFT        0.500 0.465 0.610 0.726 0.611 0.583 0.718 0.813
        EBFT (ws.)  0.512 0.478 0.629 0.726 0.572 0.550 0.704 0.813
    """),
    _table("Table 6, Translation, COMET", TRANSLATION, (CE_6, *_scores(list(TRANSLATION.benchmarks), *COMET)), """
        Base        2.567 0.649 0.611 0.711 0.757 0.627 0.590 0.679 0.724 0.658 0.630 0.712 0.753
        Warm start  2.648 0.733 0.712 0.776 0.807 0.705 0.683 0.759 0.796 0.696 0.677 0.742 0.776
        SFT         2.692 0.747 0.722 0.784 0.815 0.703 0.683 0.755 0.792 0.701 0.682 0.745 0.777
        EBFT        2.399 0.740 0.725 0.777 0.804 0.737 0.728 0.778 0.808 0.700 0.691 0.742 0.775
        EBFT (ws.)  2.451 0.753 0.741 0.788 0.812 0.742 0.732 0.782 0.810 0.708 0.699 0.749 0.779
        RLVR        3.225 0.704 0.698 0.743 0.769 0.705 0.698 0.745 0.772 0.684 0.679 0.718 0.741
        RLVR (ws.)  3.148 0.738 0.730 0.771 0.794 0.727 0.721 0.765 0.789 0.708 0.703 0.740 0.762
    """),
    _table("Table 6, Translation, BLEU", TRANSLATION, _scores(list(TRANSLATION.benchmarks), *BLEU), """
        Base        0.069 0.103 0.166 0.215 0.073 0.098 0.154 0.197 0.081 0.171 0.238 0.281
        Warm start  0.185 0.165 0.235 0.286 0.159 0.139 0.200 0.244 0.129 0.204 0.264 0.307
        SFT         0.198 0.172 0.242 0.294 0.152 0.139 0.198 0.242 0.130 0.205 0.264 0.305
        EBFT        0.204 0.187 0.247 0.289 0.212 0.175 0.221 0.258 0.136 0.219 0.266 0.305
        EBFT (ws.)  0.217 0.200 0.253 0.297 0.202 0.174 0.219 0.256 0.142 0.221 0.270 0.309
        RLVR        0.192 0.185 0.223 0.250 0.202 0.173 0.206 0.228 0.135 0.223 0.249 0.267
        RLVR (ws.)  0.215 0.206 0.246 0.275 0.217 0.186 0.220 0.243 0.152 0.240 0.269 0.289
    """),
)  # fmt: skip


def table_of(task: Task, column: Column) -> Table | None:
    """The table that has a column of a task."""
    return next((table for table in TABLES if table.task is task and column in table.columns), None)


@functools.cache
def frame() -> pd.DataFrame:
    """Every number of the tables: place, task, method, benchmark, metric, position, value."""
    import pandas as pd

    return pd.DataFrame(
        [
            {"place": table.place, "task": table.task.title, "method": method, **column._asdict(), "value": value}
            for table in TABLES
            for column in table.columns
            for method, value in table.values(column).items()
        ]
    )
