"""The paper beside studies of known truth: orders that agree or are turned around, and noise, which decides nothing."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ebft_study.analysis import paper as published
from ebft_study.analysis.beside_paper import Beside, Quantity
from ebft_study.analysis.methods import Column, Method
from ebft_study.analysis.selection import Selected
from ebft_study.analysis.statistics import Score
from ebft_study.analysis.summary import summarize
from ebft_study.report import collected, paper, write_report
from ebft_study.report.paper import orders, section, summary
from ebft_study.report.table import FORMATS
from ebft_study.results import load
from tests.synthetic_study import EFFECTS, LEVELS, of_method, write_benchmark, write_study

PASS_1 = Column(published.MEAN, "pass_at_k", 1)
SCORES = published.TABLES[0].values(PASS_1)
PROBLEMS = 40


def fake(truth: dict[str, float], random: np.random.Generator, *, seeds: int, noise: float) -> Beside:
    """Scores of Q&A coding around `truth`, with an error for each trial and each of its problems."""
    difficulty = random.normal(0, 0.2, PROBLEMS)
    methods = {}
    for name, level in truth.items():
        values = {}
        for seed in range(seeds):
            own = level + difficulty + random.normal(0, noise) + random.normal(0, noise, PROBLEMS)
            values[seed] = Score(own.mean(), range(PROBLEMS), np.ones(PROBLEMS), own)
        methods[name] = Method(name, {PASS_1: values})
    shown = {name: SCORES[name] for name in truth}
    return Beside(published.QA, "", (Quantity(PASS_1, "mini", "Table 1", shown, methods, ()),), ())


def counts(tasks: list[Beside]) -> tuple[int, ...]:
    return tuple(sum(order.count(ruling) for order in orders(tasks)) for ruling in paper.RULINGS)


def test_an_order_like_the_papers_agrees_and_its_opposite_disagrees() -> None:
    random = np.random.default_rng(0)
    assert len(fake(SCORES, random, seeds=2, noise=0.0).quantities[0].pairs()) == 20  # EBFT and RLVR are equal
    assert counts([fake(SCORES, random, seeds=5, noise=1e-5)]) == (20, 0, 0)
    turned = {name: -value for name, value in SCORES.items()}
    assert counts([fake(turned, random, seeds=5, noise=1e-5)]) == (0, 20, 0)


def test_noise_seldom_decides_anything() -> None:
    """Of studies in which all methods are equal, at most one in twenty tells any pair apart."""
    random = np.random.default_rng(1)
    equal = dict.fromkeys(SCORES, 0.4)
    decided = [sum(counts([fake(equal, random, seeds=3, noise=0.05)])[:2]) > 0 for _ in range(120)]
    assert sum(decided) <= 11  # of 120 at a rate of 0.05, more than 11 has a chance of 1 %


def test_all_pairs_of_the_page_are_one_family() -> None:
    """A pair that is clear alone is open beside many tasks."""
    random = np.random.default_rng(2)
    truth = {name: 0.4 + 0.03 * (name == "EBFT") for name in ("SFT", "EBFT")}
    alone = fake(truth, random, seeds=4, noise=0.003)
    (order,) = orders([alone])
    assert order.count("agrees") == 1
    noise = [fake(dict.fromkeys(SCORES, 0.4), random, seeds=2, noise=0.05) for _ in range(20)]
    (first, *_) = orders([alone, *noise])
    factor = first.pairs[0].p_value / order.pairs[0].p_value
    assert 0.98 * (1 + 20 * 20) < factor <= 1 + 20 * 20 + 1e-6  # less where noise has smaller p-values
    assert first.count("cannot tell") == 1


def test_one_seed_tells_nothing_apart() -> None:
    found = orders([fake(SCORES, np.random.default_rng(0), seeds=1, noise=0.0)])
    assert {pair.ruling for pair in found[0].pairs} == {"cannot tell"}
    assert "one seed allows no interval" in summary(found)


def test_a_choice_between_configurations_widens_a_pair() -> None:
    random = np.random.default_rng(0)
    task = fake({"SFT": 0.4, "EBFT": 0.5}, random, seeds=4, noise=0.01)
    (quantity,) = task.quantities
    before = quantity.gap("EBFT", "SFT")
    chosen = Method("EBFT", quantity.methods["EBFT"].values, Selected({}, 2))
    quantity.methods["EBFT"] = chosen  # type: ignore[index]
    assert quantity.gap("EBFT", "SFT").error == pytest.approx(2 * before.error)


# --- a whole study ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = write_study(tmp_path_factory.mktemp("paper") / "mini", effects=EFFECTS, settings=of_method)
    write_benchmark(written, LEVELS)
    return written


def test_a_study_like_the_paper_on_its_page(folder: Path) -> None:
    found = section(summarize(load(folder)))
    assert found is not None
    assert found.summary.startswith("Of 62 pairs of methods that the paper orders, this study agrees on ")
    assert found.notes == [
        "Q&A coding: orders alone compare, levels do not: model is tiny-1m, the paper's Qwen/Qwen2.5-1.5B; the data "
        "are mini_functions, the paper's open_code_instruct."
    ]
    assert [row[0] for row in found.orders.rows] == [f"Q&A coding: {name}" for name in ("CE", "CFM", "mini: pass@1")]
    losses, scores = found.levels
    assert losses.columns == ("Method", "CE: paper", "CE: ours", "CFM: paper", "CFM: ours")
    assert [row[:2] for row in losses.rows][2:4] == [("SFT", "0.289"), ("EBFT", "0.207")]
    assert [row[:2] for row in scores.rows][2:4] == [("SFT", "0.455"), ("EBFT", "0.510")]
    assert all("±" in row[2] for row in scores.rows)
    assert found.pairs is not None
    assert {row[-1] for row in found.pairs.rows} <= {"agrees", "disagrees"}
    each = orders(paper.beside(summarize(load(folder))))
    assert sum(len(order.pairs) for order in each) == 62
    assert len(found.pairs.rows) == sum(order.count("agrees") + order.count("disagrees") for order in each)


def test_levels_that_compare_have_differences(tmp_path: Path) -> None:
    def settings(key: Any) -> dict[str, Any]:
        return {**of_method(key), "model": "Qwen/Qwen2.5-1.5B", "dataset": "open_code_instruct"}

    written = write_study(tmp_path / "s", effects=EFFECTS, settings=settings)
    write_benchmark(written, {**LEVELS, "SFT": 0.527}, name="humaneval")
    found = section(summarize(load(written)))
    assert found is not None
    (difference,) = (table for table in found.levels if table.name.endswith("humaneval_difference"))
    assert difference.columns == ("Method", "pass@1")
    assert re.fullmatch(r"\+0\.(09|10)\d ± 0\.\d+", dict(difference.rows)["SFT"])  # the paper has 0.427
    assert "Q&A coding: levels compare; CE does not (CE is of all tokens, not of answers); " in found.notes[0]
    assert "trained otherwise than in the paper: EBFT: lr " in found.notes[0]


def test_survivors_of_early_stopping_tell_nothing_apart(tmp_path: Path) -> None:
    effects = {name: EFFECTS[name] for name in ("SFT", "RLVR")}
    for statuses, clear in (({}, True), ({("RLVR", 3): "stopped"}, False)):
        written = write_study(
            tmp_path / str(clear), effects=effects, settings=of_method, seeds=range(4), statuses=statuses
        )
        write_benchmark(written, LEVELS)
        rulings = {
            (pair.better, pair.worse): pair.ruling
            for order in orders(paper.beside(summarize(load(written))))
            for pair in order.pairs
            if order.quantity.column.metric == "ce_loss"
        }
        assert (rulings["SFT", "RLVR"] == "agrees") == clear
        assert (rulings["SFT", "Base"] == "agrees") or not clear


def test_studies_without_the_papers_tasks_have_no_section(tmp_path: Path) -> None:
    assert section(summarize(load(write_study(tmp_path / "s", effects=EFFECTS, settings=of_method)))) is None


def test_the_page_holds_every_table_in_every_format(folder: Path) -> None:
    write_report(folder)
    page = (folder / "report.html").read_text()
    blocks = {html.unescape(block) for block in re.findall(r"<pre>(.*?)</pre>", page, flags=re.DOTALL)}
    tables = collected.tables(summarize(load(folder)))
    assert list(tables)[:4] == ["outcomes", "benchmark_mini", "methods", "paper_orders"]
    assert all(re.fullmatch(r"\w+", name, flags=re.ASCII) for name in tables)
    for name, table in tables.items():
        copied = [function(table) in blocks for function, _ in FORMATS.values()]
        assert all(copied) == (not name.startswith("benchmark")), name
    assert 'href="#paper"' in page
