"""Answers to the questions of the notebooks on studies of known outcome: with the effect, and without any."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest

from ebft_study.analysis.summary import StudySummary, summarize
from ebft_study.report import answers, claims
from ebft_study.results import load
from tests import notebooks
from tests.synthetic_study import EFFECTS, LEVELS, PAPER_LIKE, Effect, write_study

LISTED = re.compile(r"^- ", re.MULTILINE)


def made(folder: Path) -> StudySummary:
    return summarize(load(folder))


def numbers(sentence: str, before: str) -> list[float]:
    """The differences that follow some words."""
    return [float(value.replace("−", "-")) for value in re.findall(rf"{before}: ([−+][\d.]+) \(95 %", sentence)]


def equal(effects: dict[Any, Effect]) -> dict[Any, Effect]:
    """The same configurations, all of one outcome."""
    return dict.fromkeys(effects, (-0.1, -0.03))


def test_alpha_and_gamma_are_told_with_the_sign_and_size_that_were_put_in(tmp_path: Path) -> None:
    sentence = answers.alpha_gamma(made(notebooks.alpha_gamma(tmp_path / "study")))
    gammas, alphas = (0.0, 0.03, 0.1), (0.0, 0.5, 1.0)
    for which in (0, 1):
        name = ("CE", "CFM")[which]
        by_alpha = [PAPER_LIKE[1.0, gamma][which] - PAPER_LIKE[0.0, gamma][which] for gamma in gammas]
        by_gamma = [PAPER_LIKE[alpha, 0.1][which] - PAPER_LIKE[alpha, 0.0][which] for alpha in alphas]
        expected = [sum(by_alpha) / 3, sum(by_gamma) / 3]
        assert numbers(sentence, f"lowers {name}") == pytest.approx(expected, abs=0.003)
    assert "Raising α from 0 to 1 lowers CE" in sentence
    assert "Raising γ from 0 to 0.1 lowers CE" in sentence
    assert "4 comparisons" in sentence


def test_the_opposite_effect_turns_the_sentence(tmp_path: Path) -> None:
    turned = {key: (-ce, -cfm) for key, (ce, cfm) in PAPER_LIKE.items()}
    sentence = answers.alpha_gamma(made(notebooks.alpha_gamma(tmp_path / "study", turned)))
    assert len(numbers(sentence, "raises CF?M?E?")) == 4
    assert "lowers" not in sentence


def test_without_an_effect_nothing_is_told(tmp_path: Path) -> None:
    sentence = answers.alpha_gamma(made(notebooks.alpha_gamma(tmp_path / "a", equal(PAPER_LIKE))))
    assert not re.search(r"lowers|raises", sentence)
    assert len(re.findall("cannot be told to change", sentence)) == 4
    by_length = answers.by_length(made(tmp_path / "a"))
    assert "EBFT's CFM cannot be told from SFT's at lengths 1, 2, 4, 8, 16 and 32;" in by_length
    networks = answers.feature_networks(made(notebooks.networks(tmp_path / "n", equal(notebooks.OF_NETWORKS))))
    assert not re.search(r"lowers|raises", networks)
    assert len(re.findall("cannot be told to change", networks)) == 6
    flat = dict.fromkeys(LEVELS, 0.4)
    methods = answers.methods(made(notebooks.methods(tmp_path / "m", equal(EFFECTS), flat)))
    assert not re.search(r" is (lower|higher)", methods)
    assert len(re.findall("cannot be told apart", methods)) == 9
    scaling = answers.scaling_laws(made(notebooks.scaling(tmp_path / "s", speedup=1.0)))
    assert "Whether EBFT saves data (CE) cannot be told: speedup over SFT" in scaling
    search = answers.search(made(notebooks.search(tmp_path / "r", equal(notebooks.OF_SEARCH))))
    assert "Of the 10 others 0 can be told to be worse" in search
    assert re.search(r"Whether (γ and lr|lr and γ) matter cannot be told", search)


def test_what_the_interval_alone_would_tell_is_marked_where_the_correction_takes_it_back(tmp_path: Path) -> None:
    """An effect that a single comparison sees: p is between 0.05 / 4 and 0.05."""
    found = set()
    for size in (0.002, 0.003, 0.004, 0.005, 0.006):
        effects = {key: (size * key[0], 0.0) if key else (0.0, 0.0) for key in PAPER_LIKE}
        sentence = answers.alpha_gamma(made(notebooks.alpha_gamma(tmp_path / str(size), effects)))
        tested = re.search(r"from 0 to 1 (.*?): \S+ \(95 % interval (\S+) to (\S+),", sentence)
        assert tested
        words, low, high = tested.group(1), *(float(tested.group(k).replace("−", "-")) for k in (2, 3))
        excludes_zero = low > 0 or high < 0
        assert excludes_zero == (words != "cannot be told to change CE"), sentence
        found.add(words)
    assert "cannot be told to change CE after the correction" in found


def test_a_trial_that_is_missing_is_named_and_its_configuration_does_not_count(tmp_path: Path) -> None:
    statuses = {((0.0, 0.0), 1): "stopped"}
    written = write_study(tmp_path / "study", statuses=statuses)
    sentence = answers.alpha_gamma(made(written))
    expected = sum(PAPER_LIKE[1.0, g][0] - PAPER_LIKE[0.0, g][0] for g in (0.03, 0.1)) / 2
    assert numbers(sentence, "lowers CE")[0] == pytest.approx(expected, abs=0.003)
    assert "Left out: α=0, γ=0: 1 stopped" in sentence


def test_lengths_where_ebft_is_below_sft_and_above_it(tmp_path: Path) -> None:
    effects = {(1.0, 0.0): (-0.02, -0.2), None: (-0.25, -0.01)}
    sentence = answers.by_length(made(write_study(tmp_path / "study", effects=effects)))
    below = "is below SFT's at lengths 2, 4, 8, 16 and 32 and is above SFT's at length 1; at 32 the difference is "
    assert below in sentence
    gap = re.search(rf"{re.escape(below)}(\S+) ", sentence)
    assert gap
    assert float(gap.group(1).replace("−", "-")) == pytest.approx(-0.19 * (1 + 0.4 * 2), abs=0.005)
    assert "CFM grows with the completion length: agrees." in sentence


def test_each_feature_network_is_told_against_the_reference(tmp_path: Path) -> None:
    sentence = answers.feature_networks(made(notebooks.networks(tmp_path / "study")))
    for name in ("no_whitening", "mean_pooling"):
        (part,) = re.findall(rf"^- Against default, {name} (.*)$", sentence, re.MULTILINE)
        expected = [a - b for a, b in zip(notebooks.OF_NETWORKS[name], notebooks.OF_NETWORKS["default"], strict=True)]
        assert numbers(part, "raises CE") == pytest.approx(expected[:1], abs=0.006)
        assert numbers(part, "raises Judge CFM") == pytest.approx(expected[1:], abs=0.006)
    (part,) = re.findall(r"^- Against default, larger (.*)$", sentence, re.MULTILINE)
    assert len(re.findall("cannot be told", part)) == 2


def test_methods_are_told_in_the_order_of_their_outcomes(tmp_path: Path) -> None:
    sentence = answers.methods(made(notebooks.methods(tmp_path / "study")))
    for left, right in (("EBFT", "SFT"), ("EBFT", "RLVR"), ("EBFT (ws.)", "RLVR (ws.)")):
        (part,) = re.findall(rf"^- {re.escape(left)} against {re.escape(right)}: (.*)$", sentence, re.MULTILINE)
        for name, gap in zip(("CE", "CFM"), map(float.__sub__, EFFECTS[left], EFFECTS[right]), strict=True):
            side = "lower" if gap < 0 else "higher"
            assert numbers(part, f"{name} is {side}") == pytest.approx([gap], abs=0.006)
        score = LEVELS[left] - LEVELS[right]
        words = "is higher" if score else "cannot be told apart"
        assert numbers(part, rf"mini: pass@1 {words}") == pytest.approx([score], abs=0.01)


def test_methods_without_a_benchmark_are_compared_on_the_losses(tmp_path: Path) -> None:
    effects = {(1.0, 0.0): (-0.02, -0.2), None: (-0.25, -0.01)}
    sentence = answers.methods(made(write_study(tmp_path / "study", effects=effects)))
    assert "EBFT below SFT on CE: disagrees." in sentence
    assert "EBFT below SFT on CFM: agrees." in sentence
    assert "no benchmark, so pass@k is not answered" in sentence


def test_the_speedup_is_that_which_made_the_study(tmp_path: Path) -> None:
    sentence = answers.scaling_laws(made(notebooks.scaling(tmp_path / "study")))
    found = re.search(
        r"The effective speedup of EBFT over SFT in data \(CE\) is ([\d.]+) \(([\d.]+) to ([\d.]+)\)", sentence
    )
    assert found
    value, low, high = map(float, found.groups())
    assert low < notebooks.SPEEDUP < high
    assert value == pytest.approx(notebooks.SPEEDUP, rel=0.1)
    fewer = write_study(
        tmp_path / "few",
        effects={4: (-0.1, 0.0), 8: (-0.2, 0.0)},
        settings=lambda key: {"method": "sft", "batch_size": key},
        seeds=(0, 1),
    )
    assert "SFT, CE: no law, " in answers.scaling_laws(made(fewer))


def test_the_search_names_the_setting_that_matters_and_what_was_saved(tmp_path: Path) -> None:
    study = made(notebooks.search(tmp_path / "study"))
    sentence = answers.search(study)
    assert re.search(r"lr \(0\.\d+, 0\.\d+ to 0\.\d+\) clearly matters; whether γ matters cannot be told", sentence)
    assert re.search(r"The best of 11 complete configurations by validation cfm_loss is γ=\S+, lr=3e-4", sentence)
    # three values of gamma at the best rate are equal; the other eight are worse
    assert "Of the 10 others 8 can be told to be worse" in sentence
    assert "Early stopping ended 2 of 24 trials and saved 40 of 960 steps" in sentence


def test_one_seed_tells_no_configuration_from_another(tmp_path: Path) -> None:
    sentence = answers.search(made(write_study(tmp_path / "study", seeds=(0,))))
    assert "with one seed it cannot be told from the others" in sentence
    assert answers.alpha_gamma(made(tmp_path / "study")).count("1 seed, so no interval") == 4


def test_claims_are_counted_as_the_report_judges_them(tmp_path: Path) -> None:
    study = made(notebooks.methods(tmp_path / "study"))
    rulings = [v.ruling for v in claims.judge(study) if not math.isnan(v.p_value)]
    sentence = answers.paper_tables(study)
    counts = re.search(r"tests (\d+): it agrees with (\d+), disagrees with (\d+), and cannot tell (\d+)", sentence)
    assert counts
    kinds = [rulings.count(ruling) for ruling in ("agrees", "disagrees", "cannot tell")]
    assert list(map(int, counts.groups())) == [len(rulings), *kinds]
    assert len(LISTED.findall(sentence)) == 1 + kinds[0] + kinds[1]


def test_groups_that_do_not_compare_are_answered_apart(tmp_path: Path) -> None:
    """Two stride settings measure CFM at other contexts: no difference is taken between them."""
    effects = dict.fromkeys(itertools.product((4, 8), (0.0, 0.1)), (-0.1, -0.03))
    study = made(
        write_study(
            tmp_path / "study",
            effects=effects,
            settings=lambda key: {"stride": key[0], "gamma": key[1], "completion_length": 4},
        )
    )
    assert "[s=4]" in answers.reading(study)
    assert "[s=8]" in answers.reading(study)
    assert answers.search(study).count("The best of 2 complete configurations") == 2
