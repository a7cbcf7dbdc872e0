"""Effective speedups from points whose methods differ by known factors."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from ebft_study.analysis.scaling import forms
from ebft_study.analysis.scaling.fits import fit
from ebft_study.analysis.scaling.speedup import sharing_p_value, speedup
from ebft_study.analysis.statistics import t_quantile
from tests.analysis.scaling.designs import SMALL, chinchilla, floored, grid, noisy

METHODS = ("sft", "ebft", "rlvr")
FACTORS = {"sft": 1.0, "ebft": 2.5, "rlvr": 0.4}


def points(deviation: float = 0.0, seed: int = 0, seeds: int = 3) -> pd.DataFrame:
    """A token of EBFT does what 2.5 of SFT do, and costs 3 times the FLOPs and about 2 times the time."""
    table = grid([1e6], SMALL, seeds=seeds, methods=METHODS)
    k = table["method"].map(FACTORS)
    table["value"] = noisy(floored(table["tokens"] * k), deviation, [11, seed])
    table["flops"] = 6 * 1e6 * table["tokens"] * np.where(table["method"] == "ebft", 3.0, 1.0)
    noise = np.random.default_rng(1).normal(0, 0.05, len(table))
    table["seconds"] = table["tokens"] * np.where(table["method"] == "ebft", 2e-4, 1e-4) * np.exp(noise)
    return table


def test_known_factors_are_recovered_with_one_law_for_all() -> None:
    law = fit(forms.power_law("tokens"), points(), multiplied="tokens", reference="sft")
    assert law.values == pytest.approx({"alpha": 0.4, "E": 2.0, "A": 1e5**0.4, "ebft": 2.5, "rlvr": 0.4}, rel=1e-6)
    other = fit(forms.power_law("tokens"), points(), multiplied="tokens", reference="ebft")
    assert other.values["sft"] == pytest.approx(0.4, rel=1e-6)
    assert other.values["rlvr"] == pytest.approx(0.16, rel=1e-6)


@pytest.mark.parametrize(
    ("form", "value"),
    [
        (forms.additive(), lambda t: chinchilla(t, 2.5)),
        (forms.sigmoid("tokens"), lambda t: 0.1 + 0.5 / (1 + (1e10 / t["tokens"] / t["method"].map(FACTORS)) ** 0.8)),
    ],
    ids=["additive", "sigmoid"],
)
def test_every_form_takes_a_multiplier(form: forms.Form, value: object) -> None:
    table = grid(methods=("sft", "ebft")).assign(start=0.1)
    table["value"] = value(table)  # type: ignore[operator]
    law = fit(form, table, multiplied="tokens", reference="sft")
    assert law.values["ebft"] == pytest.approx(2.5, rel=1e-6)


def test_the_speedup_in_another_amount_is_divided_by_the_cost_of_a_token() -> None:
    law = fit(forms.power_law("tokens"), points(0.005), multiplied="tokens", reference="sft")
    data, flops, seconds = (speedup(law, "ebft", amount) for amount in ("tokens", "flops", "seconds"))
    assert data is not None
    assert flops is not None
    assert seconds is not None
    assert data.factor.value == pytest.approx(2.5, rel=0.15)
    assert data.is_clear
    for bound in ("value", "low", "high"):
        assert getattr(flops.factor, bound) == pytest.approx(getattr(data.factor, bound) / 3)
    assert flops.ratios == pytest.approx((3.0, 3.0))
    assert seconds.factor.value == pytest.approx(data.factor.value / 2, rel=0.05)
    assert seconds.ratios[0] < 2 < seconds.ratios[1]
    ratio = law.table.assign(cost=law.table["seconds"] / law.table["tokens"]).pivot_table(
        index=["tokens", "seed"], columns="method", values="cost"
    )
    logs = np.log(ratio["ebft"] / ratio["sft"])
    spread = t_quantile(0.05, len(logs) - 1) * logs.std() / math.sqrt(len(logs))
    half = math.hypot(math.log(data.factor.high / data.factor.value), spread)
    assert math.log(seconds.factor.high / seconds.factor.value) == pytest.approx(half)


def test_an_unknown_cost_gives_no_speedup() -> None:
    table = points().assign(flops=lambda t: t["flops"].where(t["method"] != "ebft"))
    law = fit(forms.power_law("tokens"), table, multiplied="tokens", reference="sft")
    assert speedup(law, "ebft", "flops") is None
    assert speedup(law, "rlvr", "flops") is not None


def test_intervals_of_speedups_hold_the_truth_as_often_as_they_say() -> None:
    held, studies = 0, 60
    for study in range(studies):
        table = points(0.01, study).assign(seed=lambda t: range(len(t)))
        law = fit(forms.power_law("tokens"), table, multiplied="tokens", reference="sft")
        limit = t_quantile(0.05, law.degrees) ** 2
        held += sum(law.deviance(name, FACTORS[name]) <= limit for name in ("ebft", "rlvr"))
    assert 0.89 < held / (2 * studies) < 0.995


def test_laws_of_another_floor_are_told_from_a_speedup() -> None:
    same = points(0.01, 3)
    other = same.assign(value=same["value"] + 0.15 * (same["method"] == "ebft"))
    p = [
        sharing_p_value(fit(forms.power_law("tokens"), t, multiplied="tokens", reference="sft")) for t in (same, other)
    ]
    assert p[0] > 0.01
    assert p[1] < 1e-4
