"""The paper's ordering of methods on studies of known outcome."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from ebft_study.analysis.summary import StudySummary, summarize
from ebft_study.report import claims, methods, ordering
from ebft_study.report.verdicts import Verdict
from ebft_study.results import load
from tests.synthetic_study import EFFECTS, LEVELS, of_method, write_benchmark, write_study

NAMES = ("beats_sft", "matches_rlvr", "rlvr_raises_ce", "lower_ce", "lower_cfm", "gains_more")


def written(
    folder: Path, levels: dict[str, float] = LEVELS, *, score_noise: float = 0.004, **options: Any
) -> StudySummary:
    write_study(folder, **{"effects": EFFECTS, "settings": of_method, **options})
    write_benchmark(folder, levels, noise=score_noise)
    return summarize(load(folder))


def verdicts(study: StudySummary) -> dict[str, Verdict]:
    return dict(zip(NAMES, ordering.verdicts(study), strict=True))


@pytest.fixture(scope="module")
def paper_like(tmp_path_factory: pytest.TempPathFactory) -> StudySummary:
    return written(tmp_path_factory.mktemp("ordering") / "paper_like")


def test_a_study_like_the_paper_agrees(paper_like: StudySummary) -> None:
    assert {name: v.ruling for name, v in verdicts(paper_like).items()} == dict.fromkeys(NAMES, "agrees")


def test_sentences_carry_the_constructed_numbers(paper_like: StudySummary) -> None:
    found = verdicts(paper_like)
    scores = found["beats_sft"].sentence
    assert re.search(r"mini: pass@1: EBFT 0\.4[45]\d ± 0\.\d+, SFT 0\.3[34]\d ± .*; difference \+0\.1[01]\d", scores)
    assert "EBFT (ws.) 0.4" in scores
    assert "3 seeds and 50 sequences" in scores
    assert "Base 3.639" in found["rlvr_raises_ce"].sentence
    assert re.search(
        r"RLVR \(ws\.\) minus RLVR \+0\.0[78].*EBFT \(ws\.\) minus EBFT \+0\.0[01]", found["gains_more"].sentence
    )


def turned(name: str) -> tuple[dict[str, float], dict[Any, tuple[float, float]]]:
    """Levels and effects that turn one claim."""
    levels, effects = dict(LEVELS), dict(EFFECTS)
    if name == "beats_sft":
        levels["SFT"] = 0.6
    elif name == "matches_rlvr":
        levels |= {"RLVR": 0.6, "RLVR (ws.)": 0.7}
    elif name == "rlvr_raises_ce":
        effects |= {"RLVR": (-0.05, 0.1), "RLVR (ws.)": (-0.05, 0.1)}
    elif name == "lower_ce":
        effects |= {"EBFT": (0.6, -0.05), "EBFT (ws.)": (0.6, -0.05)}
    elif name == "lower_cfm":
        effects |= {"EBFT": (-0.1, 0.2), "EBFT (ws.)": (-0.1, 0.2)}
    else:
        levels |= {"EBFT (ws.)": 0.7}
    return levels, effects


@pytest.mark.parametrize("name", NAMES)
def test_each_claim_turns_with_the_sign_of_its_effect(name: str, tmp_path: Path) -> None:
    levels, effects = turned(name)
    rulings = {key: v.ruling for key, v in verdicts(written(tmp_path / "s", levels, effects=effects)).items()}
    assert rulings == dict.fromkeys(NAMES, "agrees") | {name: "disagrees"}


def test_a_score_within_the_margin_below_is_as_high(tmp_path: Path) -> None:
    for rlvr, ruling in ((0.45, "agrees"), (0.49, "disagrees")):
        levels = {**LEVELS, "RLVR": rlvr, "RLVR (ws.)": rlvr + 0.01}
        found = verdicts(written(tmp_path / str(rlvr), levels, score_noise=0.001))
        assert found["matches_rlvr"].ruling == ruling


def test_one_start_that_contradicts_is_enough(tmp_path: Path) -> None:
    found = verdicts(written(tmp_path / "s", {**LEVELS, "EBFT (ws.)": 0.2}))
    assert found["beats_sft"].ruling == "disagrees"


def test_differences_within_the_noise_are_undecided(tmp_path: Path) -> None:
    levels = dict.fromkeys(LEVELS, 0.3) | {"RLVR": 0.28, "RLVR (ws.)": 0.28}
    levels |= {"EBFT": 0.3, "EBFT (ws.)": 0.3, "SFT": 0.3}
    effects = dict.fromkeys(EFFECTS, (0.0, 0.0))
    study = written(tmp_path / "s", levels, effects=effects)
    rulings = {name: v.ruling for name, v in verdicts(study).items()}
    assert rulings == dict.fromkeys(NAMES, "cannot tell") | {"matches_rlvr": "agrees"}
    assert all(
        "after Holm" not in v.sentence for v in claims.judge(study)[-6:] if v.claim != ordering.CLAIMS[1].statement
    )


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    found = verdicts(written(tmp_path / "s", seeds=(0,)))
    assert {v.ruling for v in found.values()} == {"cannot tell"}
    assert all(math.isnan(v.p_value) for v in found.values())


def test_missing_methods_are_named(tmp_path: Path) -> None:
    found = verdicts(written(tmp_path / "s", effects={name: EFFECTS[name] for name in ("SFT", "EBFT")}))
    assert found["beats_sft"].ruling == "agrees"
    assert "no finished trials of RLVR." in found["rlvr_raises_ce"].sentence
    assert "no finished trials of RLVR (ws.), RLVR and EBFT (ws.)." in found["gains_more"].sentence
    assert all(math.isnan(found[name].p_value) for name in NAMES[1:])


def test_a_study_of_warm_starts_only_is_judged_on_them(tmp_path: Path) -> None:
    effects = {name: EFFECTS[name] for name in ("SFT", "EBFT (ws.)", "RLVR (ws.)")}
    rulings = {name: v.ruling for name, v in verdicts(written(tmp_path / "s", effects=effects)).items()}
    assert rulings == dict.fromkeys(NAMES, "agrees") | {"gains_more": "cannot tell"}


def test_cfm_of_different_feature_maps_decides_nothing(tmp_path: Path) -> None:
    def settings(key: Any) -> dict[str, Any]:
        return of_method(key) | ({"pooling": "mean"} if key.startswith("RLVR") else {})

    found = verdicts(written(tmp_path / "s", settings=settings))
    assert (found["lower_cfm"].ruling, found["lower_ce"].ruling) == ("cannot tell", "agrees")
    assert "different feature maps" in found["lower_cfm"].sentence


def test_a_choice_widens_the_interval_and_is_told(tmp_path: Path) -> None:
    rates = {("SFT", rate): EFFECTS["SFT"] for rate in (1e-4, 2e-4)}
    effects = {**rates, "EBFT": EFFECTS["EBFT"]}
    study = written(tmp_path / "s", {**LEVELS, "SFT": 0.44}, effects=effects, noise=0.02)
    sentence = verdicts(study)["beats_sft"].sentence
    assert "Chosen out of 2 configurations" in sentence
    own = ordering.tasks(study)[0].methods
    column = ordering._columns(ordering.SCORE, ordering.tasks(study)[0])[0]
    _, gap = ordering._difference([(own["EBFT"], own["SFT"])], column)
    differences = [float(d) for d in own["EBFT"].minus(own["SFT"], column).values()]
    mean = sum(differences) / 3
    assert gap.error == pytest.approx(math.sqrt(sum((d - mean) ** 2 for d in differences) / 2))


def test_survivors_of_early_stopping_agree_with_nothing(tmp_path: Path) -> None:
    found = verdicts(written(tmp_path / "s", statuses={("EBFT", 3): "stopped"}, seeds=(0, 1, 2, 3)))
    assert {found[name].ruling for name in ("beats_sft", "matches_rlvr", "gains_more")} == {"cannot tell"}
    assert found["rlvr_raises_ce"].ruling == "agrees"


def test_failed_trials_are_told(tmp_path: Path) -> None:
    found = verdicts(written(tmp_path / "s", statuses={("EBFT", 3): "failed"}, seeds=(0, 1, 2, 3)))
    assert found["beats_sft"].ruling == "agrees"
    assert "1 failed" in found["beats_sft"].sentence
    assert "1 failed" not in found["rlvr_raises_ce"].sentence


def test_studies_without_benchmarks_have_the_verdicts_they_had(paper_like: StudySummary, tmp_path: Path) -> None:
    without = summarize(load(write_study(tmp_path / "s", effects=EFFECTS, settings=of_method)))
    assert ordering.verdicts(without) == []
    assert methods.method_tables(without) == []
    assert [v.claim for v in claims.judge(without)] == [claim(without).claim for claim in claims.CLAIMS]
    assert len(claims.judge(paper_like)) == len(claims.CLAIMS) + len(NAMES)
    assert [claim(without) for claim in claims.CLAIMS] == [claim(paper_like) for claim in claims.CLAIMS]


def test_the_corrected_p_values_count_all_claims(paper_like: StudySummary) -> None:
    own = [claim(paper_like) for claim in claims.CLAIMS] + ordering.verdicts(paper_like)
    tested = [v.p_value for v in own if not math.isnan(v.p_value)]
    assert min(v.p_value for v in claims.judge(paper_like)) == pytest.approx(len(tested) * min(tested))


def test_the_table_says_what_was_chosen_and_seen(paper_like: StudySummary) -> None:
    (table,) = methods.method_tables(paper_like)
    assert table.columns == ("Method", "Configuration", "Seeds", "Sequences", "CE", "CFM", "mini: pass@1")
    assert [row[0] for row in table.rows][:3] == ["Base", "Warm start", "SFT"]
    assert table.rows[0][1:4] == ("–", "–", "–")
    by_name = {row[0]: row for row in table.rows}
    assert by_name["SFT"][2:4] == ("3", "320")
    assert by_name["EBFT (ws.)"][3] == "480"
    assert all("±" in row[6] for row in table.rows)
    assert table.caption.startswith("Means over seeds")
    assert table.caption.endswith("warm start included.")
