"""Scaling fits against the constants that made the points, general least squares, and linear models' intervals."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import least_squares, nnls

from ebft_study.analysis.scaling import forms
from ebft_study.analysis.scaling.fits import Fit, fit
from ebft_study.analysis.scaling.forms import Form
from ebft_study.analysis.scaling.projection import Problem, coefficients, minimize, variables
from ebft_study.analysis.statistics import t_quantile
from tests.analysis.scaling.designs import CHINCHILLA, SMALL, chinchilla, floored, grid, noisy


def problem_of(form: Form, table: pd.DataFrame, delta: float = math.inf) -> Problem:
    y = table["value"].to_numpy(float)
    return Problem(form, variables(form, table), y, np.full(len(y), delta))


def of_tokens(values: np.ndarray, tokens: np.ndarray = SMALL, **columns: object) -> pd.DataFrame:
    return pd.DataFrame({"tokens": tokens, "value": values}).assign(**columns)


def noisy_power_law(seeds: int = 3, deviation: float = 0.01, seed: int = 0) -> Fit:
    table = grid([1e6], SMALL, seeds=seeds).drop(columns="parameters")
    table["seed"] = range(len(table))  # every point is a cluster
    table["value"] = noisy(floored(table["tokens"]), deviation, seed)
    return fit(forms.power_law("tokens"), table)


# --- the minimum -----------------------------------------------------------------------------------------------


def test_chinchillas_constants_are_recovered() -> None:
    table = grid()
    found = fit(forms.additive(), table.assign(value=chinchilla(table))).values
    assert found == pytest.approx(CHINCHILLA, rel=1e-6)


X = np.geomspace(1e5, 1e8, 8)
NOISELESS: list[tuple[Form, dict[str, float], pd.DataFrame]] = [
    (forms.power_law("flops"), {"E": 1.7, "A": 50.0, "alpha": 0.31}, pd.DataFrame({"flops": X})),
    (
        forms.multiplicative(),
        {"E": 1.2, "A": 900.0, "alpha": 0.2, "beta": 0.15},
        grid(np.geomspace(1e5, 1e8, 5), np.geomspace(1e4, 1e7, 5)),
    ),
    (
        forms.rectified(),
        {"E": 1.1, "B": 300.0, "beta": 0.6, "D_p": 4e5},
        pd.DataFrame({"tokens": [0.0, *np.geomspace(1e4, 1e8, 9)]}),
    ),
    (
        forms.sigmoid(),
        {"A": 0.61, "B": 1.3, "C_mid": 3e6},
        pd.DataFrame({"flops": X, "start": 0.12}),
    ),
]  # fmt: skip


def value_by_hand(form: Form, p: dict[str, float], row: dict[str, float]) -> float:
    """The formulas as their papers print them."""
    match form.name.split()[0]:
        case "power":
            return p["E"] + p["A"] / row["flops"] ** p["alpha"]
        case "multiplicative":
            return p["A"] * row["parameters"] ** -p["alpha"] * row["tokens"] ** -p["beta"] + p["E"]
        case "rectified":
            learnt = p["D_p"] ** p["beta"]
            return p["B"] / (learnt + row["tokens"] ** p["beta"]) + p["E"]
        case _:
            return row["start"] + (p["A"] - row["start"]) / (1 + (p["C_mid"] / row["flops"]) ** p["B"])


@pytest.mark.parametrize(("form", "true", "table"), NOISELESS, ids=[form.name for form, _, _ in NOISELESS])
def test_every_form_is_recovered_from_points_without_noise(
    form: Form, true: dict[str, float], table: pd.DataFrame
) -> None:
    table = table.assign(value=[value_by_hand(form, true, row) for row in table.to_dict("records")])
    law = fit(form, table)
    assert law.values == pytest.approx(true, rel=1e-6)
    np.testing.assert_allclose(law.predict(table), table["value"], rtol=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("delta", [math.inf, 0.008])
def test_the_minimum_is_that_of_general_least_squares_started_at_the_truth(seed: int, delta: float) -> None:
    table = grid()
    y = noisy(chinchilla(table), 0.01, seed)
    n, d = table["parameters"].to_numpy(), table["tokens"].to_numpy()
    true = np.array([CHINCHILLA[name] for name in ("alpha", "beta", "E", "A", "B")])

    def residuals(logs: np.ndarray) -> np.ndarray:
        alpha, beta, e, a, b = true * np.exp(logs)
        return np.log(e + a / n**alpha + b / d**beta) - np.log(y)

    loss = {"loss": "huber", "f_scale": delta} if math.isfinite(delta) else {}
    reference = least_squares(residuals, np.zeros(5), x_scale="jac", xtol=1e-14, ftol=1e-14, gtol=1e-14, **loss)
    found = minimize(problem_of(forms.additive(), table.assign(value=y), delta))
    assert found.objective == pytest.approx(reference.cost, rel=1e-6)
    np.testing.assert_allclose(found.parameters, true * np.exp(reference.x), rtol=2e-3)


def test_coefficients_are_those_of_nonnegative_least_squares() -> None:
    random, table = np.random.default_rng(0), grid()
    n_zero = 0
    for _ in range(20):
        y = random.uniform(1.0, 3.0, len(table))
        problem = problem_of(forms.additive(), table.assign(value=y))
        theta = random.uniform(0.05, 1.0, (1, 2))
        columns = problem.parts(theta)[1][0] / y[:, None]
        size = np.linalg.norm(columns, axis=0)
        expected, residual = nnls(columns / size, np.ones(len(y)))
        found, squares = coefficients(problem, theta)
        np.testing.assert_allclose(found[0] * size, expected, atol=1e-6)
        assert squares[0] == pytest.approx(residual**2, rel=1e-6)
        n_zero += bool((expected == 0).any())
    assert 0 < n_zero < 20


def test_a_fixed_coefficient_is_taken_off_before() -> None:
    table = of_tokens(floored(SMALL))
    problem = problem_of(forms.power_law("tokens"), table)
    theta = np.array([[0.4]])
    free, fixed = coefficients(problem, theta)[0][0], coefficients(problem, theta, {"E": 2.0})[0][0]
    np.testing.assert_allclose(fixed, free, rtol=1e-6)
    assert coefficients(problem, theta, {"E": 1.5})[0][0, 1] > 1.2 * free[1]


def test_a_floor_that_would_be_negative_is_zero() -> None:
    law = fit(forms.power_law("tokens"), of_tokens(np.append(floored(SMALL[:-1], 0.0), 0.1)))
    assert law.values["E"] == 0
    assert law.estimate("E").low == 0


def test_one_wild_point_hardly_moves_a_fit() -> None:
    clean = noisy_power_law()
    wild = clean.table.assign(value=clean.table["value"] * np.where(clean.table.index == 8, 1.5, 1.0))
    robust = fit(forms.power_law("tokens"), wild)
    squares = minimize(problem_of(forms.power_law("tokens"), wild)).parameters[0]
    shift = abs(robust.values["alpha"] - clean.values["alpha"])
    assert shift < 0.2 * abs(squares - clean.values["alpha"])
    assert robust.scale < 1.6 * clean.scale


# --- intervals -------------------------------------------------------------------------------------------------


def test_an_interval_ends_where_the_deviance_is_students_quantile() -> None:
    law = noisy_power_law()
    assert law.degrees == len(law.table) - 3
    limit = t_quantile(0.05, law.degrees) ** 2
    for name in ("alpha", "E"):
        found = law.estimate(name)
        assert found.low < found.value < found.high
        for end in (found.low, found.high):
            assert law.deviance(name, end) == pytest.approx(limit, rel=0.01)
        assert law.deviance(name, found.value) == pytest.approx(0, abs=1e-6)


def test_the_deviance_is_a_minimum_over_the_other_parameters() -> None:
    """Against a fine grid over exponent and coefficient, with Huber's loss as he wrote it; the floor is fixed."""
    law = noisy_power_law()
    y, x, delta = law.problem.y, law.problem.x["tokens"], law.problem.delta[0]
    alpha, a = np.meshgrid(np.linspace(0.25, 0.5, 251), np.linspace(0.3, 0.6, 301))
    predicted = 1.92 + a[..., None] * (x / 1e6) ** -alpha[..., None]
    r = np.abs(np.log(predicted) - np.log(y))
    best = np.where(r < delta, r**2 / 2, delta * (r - delta / 2)).sum(axis=-1).min()
    expected = 2 * (best - law.solution.objective) / law.scale**2
    assert expected > 1
    assert law.deviance("E", 1.92) == pytest.approx(expected, rel=0.01)


