"""Effects of settings against loops over the tables; curves and lengths on studies of known outcome."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ebft_study.analysis.curves import frame_of, score_series, series, spread
from ebft_study.analysis.effects import effects, feature_settings, left_out, subjects
from ebft_study.analysis.lengths import against_sft
from ebft_study.analysis.statistics import Score, mean_value
from ebft_study.analysis.summary import StudySummary, summarize
from ebft_study.results import load
from tests import notebooks
from tests.synthetic_study import (
    EFFECTS,
    LENGTHS,
    LEVELS,
    PAPER_LIKE,
    SEQUENCES,
    of_method,
    write_benchmark,
    write_study,
)


def written(folder: Path, **options: Any) -> StudySummary:
    return summarize(load(write_study(folder, **options)))


def test_an_effect_is_the_mean_of_paired_differences_over_the_other_settings(tmp_path: Path) -> None:
    study = written(tmp_path / "study", with_scores=True)
    trials = study.results.trials.set_index("trial_id")
    rows = study.results.evaluations
    final = rows[(rows["metric"] == "ce_loss") & (rows["step"] == 40)].set_index("trial_id")["value"]
    value = {(t["alpha"], t["gamma"], t["seed"]): final[name] for name, t in trials.iterrows() if t["method"] == "ebft"}
    for found, other in zip(effects(study, ("alpha",), "ce_loss"), (0.5, 1.0), strict=True):
        by_seed = [
            np.mean([value[other, gamma, seed] - value[0.0, gamma, seed] for gamma in (0.0, 0.03, 0.1)])
            for seed in (0, 1, 2)
        ]
        assert (found.reference, found.settings) == ((("alpha", 0.0),), (("alpha", other),))
        assert found.difference.mean == pytest.approx(np.mean(by_seed), abs=1e-9)
        assert found.difference.error == pytest.approx(np.std(by_seed, ddof=1) / 3**0.5, rel=1e-6)
        assert (found.n_blocks, found.difference.n, found.difference.n_sequences) == (3, 3, SEQUENCES)


def test_only_combinations_with_both_values_and_all_seeds_count(tmp_path: Path) -> None:
    some = {key: effect for key, effect in PAPER_LIKE.items() if key not in ((0.0, 0.1), (0.5, 0.1))}
    study = written(tmp_path / "study", effects=some, statuses={((1.0, 0.03), 2): "failed"})
    found = {each.settings[0][1]: each for each in effects(study, ("alpha",), "ce_loss")}
    assert found[0.5].n_blocks == 2
    assert found[1.0].n_blocks == 1
    assert found[1.0].difference.mean == pytest.approx(-0.331, abs=0.004)
    assert [c.label for c in left_out(study, ("alpha",))] == ["α=1, γ=0.03"]


def test_settings_of_features_are_one_subject_and_their_cfm_does_not_compare(tmp_path: Path) -> None:
    study = summarize(load(notebooks.networks(tmp_path / "study")))
    assert feature_settings(study) == ("network",)
    assert subjects(study) == [("network",)]
    by_judge = {e.settings[0][1]: e for e in effects(study, ("network",), "judge_cfm_loss")}
    assert set(by_judge) == {"larger", "mean_pooling", "no_whitening"}
    of_own_features = {e.settings[0][1] for e in effects(study, ("network",), "cfm_loss")}
    assert of_own_features == {"no_whitening"}, "whitening changes the reward, not what CFM measures"


def test_settings_that_never_vary_alone_have_no_effect(tmp_path: Path) -> None:
    diagonal = {(0.0, 0.0): (-0.1, 0.0), (1.0, 0.1): (-0.2, 0.0)}
    study = written(tmp_path / "study", effects=diagonal)
    assert effects(study, ("alpha",), "ce_loss") == []


def test_a_mean_of_scores_keeps_their_sequences() -> None:
    left, right = (Score(value, (0, 1), [3, 1], [value - 0.5, value + 1.5]) for value in (1.0, 2.0))
    both = mean_value([left, right])
    assert isinstance(both, Score)
    assert both == 1.5
    assert both.values.tolist() == [1.0, 3.0]
    assert not isinstance(mean_value([left, 2.0]), Score)


def test_curves_are_of_finished_trials_and_the_others_apart(tmp_path: Path) -> None:
    study = written(tmp_path / "study", statuses={((1.0, 0.0), 1): "stopped"})
    (c,) = (c for c in study.ebft if (c.settings["alpha"], c.settings["gamma"]) == (1.0, 0.0))
    finished, unfinished = series(study, c, "ce_loss")
    assert finished.shape == (3, 2)
    assert [list(each.index) for each in unfinished] == [[0, 20]]
    rows = study.results.metrics[study.results.metrics["trial_id"].isin(c.finished["trial_id"])]
    line = spread(finished).set_index("step")
    for step in (0, 20, 40):
        values = rows.loc[rows["step"] == step, "ce_loss"]
        assert line.loc[step, ["mean", "low", "high", "n"]].tolist() == pytest.approx(
            [values.mean(), values.min(), values.max(), 2]
        )


def test_scores_have_curves_from_the_base_model_to_the_end(tmp_path: Path) -> None:
    write_study(tmp_path / "study", effects=EFFECTS, settings=of_method)
    write_benchmark(tmp_path / "study", LEVELS, noise=0.0)
    study = summarize(load(tmp_path / "study"))
    for c in study.configurations:
        finished, unfinished = score_series(study, c, "mini", "pass_at_k", 1)
        assert unfinished == []
        warm = bool(c.warm_start_steps)
        assert list(finished.index) == ([0, 20, 60] if warm else [0, 40])
        assert finished.mean(axis=1).tolist()[: 1 + warm] == pytest.approx([0.3, 0.33][: 1 + warm])
        assert len(score_series(study, c, "other", "pass_at_k", 1)[0]) == 0
        assert len(score_series(study, c, "mini", "pass_at_k", None)[0]) == 0


def test_a_line_far_above_the_base_model_leaves_the_frame() -> None:
    near = [[2.0, 1.9], [2.0, 1.8], [2.0, 2.1]]
    assert frame_of(2.0, near) is None
    assert frame_of(2.0, []) is None
    limits = frame_of(2.0, [*near, [2.0, 9.0]])
    assert limits is not None
    assert limits[0] < 1.8
    assert 2.1 < limits[1] < 3.0
    assert frame_of(2.0, [*near, [2.0, -5.0]]) is None, "below the base model is what training is for"


def test_ebft_against_sft_at_each_length_of_each_feature_map(tmp_path: Path) -> None:
    effects = {("ebft", stride): (-0.1, -0.2) for stride in (4, 8)} | {("sft", s): (-0.1, -0.05) for s in (4, 8)}
    study = written(
        tmp_path / "study", effects=effects, settings=lambda key: {"method": key[0], "stride": key[1]}, noise=1e-4
    )
    compared = dict(against_sft(study))
    assert set(compared) == {"s=4", "s=8"}
    for gaps, (k, length) in itertools.product(compared.values(), enumerate(LENGTHS)):
        assert gaps[length].mean == pytest.approx(-0.15 * (1 + 0.4 * (k - 3)), abs=2e-3)
    alone = written(tmp_path / "alone", effects={(1.0, 0.0): (0.0, 0.0)})
    assert against_sft(alone) == []
