"""Refusals: each case that points cannot tell, and its neighbour that they can."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from ebft_study.analysis.scaling import forms
from ebft_study.analysis.scaling.fits import fit
from ebft_study.analysis.scaling.forms import Form
from ebft_study.analysis.scaling.identifiability import obstacle
from ebft_study.analysis.scaling.levels import levels
from ebft_study.errors import EbftError, FitError
from tests.analysis.scaling.designs import SIZES, SMALL, chinchilla, floored, grid, noisy


def of_tokens(tokens: object) -> pd.DataFrame:
    return pd.DataFrame({"tokens": np.asarray(tokens, float)}).assign(value=lambda t: floored(t["tokens"]))


def chinchilla_points(*axes: object, **options: object) -> pd.DataFrame:
    table = grid(*axes, **options)  # type: ignore[arg-type]
    return table.assign(value=chinchilla(table))


PROPORTIONAL = pd.DataFrame({"parameters": SIZES, "tokens": 20 * SIZES * [1, 1.1, 0.9, 1, 1.1, 0.9], "method": "sft"})
ISOFLOP = pd.DataFrame({"parameters": SIZES, "tokens": 1e19 / SIZES, "method": "sft"})
REFUSED: dict[str, tuple[Form, pd.DataFrame, str]] = {
    "three points": (forms.power_law("tokens"), of_tokens(SMALL[:3]), "3 values of tokens: a law with an exponent and"),
    "three points of many seeds": (forms.power_law("tokens"), of_tokens([*SMALL[:3]] * 9), "it takes 4"),
    "three sizes": (forms.additive(), chinchilla_points(SIZES[:3]), "3 values of parameters"),
    "one size": (forms.multiplicative(), chinchilla_points(SIZES[:1]), "1 value of parameters"),
    "as many parameters as scales": (
        forms.rectified(), of_tokens(SMALL[:4]), "4 parameters and 4 scales",
    ),
    "data follow size": (
        forms.additive(), PROPORTIONAL.assign(value=chinchilla(PROPORTIONAL)),
        "tokens follow parameters (about as its power 0.99)",
    ),
    "a small range": (
        forms.power_law("tokens"),
        of_tokens(1e5 * 1.25 ** np.arange(5)).assign(value=lambda t: floored(t["tokens"], exponent=0.1)),
        "ill-conditioned",
    ),
    "no effect": (
        forms.power_law("tokens"), of_tokens(SMALL).assign(value=np.linspace(2, 2.1, 6)), "no effect of scale: A is 0",
    ),
    "unknown": (forms.power_law("flops"), of_tokens(SMALL), "flops: not known of every point"),
    "unknown of one": (
        forms.power_law("tokens"), of_tokens(SMALL).assign(value=lambda t: t["value"].where(t.index > 0)), "value: not",
    ),
    "no start": (forms.sigmoid("tokens"), of_tokens(SMALL), "start: not known"),
    "a negative loss": (forms.power_law("tokens"), of_tokens(SMALL).assign(value=-1.0), "have no logarithm"),
    "no data": (forms.power_law("tokens"), of_tokens([0, *SMALL]).assign(value=2.0), "tokens is not positive"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_points_cannot_tell_is_refused_with_the_reason(name: str) -> None:
    form, table, reason = REFUSED[name]
    with pytest.raises(FitError) as caught:
        fit(form, table)
    assert reason in str(caught.value)
    assert str(caught.value).startswith(f"{form.name}: ")
    assert isinstance(caught.value, EbftError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("form", "table"),
    [
        (forms.power_law("tokens"), of_tokens(SMALL[:4])),
        (forms.additive(), chinchilla_points(SIZES[:4])),
        (forms.rectified(), of_tokens([0, *SMALL[:4]]).assign(value=[3.5, 3.0, 2.6, 2.4, 2.3])),
        (forms.additive(), ISOFLOP.assign(value=chinchilla(ISOFLOP))),
    ],
    ids=["four points", "four sizes", "no data", "data fall with size"],
)
def test_what_points_can_tell_is_not_refused(form: Form, table: pd.DataFrame) -> None:
    assert obstacle(form, table) == ""


def test_multipliers_are_parameters_and_methods_are_scales() -> None:
    table = pd.concat([of_tokens(SMALL[:4]).assign(method="sft"), of_tokens(SMALL[:1]).assign(method="ebft")])
    assert obstacle(forms.power_law("tokens"), table, multiplied="tokens") == ""
    rectified = obstacle(forms.rectified(), table, multiplied="tokens")
    assert rectified.startswith("5 parameters and 5 scales")


def test_seeds_of_one_scale_are_one_scale() -> None:
    amounts = pd.Series([100.0, 104.0, 119.0, 120.0, 0.0, 143.0, 145.0, np.nan, 100.0])
    assert levels(amounts) == [1, 1, 1, 2, 0, 2, 3, -1, 1]
    jittered = noisy(np.tile(SMALL[:3], 5), 0.02, 0)
    assert "3 values of tokens" in obstacle(forms.power_law("tokens"), of_tokens(jittered))
