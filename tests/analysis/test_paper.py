"""The paper's numbers against sums that awk took of its text, against its prose, and against each other."""

from __future__ import annotations

import itertools

import pytest

from ebft_study.analysis import methods, paper
from ebft_study.analysis.methods import Column
from ebft_study.analysis.paper import MEAN, QA, TABLES, TRANSLATION, UNSTRUCTURED
from ebft_study.data.presets import PRESETS
from ebft_study.evaluation.downstream.benchmarks import FAMILIES, MADE
from ebft_study.results import METRICS

# Thousandths, by awk over the lines of the text: first sums of rows, then sums of columns.
SUMS = {
    "Table 6, Q&A Coding": (
        [7213, 7344, 7398, 7838, 7796, 8177, 8106],
        [3685, 3159, 3043, 4108, 4939, 4288, 3965, 4984, 5552, 3426, 3164, 4380, 5179],
    ),
    "Table 6, Unstructured Coding": (
        [4382, 4693, 4720, 5026, 4984],
        [2274, 2103, 2911, 3488, 2891, 2660, 3506, 3972],
    ),
    "Table 6, Translation, COMET": (
        [10668, 11510, 11598, 11404, 11546, 11881, 12096],
        [19130, 5064, 4939, 5350, 5558, 4946, 4835, 5263, 5491, 4855, 4761, 5148, 5363],
    ),
    "Table 6, Translation, BLEU": (
        [1846, 2517, 2541, 2719, 2760, 2533, 2758],
        [1280, 1218, 1612, 1906, 1217, 1084, 1418, 1668, 905, 1483, 1820, 2063],
    ),
    "Table 1, Translation": (
        [5823, 7135, 6288, 6149, 6196, 6823, 6930],
        [14405, 4539, 4952, 4844, 5252, 5470, 1130, 1260, 1616, 1876],
    ),
}
TABLE_1_CODING = (
    [6118, 6065, 6071, 6277, 6172, 3673, 3255],
    [2488, 2377, 3591, 3376, 4473, 5194, 2611, 1639, 2569, 2382, 3201, 3730],
)
"""Both coding tasks are one table of the paper."""
GREEDY, PASS_1, PASS_16 = ("greedy_pass_rate", None), ("pass_at_k", 1), ("pass_at_k", 16)
PROSE = [  # sections 4.1 and H.1
    (QA, MEAN, GREEDY, {"EBFT": 0.548, "SFT": 0.483, "RLVR": 0.535}),
    (QA, MEAN, PASS_16, {"EBFT": 0.771, "SFT": 0.728, "RLVR": 0.752}),
    (UNSTRUCTURED, MEAN, PASS_1, {"EBFT": 0.524, "SFT": 0.467}),
    (UNSTRUCTURED, MEAN, PASS_16, {"EBFT": 0.769, "SFT": 0.747}),
    (TRANSLATION, MEAN, ("greedy_comet", None), {"EBFT": 0.725, "SFT": 0.717, "RLVR": 0.697}),
    (QA, "", ("ce_loss", None), {"EBFT": 0.207, "SFT": 0.289, "RLVR": 0.774, "Base": 0.338}),
    (TRANSLATION, "", ("ce_loss", None), {"EBFT": 1.670, "SFT": 1.782, "RLVR": 2.454, "Base": 1.870}),
    (UNSTRUCTURED, "", ("ce_loss", None), {"EBFT": 0.499, "SFT": 0.501}),
    (QA, "", ("cfm_loss", None), {"EBFT": 0.258, "SFT": 0.315, "RLVR": 0.442, "Base": 0.361}),
    (TRANSLATION, "", ("cfm_loss", None), {"EBFT": 0.578, "SFT": 0.690, "RLVR": 0.641}),
    (UNSTRUCTURED, "", ("cfm_loss", None), {"EBFT": 0.320, "SFT": 0.321}),
    (QA, "MultiPL-E", GREEDY, {"SFT": 0.465, "Base": 0.506, "EBFT": 0.524}),
    (TRANSLATION, "MTNT", ("greedy_comet", None), {"EBFT": 0.737, "SFT": 0.703, "RLVR": 0.705}),
    (TRANSLATION, "", ("ce_of_table_6", None), {"RLVR": 3.225, "Base": 2.567}),
]