def test_the_interval_of_a_new_measurement_is_students_for_a_linear_model() -> None:
    """With a huge delta and fixed exponents the form is linear; here it nearly is, for its errors are small."""
    law = noisy_power_law(deviation=1e-4)
    point = pd.DataFrame({"tokens": [3e6]})
    for n in (1, 3):
        found = law.forecast(point, n=n)
        g = law._forecast_gradient(point)
        half = t_quantile(0.05, law.degrees) * law.scale * math.sqrt(1 / n + g @ law._bread @ g)
        assert math.log(found.high / found.low) == pytest.approx(2 * half, rel=0.02)
        assert found.value == pytest.approx(floored(np.array([3e6]))[0], rel=1e-3)


def test_the_gradient_of_a_forecast_is_its_derivative() -> None:
    law = noisy_power_law()
    point = pd.DataFrame({"tokens": [1e8]})
    by_theta = law._forecast_gradient(point)[0]
    moved = law.solution.parameters.copy()
    sizes = [np.sqrt((law.problem.parts(t[None])[1][0] ** 2).mean(axis=0)) for t in (moved[:1], moved[:1] * 1.0001)]
    there = law.problem.at(point, np.ones(1))
    before = there.predict(moved)[0]
    moved = np.append(moved[:1] * 1.0001, moved[1:] * sizes[0] / sizes[1])
    assert by_theta == pytest.approx(math.log(there.predict(moved)[0] / before) / math.log(1.0001), rel=1e-3)


