"""A study beside the paper: the rule of what compares, setting by setting, and ranks against scipy's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

from ebft_study.analysis import paper
from ebft_study.analysis.beside_paper import Beside, Quantity, beside, dataset, deviations
from ebft_study.analysis.methods import Column, Method
from ebft_study.analysis.statistics import Score, pooled
from ebft_study.analysis.summary import summarize
from ebft_study.results import load
from tests.synthetic_study import EFFECTS, METHODS, rewrite, write_benchmark, write_study

AT_SCALE = {
    "model": "Qwen/Qwen2.5-1.5B",
    "dataset": "swallow_code",
    "temperature": 0.6,
    "completion_length": 8,
    "stride": 8,
    "learning_rate": 1e-6,
    "benchmarks": "humaneval:hub",
}
"""Settings of the paper's unstructured coding."""
PASS_1 = paper.TABLES[4].values(Column("HumanEval", "pass_at_k", 1))
NO_RLVR = {name: EFFECTS[name] for name in ("SFT", "EBFT", "EBFT (ws.)")}


def study(
    folder: Path, *, levels: dict[str, float] = PASS_1, names: tuple[str, ...] = ("humaneval",), **changes: Any
) -> tuple[Beside, ...]:
    write_study(folder, effects=NO_RLVR, settings=lambda key: {**METHODS[key], **AT_SCALE, **changes})
    for name in names:
        write_benchmark(folder, levels, name=name, noise=0.001)
    return beside(summarize(load(folder)))


def by_column(each: Beside) -> dict[Column, Quantity]:
    return {quantity.column: quantity for quantity in each.quantities}


@pytest.fixture(scope="module")
def at_scale(tmp_path_factory: pytest.TempPathFactory) -> Beside:
    levels = {**PASS_1, "EBFT": PASS_1["EBFT"] + 0.1}
    (each,) = study(tmp_path_factory.mktemp("beside") / "s", levels=levels, names=("humaneval", "mbpp"))
    return each


def test_differences_are_the_constructed_ones(at_scale: Beside) -> None:
    quantity = by_column(at_scale)[Column("HumanEval", "pass_at_k", 1)]
    assert quantity.obstacles == ()
    assert quantity.place == "Table 6, Unstructured Coding"
    found = {name: quantity.difference(name) for name in quantity.methods}
    assert list(found) == list(PASS_1)
    for name, interval in found.items():
        assert interval.mean == pytest.approx(0.1 * (name == "EBFT"), abs=0.005)
        assert interval.n == 3
        assert interval.n_sequences == 50


def test_all_benchmarks_of_a_task_have_a_mean(at_scale: Beside) -> None:
    of_task = by_column(at_scale)
    mean = of_task[Column(paper.MEAN, "pass_at_k", 1)]
    assert mean.place == "Table 1, Unstructured Coding"
    assert mean.published == paper.TABLES[1].values(mean.column)
    parts = [of_task[Column(title, "pass_at_k", 1)] for title in ("HumanEval", "MBPP")]
    for name in mean.methods:
        assert mean.level(name).mean == pytest.approx(sum(part.level(name).mean for part in parts) / 2)
        assert mean.level(name).n_sequences == 100


def test_the_paper_settings_compare(at_scale: Beside) -> None:
    of_task = by_column(at_scale)
    assert of_task[paper.CE].obstacles == ()
    assert of_task[paper.FM].obstacles == ()
    assert of_task[paper.CE].published["EBFT"] == 0.499
    assert deviations(at_scale) == [
        "EBFT: batch_size 8 (paper: 16), T 128 (paper: 1024), whitening none (paper: variant_i)",
        "SFT: lr 1e-6 (paper: 5e-6 or 1e-5), batch_size 8 (paper: 64 or 128), T 128 (paper: 2048)",
    ]


@pytest.mark.parametrize(
    ("changes", "columns", "reason"),
    [
        ({"model": "Qwen/Qwen2.5-0.5B"}, {"CE", "FM", "score"}, "model is Qwen/Qwen2.5-0.5B"),
        ({"model": "Qwen/Qwen2.5-1.5B-Instruct"}, {"CE", "FM", "score"}, "model is Qwen/Qwen2.5-1.5B-Instruct"),
        ({"dataset": "mini_unstructured"}, {"CE", "FM", "score"}, "the data are mini_unstructured"),
        ({"dataset": "open_code_instruct:/data/x.jsonl"}, {"CE"}, "CE is of all tokens"),
        ({"temperature": 1.0}, {"FM"}, "evaluation_temperature is 1"),
        ({"evaluation_temperature": 0.7}, {"FM"}, "evaluation_temperature is 0.7"),
        ({"depths": (0.5,)}, {"FM"}, "depths is 0.5"),
        ({"pooling": "mean"}, {"FM"}, "pooling is mean"),
        ({"normalize": "joint"}, {"FM"}, "normalize is joint"),
        ({"completion_length": 4, "stride": 4}, {"FM"}, "FM is at 4 tokens"),
        ({"benchmark_problems": 20}, {"score"}, "benchmark_problems is 20"),
        ({"benchmark_temperature": 0.8}, {"score"}, "benchmark_temperature is 0.8"),
        ({"model": "/models/Qwen2.5-1.5B"}, set(), ""),
        ({"dataset": "tokyotech-llm/swallow-code"}, set(), ""),
        ({"steps": 10, "batch_size": 4}, set(), ""),
    ],
)
def test_each_rule_of_what_compares(tmp_path: Path, changes: dict[str, Any], columns: set[str], reason: str) -> None:
    (each,) = study(tmp_path / "s", **changes)
    of_task = by_column(each)
    shown = {"CE": of_task[paper.CE], "FM": of_task[paper.FM], "score": of_task[Column("HumanEval", "pass_at_k", 1)]}
    reasons = {
        name: [why for why in quantity.obstacles if reason and why.startswith(reason)]
        for name, quantity in shown.items()
    }
    assert {name for name, quantity in shown.items() if quantity.obstacles} == columns
    assert {name for name, why in reasons.items() if why} == columns


