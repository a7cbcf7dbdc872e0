"""Points of scaling fits from tables of synthetic studies, and the laws of a whole study."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ebft_study.analysis.scaling.points import as_gain, curve_points, final_points
from ebft_study.analysis.scaling.study import laws, laws_of_all
from ebft_study.analysis.summary import StudySummary, summarize
from ebft_study.errors import FitError
from ebft_study.results import load, read_table
from tests.synthetic_study import BASE_CE, cost_at, write_study

SIZES = {"tiny-1m": 1_000_000, "tiny-4m": 4_000_000, "tiny-16m": 16_000_000, "a-64m": 64_000_000, "a-256m": 256_000_000}
BATCHES = (2, 4, 8, 16, 32)
SEQUENCE, STEPS = 128, 40


def loss(parameters: float, tokens: float) -> float:
    return 1.5 + (parameters / 1e6) ** -0.3 + (tokens / 1e4) ** -0.5


def gain(tokens: float) -> float:
    """Of CFM: half of the most, 0.2, at 30,000 tokens."""
    return 0.2 / (1 + (3e4 / tokens) ** 1.5)


def settings_of(key: Any) -> dict[str, Any]:
    method, model, batch, *schedule = key
    chosen = {"method": method, "model": model, "batch_size": batch, "sequence_length": SEQUENCE}
    return chosen | ({"schedule": schedule[0]} if schedule else {})


def written(
    folder: Path, keys: list[tuple[Any, ...]], *, speedup: float = 2.0, judge: str | None = None, **options: Any
) -> StudySummary:
    """A study of methods, models and batch sizes whose losses follow a law; EBFT makes `speedup` tokens of one."""
    effects = {}
    for key in keys:
        tokens = key[2] * SEQUENCE * STEPS * (speedup if key[0] == "ebft" else 1.0)
        effects[key] = (loss(SIZES[key[1]], tokens) - BASE_CE, -gain(tokens))
    defaults = {"seeds": (0, 1), "noise": 1e-5, "steps": STEPS, "parameters": SIZES}
    judged = {"judge": judge} if judge else {}
    write_study(folder, effects=effects, settings=lambda key: settings_of(key) | judged, **{**defaults, **options})
    return summarize(load(folder))


def test_a_point_is_a_trial_at_its_end_with_what_it_cost(tmp_path: Path) -> None:
    keys = [("sft", "tiny-1m", 4), ("sft", "tiny-4m", 8), ("ebft", "tiny-1m", 4)]
    study = written(tmp_path / "study", keys, statuses={(keys[0], 1): "stopped"})
    points = final_points(study).set_index(["method", "parameters", "seed"]).sort_index()
    assert len(points) == 5
    point = points.loc["sft", 4e6, 1]
    assert point["tokens"] == 8 * SEQUENCE * STEPS
    assert (point["step"], point["start"]) == (STEPS, pytest.approx(BASE_CE))
    assert point["value"] == pytest.approx(loss(4e6, point["tokens"]), abs=1e-3)
    run = cost_at.__globals__["config"].build_run({"method": "ebft"}, source="test")
    costs = cost_at(run, STEPS)
    ebft = points.loc["ebft", 1e6, 0]
    assert (ebft["flops"], ebft["seconds"]) == (costs["flops"], pytest.approx(costs["update_seconds"]))
    assert ebft["flops"] == 3 * points.loc["sft", 1e6, 0]["flops"]
    assert set(points["configuration"]) == {c.label for c in study.configurations}


def test_the_middle_of_a_cosine_schedule_is_no_final_point(tmp_path: Path) -> None:
    study = written(tmp_path / "study", [("sft", "tiny-1m", 4, "cosine"), ("sft", "tiny-4m", 4, "constant")])
    assert len(final_points(study)) == 4
    with pytest.raises(FitError, match="schedule=cosine: the middle of a run is no final point"):
        curve_points(study)
    constant = [c for c in study.configurations if c.settings["schedule"] == "constant"]
    curve = curve_points(study, configurations=constant)
    metrics = read_table(tmp_path / "study", "metrics").merge(
        study.results.trials.loc[study.results.trials["model"] == "tiny-4m", ["trial_id"]], on="trial_id"
    )
    assert sorted(curve["value"]) == sorted(metrics.loc[metrics["step"] > 0, "ce_loss"])
    assert set(curve["step"]) == {20, 40}
    assert set(curve["start"]) == set(metrics.loc[metrics["step"] == 0, "ce_loss"])
    shortened = study.results.trials.assign(steps_done=lambda t: t["steps_done"] - 1)
    early = summarize(type(study.results)(**{**study.results.__dict__, "trials": shortened}))
    with pytest.raises(FitError, match="ended at step 39 of a cosine schedule of 40"):
        final_points(early)


def test_values_by_different_feature_maps_are_refused(tmp_path: Path) -> None:
    study = written(tmp_path / "study", [("ebft", "tiny-1m", 4), ("ebft", "tiny-4m", 4)])
    with pytest.raises(FitError, match=r"cfm_loss: values do not compare .* differ in model\. Fit each group"):
        final_points(study, "cfm_loss")
    one = [c for c in study.configurations if c.settings["model"] == "tiny-1m"]
    points = final_points(study, "cfm_loss", one)
    gains = as_gain(points, "cfm_loss")
    np.testing.assert_allclose(gains["value"], points["start"] - points["value"])
    assert (gains["value"] > 0).all()
    assert (gains["start"] == 0).all()


# --- the laws of a study ---------------------------------------------------------------------------------------


def test_a_study_without_an_axis_of_scale_has_no_law(tmp_path: Path) -> None:
    assert laws(summarize(load(write_study(tmp_path / "study")))) is None


def test_three_sizes_are_refused_with_the_reason(tmp_path: Path) -> None:
    found = laws(written(tmp_path / "study", [("sft", model, 4) for model in list(SIZES)[:3]]))
    assert found is not None
    assert found.axes == ("parameters",)
    (law,) = found.methods
    assert law.fit is None
    assert law.score is None
    assert "3 values of parameters" in law.reason


def test_the_laws_of_a_study_of_sizes_and_data_are_those_that_made_it(tmp_path: Path) -> None:
    keys = [(m, model, batch) for m in ("sft", "ebft") for model in SIZES for batch in BATCHES]
    study = written(tmp_path / "study", keys)
    found = laws(study)
    assert found is not None
    assert found.axes == ("parameters", "tokens")
    assert [law.method for law in found.methods] == ["ebft", "sft"]
    for law in found.methods:
        assert law.fit is not None
        assert law.fit.form.name == "additive"
        assert law.fit.values["alpha"] == pytest.approx(0.3, rel=0.02)
        assert law.fit.values["beta"] == pytest.approx(0.5, rel=0.02)
        assert law.score is not None
        assert law.score.n_scales == 5
        assert law.score.error < 0.1 * law.score.last_value_error
    assert found.shared is not None
    factors = {(each.method, each.amount): each.factor.value for each in found.shared.speedups}
    assert factors["ebft", "tokens"] == pytest.approx(2.0, rel=0.02)
    assert factors["ebft", "flops"] == pytest.approx(2.0 / 3, rel=0.02)
    assert factors["ebft", "seconds"] == pytest.approx(1.0, rel=0.02)
    assert found.shared.score is not None
    assert found.shared.score.n_pairs == 5
    assert found.shared.score.ranked == 5


def along_curves(study: StudySummary, speedup: float = 2.0) -> StudySummary:
    """The study with validation losses that follow the law all along, for runs of four sequences per update."""
    metrics = study.results.metrics.merge(study.results.trials[["trial_id", "method", "model"]], on="trial_id")
    tokens = 4 * SEQUENCE * metrics["step"]
    worth = tokens * metrics["method"].map({"sft": 1.0, "ebft": speedup})
    values = [
        loss(SIZES[model], at) if at else value
        for model, at, value in zip(metrics["model"], worth, metrics["ce_loss"], strict=True)
    ]
    metrics = metrics.drop(columns=["method", "model"]).assign(tokens_seen=tokens, ce_loss=values)
    return summarize(type(study.results)(**{**study.results.__dict__, "metrics": metrics}))


def test_constant_rates_make_an_axis_of_data_of_one_run_per_size(tmp_path: Path) -> None:
    keys = [(m, model, 4) for m in ("sft", "ebft") for model in SIZES]
    found = laws(along_curves(written(tmp_path / "study", keys, log_every=5)))
    assert found is not None
    assert (found.axes, found.split) == (("parameters", "tokens"), "validation")
    for law in found.methods:
        assert law.fit is not None
        assert law.fit.form.name == "additive"
        assert law.fit.values["beta"] == pytest.approx(0.5, rel=0.02)
        assert set(law.points["step"]) == set(range(5, STEPS + 1, 5)), "the base model is no point"
    assert found.shared is not None
    assert found.shared.fit.estimate("ebft").value == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize(("schedule", "log_every"), [("cosine", 5), ("constant", 20)])
def test_falling_rates_and_few_evaluations_leave_the_ends_of_runs(
    schedule: str, log_every: int, tmp_path: Path
) -> None:
    keys = [("sft", model, 4, schedule) for model in SIZES]
    found = laws(along_curves(written(tmp_path / "study", keys, log_every=log_every)))
    assert found is not None
    assert (found.axes, found.split) == (("parameters",), "heldout")


def test_feature_matching_has_a_law_of_its_gain_over_the_base_model(tmp_path: Path) -> None:
    keys = [(m, "tiny-1m", batch) for m in ("sft", "ebft") for batch in (*BATCHES, 64)]
    found = laws(written(tmp_path / "study", keys), "cfm_loss")
    assert found is not None
    for law, factor in zip(found.methods, (2.0, 1.0), strict=True):
        assert law.fit is not None
        assert law.fit.form.name == "sigmoid"
        assert law.fit.values == pytest.approx({"A": 0.2, "B": 1.5, "C_mid": 3e4 / factor}, rel=0.02)
    assert found.shared is not None
    assert found.shared.fit.estimate("ebft").value == pytest.approx(2.0, rel=0.02)


def test_a_run_that_has_just_begun_is_no_point(tmp_path: Path) -> None:
    study = written(tmp_path / "study", [("sft", model, 4) for model in SIZES])
    whole = curve_points(study)
    begun = study.results.trials["trial_id"].iloc[0]
    trials = study.results.trials.assign(
        parameters=lambda t: t["parameters"].astype(float).where(t["trial_id"] != begun)
    )
    points = curve_points(summarize(type(study.results)(**{**study.results.__dict__, "trials": trials})))
    assert set(whole["trial_id"]) - set(points["trial_id"]) == {begun}


def test_runs_of_several_lengths_count_at_their_ends(tmp_path: Path) -> None:
    keys = [("sft", "tiny-1m", batch) for batch in BATCHES]
    found = laws(along_curves(written(tmp_path / "study", keys, log_every=5)))
    assert found is not None
    assert (found.axes, found.split) == (("tokens",), "heldout")


def test_a_study_has_laws_of_every_loss_that_compares(tmp_path: Path) -> None:
    """CFM of each size's own features does not compare between sizes; that of a judge does."""
    keys = [("sft", model, 4) for model in SIZES]
    study = written(tmp_path / "own", keys)
    assert [found.metric for found in laws_of_all(study)] == ["ce_loss"]
    one_size = written(tmp_path / "one", [("sft", "tiny-1m", batch) for batch in BATCHES])
    assert [found.metric for found in laws_of_all(one_size)] == ["ce_loss", "cfm_loss"]
    judged = written(tmp_path / "judged", keys, judge="tiny-4m")
    assert [found.metric for found in laws_of_all(judged)] == ["ce_loss", "judge_cfm_loss"]
    assert laws_of_all(summarize(load(write_study(tmp_path / "none")))) == []


def test_the_best_configuration_stands_for_its_scale(tmp_path: Path) -> None:
    """Two learning rates at every scale: the worse one is no point."""
    keys = [("sft", "tiny-1m", batch) for batch in BATCHES]
    effects = {}
    for key in keys:
        value = loss(1e6, key[2] * SEQUENCE * STEPS) - BASE_CE
        effects |= {(*key, 1e-3): (value, 0.0), (*key, 1e-5): (value + 0.3, 0.0)}
    write_study(
        tmp_path / "study",
        effects=effects,
        settings=lambda key: settings_of(key[:3]) | {"learning_rate": key[3]},
        seeds=(0, 1),
        noise=1e-5,
        steps=STEPS,
    )
    study = summarize(load(tmp_path / "study"))
    found = laws(study)
    assert found is not None
    assert found.axes == ("tokens",)
    (law,) = found.methods
    assert len(law.points) == 2 * len(BATCHES)
    assert law.points["configuration"].str.contains("lr=1e-3").all()
    assert law.fit is not None
    assert law.fit.values["alpha" if "alpha" in law.fit.values else "beta"] == pytest.approx(0.5, rel=0.05)
    assert not math.isnan(law.fit.scale)