def test_points_of_a_cluster_are_no_independent_evidence() -> None:
    """Every point three times over, once as if other seeds, once as the same ones: these say no more."""
    table = noisy_power_law(deviation=0.01).table.drop(columns="seed").assign(parameters=1e6)
    once = table.assign(seed=range(len(table)))
    copies = pd.concat([once] * 3, ignore_index=True)
    alone = fit(forms.power_law("tokens"), once).estimate("alpha")
    naive = fit(forms.power_law("tokens"), copies.assign(seed=range(len(copies)))).estimate("alpha")
    clustered = fit(forms.power_law("tokens"), copies).estimate("alpha")
    width = alone.high - alone.low
    assert naive.high - naive.low < 0.65 * width
    assert clustered.high - clustered.low == pytest.approx(width, rel=0.15)


def test_what_seeds_do_to_all_their_points_widens_the_floor() -> None:
    table = grid([1e6], SMALL, seeds=6)
    shift = np.random.default_rng(2).normal(0, 0.02, 6)[table["seed"]]
    table["value"] = noisy(floored(table["tokens"]) * np.exp(shift), 0.001, 3)
    clustered, naive = (fit(forms.power_law("tokens"), t) for t in (table, table.drop(columns="seed")))
    assert (clustered.degrees, naive.degrees) == (5, 33)
    point = pd.DataFrame({"tokens": [1e6]})
    widths = [law.forecast(point, n=30) for law in (clustered, naive)]
    assert widths[0].high - widths[0].low > 1.5 * (widths[1].high - widths[1].low)


