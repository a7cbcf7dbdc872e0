"""Enumeration: which trials a study has, in which order, under which names."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ebft_study import config
from ebft_study.study.spec import normalize, trials
from ebft_study.study.spec.study_spec import StudySpec


def spec(**changes: Any) -> StudySpec:
    content = {"study": "s", "question": "q", "run": {"steps": 4}, **changes}
    return normalize.from_record(content, source="test")


def all_trials(study: StudySpec) -> list[trials.Trial]:
    return trials.trials_of(study, trials.enumerated(study))


def test_a_grid_has_every_combination_over_every_seed_once() -> None:
    study = spec(axes={"alpha": [0.0, 0.5, 1.0], "gamma": [0.0, 0.1]}, seeds=[3, 4])
    found = {(t.run.reward.alpha, t.run.loss.gamma, t.run.seed) for t in all_trials(study)}
    assert len(all_trials(study)) == len(found) == 12
    assert found == {(a, g, s) for a in (0.0, 0.5, 1.0) for g in (0.0, 0.1) for s in (3, 4)}


def test_whole_replicates_come_first_and_baselines_lead_each() -> None:
    study = spec(axes={"alpha": [0.0, 1.0]}, seeds=[0, 1], baselines={"sft": {"method": "sft"}})
    assert [t.label for t in all_trials(study)] == [
        "sft seed=0",
        "alpha=0 seed=0",
        "alpha=1 seed=0",
        "sft seed=1",
        "alpha=0 seed=1",
        "alpha=1 seed=1",
    ]
    assert [t.trial_id for t in all_trials(study)] == [f"t{number:04d}" for number in range(6)]


def test_trials_are_the_same_every_time() -> None:
    axes = {"learning_rate": {"distribution": "log_uniform", "low": 1e-5, "high": 1e-3}, "alpha": [0.0, 1.0]}
    search = {"algorithm": "random", "num_configurations": 5}
    assert all_trials(spec(axes=axes, search=search)) == all_trials(spec(axes=axes, search=search))


def test_more_random_configurations_keep_the_first_ones() -> None:
    axes = {"learning_rate": {"distribution": "uniform", "low": 0.0, "high": 1.0}, "alpha": [0.0, 0.5, 1.0]}
    few = trials.enumerated(spec(axes=axes, search={"algorithm": "random", "num_configurations": 3}))
    many = trials.enumerated(spec(axes=axes, search={"algorithm": "random", "num_configurations": 9}))
    other = trials.enumerated(
        spec(axes=axes, search={"algorithm": "random", "num_configurations": 3, "search_seed": 1})
    )
    assert many[:3] == few
    assert other != few


def test_random_draws_stay_in_range_and_differ() -> None:
    axes = {
        "learning_rate": {"distribution": "log_uniform", "low": 1e-5, "high": 1e-3},
        "gamma": {"distribution": "uniform", "low": 0.0, "high": 0.1},
        "n_samples": {"distribution": "integer", "low": 2, "high": 4},
        "alpha": [0.0, 1.0],
    }
    drawn = trials.enumerated(spec(axes=axes, search={"algorithm": "random", "num_configurations": 200}))
    values = {path: [c.settings[path] for c in drawn] for path in drawn[0].settings}
    assert len({c.label for c in drawn}) == 200
    assert all(1e-5 <= rate <= 1e-3 for rate in values["optimizer.learning_rate"])
    assert all(0.0 <= gamma <= 0.1 for gamma in values["loss.gamma"])
    assert set(values["rollout.n_samples"]) == {2, 3, 4}
    # Log-uniform: each decade gets half of the draws (three standard errors of 200 draws are 0.11).
    low = sum(rate < 1e-4 for rate in values["optimizer.learning_rate"]) / 200
    assert math.isclose(low, 0.5, abs_tol=0.11)


def test_random_over_choices_can_draw_all_of_them() -> None:
    axes = {"alpha": [0.0, 1.0], "gamma": [0.0, 0.1]}
    drawn = trials.enumerated(spec(axes=axes, search={"algorithm": "random", "num_configurations": 4}))
    assert {c.label for c in drawn} == {"alpha=0 gamma=0", "alpha=0 gamma=0.1", "alpha=1 gamma=0", "alpha=1 gamma=0.1"}


def test_a_baseline_may_set_what_the_axes_vary() -> None:
    study = spec(axes={"alpha": [0.0, 1.0]}, baselines={"half": {"alpha": 0.5, "learning_rate": 1e-3}})
    (half, *_) = all_trials(study)
    assert half.run.reward.alpha == 0.5
    assert half.run.optimizer.learning_rate == 1e-3
    assert half.configuration.baseline == "half"


def test_the_number_of_trials_is_known_before_a_search_has_chosen_them() -> None:
    axes, baselines = {"alpha": [0.0, 1.0]}, {"sft": {"method": "sft"}}
    grid = spec(axes=axes, baselines=baselines, seeds=[0, 1])
    assert trials.number_of_trials(grid) == len(all_trials(grid)) == 6
    search = {"algorithm": "optuna", "num_configurations": 7}
    assert trials.number_of_trials(spec(axes=axes, baselines=baselines, seeds=[0, 1], search=search)) == 16


def test_a_study_without_axes_is_one_configuration() -> None:
    assert [t.label for t in all_trials(spec(seeds=[0, 1]))] == ["only seed=0", "only seed=1"]


def test_trials_carry_complete_settings() -> None:
    (trial,) = all_trials(spec(axes={"depths": [[0.25, 0.5]]}))
    assert trial.label == "depths=0.25,0.5 seed=0"
    assert trial.run.features.depths == (0.25, 0.5)
    assert trial.run.name == "t0000"
    assert config.RunConfig.model_validate(trial.run.model_dump(mode="json")) == trial.run


@pytest.mark.parametrize(
    ("value", "spelt"),
    [(0.0, "0"), (1e-5, "1e-05"), (0.3, "0.3"), ("tiny-1m", "tiny-1m"), (None, "null"), (True, "True"), (4, "4")],
)
def test_values_are_spelt_as_people_write_them(value: Any, spelt: str) -> None:
    assert trials.format_value(value) == spelt