def test_other_data_have_no_counterpart(tmp_path: Path) -> None:
    assert study(tmp_path / "s", dataset="qa") == ()
    assert dataset({"dataset": "nvidia/OpenCodeInstruct"}) == "open_code_instruct"


@pytest.mark.parametrize(
    ("name", "title"),
    [("humaneval_plus", None), ("mini", paper.MEAN), ("mini_validation", None), ("multipl_e_js", None)],
)
def test_benchmarks_that_only_look_alike(tmp_path: Path, name: str, title: str | None) -> None:
    (each,) = study(tmp_path / "s", names=(name,), dataset="open_code_instruct")
    assert {q.column.benchmark for q in each.quantities} - {""} == ({title} if title else set())
    assert all("the benchmark is mini" in q.obstacles for q in each.quantities if q.column.benchmark)


def test_translations_do_not_compare(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    write_study(folder, effects=NO_RLVR, settings=lambda key: {**METHODS[key], "dataset": "alma_human_parallel"})
    write_benchmark(folder, PASS_1, name="wmt22_de-en")
    for path in folder.glob("results/*/*.parquet"):  # BLEU instead of pass@1
        _rename(path)
    (each,) = beside(summarize(load(folder)))
    quantity = by_column(each)[Column("WMT'22", "best_of_k_bleu", 1)]
    assert "the paper does not name its language pairs" in quantity.obstacles
    assert quantity.place == "Table 6, Translation, BLEU"


def _rename(path: Path) -> None:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.ParquetFile(path).read()
    if "metric" in table.column_names:
        renamed = pc.replace_substring(table["metric"], "pass_at_k", "best_of_k_bleu")
        index = table.column_names.index("metric")
        rewrite(path, table.set_column(index, table.schema.field("metric"), renamed))


# --- orders ----------------------------------------------------------------------------------------------------


def quantity(published: dict[str, float], ours: dict[str, float], metric: str = "pass_at_k") -> Quantity:
    column = Column("HumanEval", metric, 1) if metric == "pass_at_k" else Column("", metric, None)
    methods = {name: Method(name, {column: {0: value, 1: value}}) for name, value in ours.items()}
    return Quantity(column, "humaneval", "Table 6", published, methods, ())


def test_rank_agreement_is_scipys_tau() -> None:
    random, names = np.random.default_rng(0), list("abcdefg")
    for digits in (3, 1):  # with one digit there are ties
        for _ in range(20):
            a, b = (dict(zip(names, random.random(7).round(digits).tolist(), strict=True)) for _ in range(2))
            expected = kendalltau([a[n] for n in names], [b[n] for n in names]).statistic
            assert quantity(a, b).rank_agreement() == pytest.approx(expected)
    assert math.isnan(quantity(dict.fromkeys(names, 0.1), dict.fromkeys(names, 0.1)).rank_agreement())


def test_orders_run_from_the_best_to_the_worst() -> None:
    published, ours = {"SFT": 0.3, "EBFT": 0.2, "RLVR": 0.3}, {"SFT": 0.1, "EBFT": 0.5, "RLVR": 0.4}
    score, loss = quantity(published, ours), quantity(published, ours, "ce_loss")
    assert (score.published_order()[-1], score.order()) == ("EBFT", ["EBFT", "RLVR", "SFT"])
    assert (loss.published_order()[0], loss.order()) == ("EBFT", ["SFT", "RLVR", "EBFT"])
    assert set(score.pairs()) == {("SFT", "EBFT"), ("RLVR", "EBFT")}  # the paper does not tell SFT and RLVR apart
    assert set(loss.pairs()) == {("EBFT", "SFT"), ("EBFT", "RLVR")}


def test_a_mean_over_benchmarks_has_the_error_of_all_problems() -> None:
    random = np.random.default_rng(3)
    parts = [Score(v.mean(), range(len(v)), np.ones(len(v)), v) for v in (random.random(40), random.random(160))]
    both = pooled(parts)
    assert float(both) == pytest.approx((float(parts[0]) + float(parts[1])) / 2)
    apart = math.hypot(*(part.standard_error for part in parts)) / 2
    assert isinstance(both, Score)
    assert apart * 0.98 < both.standard_error < apart * 1.1
    assert pooled(parts[:1]) is parts[0]
    assert pooled([parts[0], 0.5]) == pytest.approx((float(parts[0]) + 0.5) / 2)