def test_the_bootstrap_draws_clusters() -> None:
    law = noisy_power_law()
    drawn = law.bootstrap(60, seed=1)
    assert list(drawn) == ["alpha", "E", "A"]
    gradient = law._gradient("alpha")
    error = law.scale * math.sqrt(gradient @ law._bread @ gradient) * 0.4  # of a log
    assert drawn["alpha"].std() == pytest.approx(error, rel=0.5)
    pd.testing.assert_frame_equal(drawn, law.bootstrap(60, seed=1))
    one = fit(law.form, law.table.assign(seed=0, parameters=1.0))
    np.testing.assert_allclose(one.bootstrap(3), one.solution.parameters[None].repeat(3, axis=0), rtol=1e-5)


COVERAGE_STUDIES = 120


def with_shifts(table: pd.DataFrame, values: np.ndarray, study: int, shift: float = 0.01) -> pd.DataFrame:
    """Every size and seed has a level of its own, twice as far off as single points."""
    random, cluster = np.random.default_rng([3, study]), table.groupby(["parameters", "seed"]).ngroup()
    errors = random.normal(0, shift, cluster.max() + 1)[cluster] + random.normal(0, shift / 2, len(table))
    return table.assign(value=values * np.exp(errors))


def covered(studies: int, form: Form, table: pd.DataFrame, values: np.ndarray, true: dict[str, float]) -> pd.Series:
    """How often the 95 % interval of each parameter holds the truth."""
    held = []
    for study in range(studies):
        law = fit(form, table.assign(value=noisy(values, 0.01, [7, study])))
        limit = t_quantile(0.05, law.degrees) ** 2
        held.append({name: law.deviance(name, value) <= limit for name, value in true.items()})
    return pd.DataFrame(held).mean()


def test_intervals_of_a_power_law_hold_the_truth_as_often_as_they_say() -> None:
    table = grid([1e6], SMALL, seeds=3).drop(columns=["parameters", "seed"])
    rates = covered(
        COVERAGE_STUDIES, forms.power_law("tokens"), table, floored(table["tokens"]), {"alpha": 0.4, "E": 2.0}
    )
    assert rates.between(0.89, 0.99).all(), rates  # 0.95 +- 3 standard errors of 0.02


@pytest.mark.slow
def test_intervals_of_the_additive_form_hold_the_truth_as_often_as_they_say() -> None:
    table = grid(seeds=3).assign(seed=lambda t: range(len(t)))
    true = {name: CHINCHILLA[name] for name in ("alpha", "beta", "E")}
    rates = covered(300, forms.additive(), table, chinchilla(table), true)
    assert rates.between(0.91, 0.985).all(), rates


def test_intervals_hold_the_truth_where_seeds_shift_all_their_points() -> None:
    """And would not if points were independent evidence."""
    table = grid(np.geomspace(1e5, 1e7, 5), SMALL, seeds=3)
    values = 1.5 + (table["parameters"].to_numpy() / 1e5) ** -0.4 + (table["tokens"].to_numpy() / 1e5) ** -0.4
    rates = []
    for as_clusters in (True, False):
        held = []
        for study in range(60):
            points = with_shifts(table, values, study)
            law = fit(forms.additive(), points if as_clusters else points.drop(columns="seed"))
            limit = t_quantile(0.05, law.degrees) ** 2
            held.append([law.deviance(name, true) <= limit for name, true in (("alpha", 0.4), ("E", 1.5))])
        rates.append(np.mean(held, axis=0))
    assert (rates[0] > 0.83).all(), rates
    assert (rates[1] < rates[0] - 0.1).all(), rates


@pytest.mark.slow
def test_the_bootstrap_over_three_seeds_is_too_narrow() -> None:
    table, studies = grid([1e6], SMALL, seeds=3), 100
    profile = bootstrap = 0
    for study in range(studies):
        law = fit(forms.power_law("tokens"), with_shifts(table, floored(table["tokens"]), study))
        low, high = law.bootstrap(60)["E"].quantile([0.025, 0.975])
        bootstrap += low <= 2.0 <= high
        profile += law.deviance("E", 2.0) <= t_quantile(0.05, law.degrees) ** 2
    assert profile > 0.9 * studies
    assert bootstrap < 0.85 * studies