def sums(rows: list[tuple[float | None, ...]]) -> tuple[list[int], list[int]]:
    thousandths = [[round(1000 * (value or 0)) for value in row] for row in rows]
    return [sum(row) for row in thousandths], [sum(column) for column in zip(*thousandths, strict=True)]


def test_sums_are_those_of_the_text() -> None:
    found = {table.place: sums(list(table.rows.values())) for table in TABLES[2:]}
    assert found == SUMS
    coding = [qa + unstructured for qa, unstructured in zip(*(t.rows.values() for t in TABLES[:2]), strict=True)]
    assert sums(coding) == TABLE_1_CODING


@pytest.mark.parametrize(("task", "benchmark", "score", "quoted"), PROSE)
def test_numbers_that_the_prose_repeats(
    task: paper.Task, benchmark: str, score: tuple[str, int | None], quoted: dict[str, float]
) -> None:
    column = Column(benchmark, *score)
    table = paper.table_of(task, column)
    assert table is not None
    assert {method: table.values(column)[method] for method in quoted} == quoted


def test_best_of_more_answers_is_better() -> None:
    for table in TABLES:
        sampled = [column for column in table.columns if column.position]
        for few, more in itertools.pairwise(sampled):
            if few[:2] == more[:2]:
                assert all(table.values(few)[m] < table.values(more)[m] for m in table.values(few)), (table.place, few)


def test_table_1_is_the_mean_of_table_6_or_below_it() -> None:
    """Table 6 takes the best model for each benchmark, Table 1 one model: equal where there is one to take."""
    for table in TABLES[:3]:
        for column in table.columns[2:]:
            parts = [
                part.values(Column(benchmark, *column[1:]))
                for benchmark in table.task.benchmarks
                if (part := paper.table_of(table.task, Column(benchmark, *column[1:])))
            ]
            assert len(parts) == len(table.task.benchmarks)
            for method, value in table.values(column).items():
                mean = sum(part[method] for part in parts) / len(parts)
                assert value <= mean + 0.00105, (table.place, column, method)
                if method in ("Base", "Warm start", "RLVR", "RLVR (ws.)"):
                    assert value >= mean - 0.00105, (table.place, column, method)


def test_both_coding_tasks_have_one_base_model() -> None:
    for name, score in itertools.product(("HumanEval", "MBPP"), (GREEDY, *(("pass_at_k", k) for k in paper.KS))):
        qa, unstructured = (paper.table_of(task, Column(name, *score)) for task in (QA, UNSTRUCTURED))
        assert qa is not None
        assert unstructured is not None
        assert qa.values(Column(name, *score))["Base"] == unstructured.values(Column(name, *score))["Base"]


def test_names_are_those_of_this_project() -> None:
    for task in paper.TASKS:
        assert task.dataset in PRESETS
        families = {name for names in task.benchmarks.values() for name in names}
        assert all(name in FAMILIES or name.startswith("multipl_e_") for name in families)
    assert {preset.hub_id: name for name, preset in PRESETS.items()} == paper.HUB
    assert {task.miniature[1] for task in paper.TASKS} == set(MADE)
    for table in TABLES:
        assert list(table.rows) == [name for name in methods.ORDER if name in table.rows]
        assert {column.metric for column in table.columns} - {"ce_of_table_6"} <= METRICS.keys()


def test_the_frame_has_every_number_once() -> None:
    frame = paper.frame()
    assert len(frame) == 460 - 12  # RLVR has no unstructured coding
    assert not frame.duplicated(["place", "method", "benchmark", "metric", "position"]).any()
    row = frame[(frame["place"] == "Table 6, Q&A Coding") & (frame["method"] == "RLVR (ws.)")].iloc[-1]
    assert (row["benchmark"], row["metric"], row["position"], row["value"]) == ("MultiPL-E", "pass_at_k", 16, 0.729)
