"""Held-out scores of scaling fits, from laws that are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from ebft_study.analysis.scaling import forms
from ebft_study.analysis.scaling.fits import fit
from ebft_study.analysis.scaling.heldout import choose, extrapolate, largest, last_half
from ebft_study.errors import FitError
from tests.analysis.scaling.designs import SMALL, chinchilla, floored, grid, noisy


def power_law_points(seed: int = 0, deviation: float = 0.005) -> pd.DataFrame:
    table = grid([1e6], np.geomspace(1e5, 3e7, 8), seeds=3).assign(seed=lambda t: range(len(t)))
    return table.assign(value=noisy(floored(table["tokens"]), deviation, [5, seed]))


def test_what_is_held_out() -> None:
    table = pd.DataFrame({"parameters": [1.0, 2.0, 2.02, 1.5], "flops": [10.0, 4.9, 5.1, 5.0]})
    assert list(largest(table, "parameters")) == [False, True, True, False]
    assert list(last_half(table, "flops")) == [True, False, True, False]


def test_a_score_by_hand() -> None:
    table = power_law_points()
    held = largest(table, "tokens")
    score = extrapolate(forms.power_law("tokens"), table, held)
    law = fit(forms.power_law("tokens"), table[~held])
    measured, point = table.loc[held, "value"].mean(), table[held].iloc[[0]]
    assert score.n_scales == 1
    assert score.error == pytest.approx(abs(law.predict(point)[0] / measured - 1))
    forecast = law.forecast(point, n=3, confidence=0.9)
    assert score.covered == int(forecast.low <= measured <= forecast.high)
    before = table.loc[largest(table[~held], "tokens").reindex(table.index, fill_value=False), "value"].mean()
    assert score.last_value_error == pytest.approx(abs(before / measured - 1))
    assert score.error < score.last_value_error


def test_nothing_is_learnt_from_what_is_held_out() -> None:
    table = power_law_points()
    held = largest(table, "tokens")
    moved = table.assign(value=table["value"] * np.where(held, 2.0, 1.0))
    usual, doubled = (extrapolate(forms.power_law("tokens"), t, held) for t in (table, moved))
    assert doubled.error == pytest.approx(0.5, abs=0.02)
    assert doubled.covered == 0
    assert usual.error < 0.02


def test_ninety_percent_of_new_scales_are_covered() -> None:
    studies, held = 80, largest(power_law_points(), "tokens")
    rate = np.mean([extrapolate(forms.power_law("tokens"), power_law_points(s), held).covered for s in range(studies)])
    assert 0.8 < rate < 0.99  # 0.9 +- 3 standard errors of 0.033


def test_the_form_with_the_least_held_out_error_is_first_and_refused_ones_are_last() -> None:
    table = grid(seeds=2)
    table["value"] = noisy(chinchilla(table), 0.002, 4)
    order = choose(
        [forms.power_law("flops"), forms.multiplicative(), forms.additive()], table, largest(table, "parameters")
    )
    assert [choice.form.name for choice in order] == ["additive", "multiplicative", "power law in flops"]
    first, second = order[0].score, order[1].score
    assert first is not None
    assert second is not None
    assert first.n_scales == second.n_scales == 5
    assert first.error < 0.3 * second.error
    assert order[2].score is None
    assert order[2].reason == "power law in flops: flops: not known of every point"


def test_the_order_of_methods_at_a_large_scale_is_foreseen_where_their_curves_cross_late() -> None:
    """Methods that lead by one multiplier keep their order: both forecasts are right. A late crossing misleads both."""
    table = grid([1e6], np.geomspace(1e5, 3e7, 8), seeds=2, methods=("ebft", "sft"))
    tokens = table["tokens"] * np.where(table["method"] == "ebft", 1.6, 1.0)
    table["value"] = noisy(floored(tokens), 1e-4, 3)
    held = largest(table, "tokens")
    law = forms.power_law("tokens")
    kept = extrapolate(law, table, held, multiplied="tokens", reference="sft")
    assert (kept.n_scales, kept.n_pairs, kept.ranked, kept.ranked_before) == (2, 1, 1, 1)
    crossed = table.assign(value=table["value"] * np.where(held & (table["method"] == "ebft"), 1.2, 1.0))
    missed = extrapolate(law, crossed, held, multiplied="tokens", reference="sft")
    assert (missed.ranked, missed.ranked_before) == (0, 0)


@pytest.mark.parametrize("part", [0.0, 1.0])
def test_a_score_needs_points_on_both_sides(part: float) -> None:
    table = pd.DataFrame({"tokens": SMALL, "value": floored(SMALL)})
    held = pd.Series(np.full(len(table), bool(part)))
    with pytest.raises(FitError, match="points are held out, so nothing is tested"):
        extrapolate(forms.power_law("tokens"), table, held)
