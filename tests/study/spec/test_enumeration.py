"""Configurations of axes with conditions, choices and exclusions, against writing them all out and striking some."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from ebft_study.errors import ConfigError
from ebft_study.study.spec import enumeration, normalize, trials
from ebft_study.study.spec.study_spec import StudySpec
from tests.studies import resolved

CONDITIONAL: dict[str, Any] = {
    "whitening": ["none", "variant_i"],
    "n_samples": {"values": [4, 8], "when": {"whitening": "variant_i"}},
    "alpha": {"values": [0.0, 1.0], "when": {"n_samples": [8], "whitening": ["variant_i"]}},
    "gamma": [0.0, 0.1],
}


def spec(**changes: Any) -> StudySpec:
    content = {"study": "s", "question": "q", "run": {"steps": 4}, **changes}
    return normalize.from_record(content, source="test")


def labels(study: StudySpec) -> list[str]:
    return [configuration.label for configuration in trials.enumerated(study)]


def test_a_conditional_grid_is_the_full_one_with_what_does_not_exist_left_out() -> None:
    expected = []
    for whitening, n, alpha, gamma in itertools.product(["none", "variant_i"], [4, 8], [0, 1], ["0", "0.1"]):
        parts = [f"whitening={whitening}"]
        if whitening == "variant_i":
            parts.append(f"n_samples={n}")
            if n == 8:
                parts.append(f"alpha={alpha}")
        expected.append(" ".join([*parts, f"gamma={gamma}"]))
    # Each once, in the order of the full grid.
    assert labels(spec(axes=CONDITIONAL)) == list(dict.fromkeys(expected))


def test_an_axis_that_does_not_exist_leaves_the_run_as_it_is() -> None:
    study = spec(axes={"alpha": [0.0, 1.0], "gamma": {"values": [0.1], "when": {"alpha": 1}}}, run={"gamma": 0.5})
    assert [trial.run.loss.gamma for trial in trials.trials_of(study, trials.enumerated(study))] == [0.5, 0.1]


def test_choices_set_several_settings_under_one_name() -> None:
    choices = {"small": {"model": "a", "learning_rate": "1e-3"}, "large": {"model": "b"}}
    study = spec(axes={"size": {"choices": choices}, "alpha": [0.5]}, run={"learning_rate": 1e-5})
    made = trials.trials_of(study, trials.enumerated(study))
    assert [(t.configuration.label, t.run.model, t.run.optimizer.learning_rate) for t in made] == [
        ("size=small alpha=0.5", "a", 1e-3),
        ("size=large alpha=0.5", "b", 1e-5),
    ]


EXCLUDE = [{"whitening": "variant_i", "gamma": 0.1}, {"n_samples": 4}]


def test_exclusions_strike_what_matches_in_all_they_name_and_numbers_close_up() -> None:
    study = spec(axes=CONDITIONAL, exclude=EXCLUDE, seeds=[0, 1])
    struck = [
        label
        for label in labels(spec(axes=CONDITIONAL))
        if not ("variant_i" in label and "gamma=0.1" in label) and "n_samples=4" not in label
    ]
    assert labels(study) == struck
    made = trials.trials_of(study, trials.enumerated(study))
    assert [trial.trial_id for trial in made] == [f"t{number:04d}" for number in range(2 * len(struck))]


def test_random_draws_are_those_of_the_grid_and_can_be_all_of_them() -> None:
    grid = spec(axes=CONDITIONAL, exclude=EXCLUDE)
    everything = labels(grid)
    search = {"algorithm": "random", "num_configurations": len(everything)}
    assert sorted(labels(spec(axes=CONDITIONAL, exclude=EXCLUDE, search=search))) == sorted(everything)
    assert enumeration.number_of_choices(grid) == len(everything)


def test_another_seed_of_the_search_draws_others() -> None:
    axes = {"gamma": {"distribution": "uniform", "low": 0.0, "high": 1.0}}
    drawn = [
        labels(spec(axes=axes, search={"algorithm": "random", "num_configurations": 5, "search_seed": seed}))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])


def test_the_last_of_very_unlikely_configurations_is_found() -> None:
    """Of ten conditions in a row, the deepest configuration is drawn once in 2^10 * 40 times."""
    names = ["alpha", "gamma", "temperature", "weight_decay", "ema_decay", "max_grad_norm", "kl_coefficient"]
    axes: dict[str, Any] = {}
    for index, name in enumerate(names):
        axes[name] = {"values": [0.25, 0.5], "when": {names[index - 1]: 0.5} if index else {}}
    axes["n_samples"] = {"distribution": "integer", "low": 2, "high": 41, "when": {names[-1]: 0.5}}
    size = len(names) + 40
    assert len(labels(spec(axes=axes))) == size
    found = labels(spec(axes=axes, search={"algorithm": "random", "num_configurations": size}))
    assert len(set(found)) == size
    fewer = labels(spec(axes=axes, search={"algorithm": "random", "num_configurations": size - 3}))
    assert found[: size - 3] == fewer


def test_a_grid_takes_ranges_that_have_steps() -> None:
    axes = {"gamma": {"distribution": "uniform", "low": 0, "high": 0.3, "step": 0.1}}
    assert labels(spec(axes=axes)) == ["gamma=0", "gamma=0.1", "gamma=0.2", "gamma=0.3"]


def test_a_grid_too_large_to_list_is_refused_and_not_listed() -> None:
    axes = {name: {"distribution": "integer", "low": 1, "high": 1000} for name in ("n_samples", "batch_size", "stride")}
    with pytest.raises(ConfigError, match="more than 100000 configurations"):
        trials.enumerated(spec(axes=axes))


def test_excluding_everything_is_refused_for_every_search() -> None:
    axes = {"alpha": [0.0, 1.0], "gamma": {"distribution": "uniform", "low": 0.0, "high": 1.0}}
    search = {"algorithm": "optuna", "num_configurations": 2}
    study = spec(axes=axes, exclude=[{"alpha": [0.0]}, {"alpha": 1}], search=search)
    with pytest.raises(ConfigError, match="exclude: leaves no configuration to run"):
        resolved(study)


def test_baselines_are_not_excluded() -> None:
    study = spec(axes={"alpha": [0.0, 1.0]}, baselines={"zero": {"alpha": 0.0}}, exclude=[{"alpha": 0.0}])
    assert labels(study) == ["zero", "alpha=1"]


def test_a_spec_with_all_of_it_survives_its_own_record() -> None:
    axes = {**CONDITIONAL, "size": {"choices": {"small": {"max_grad_norm": None}, "large": {"max_grad_norm": 1.0}}}}
    linked = {"batch_size": {"product": ["n_samples", 2]}, "warm_start_learning_rate": {"same_as": "learning_rate"}}
    study = spec(axes=axes, exclude=EXCLUDE, linked=linked)
    assert normalize.from_record(normalize.dump(study), source="study.yaml") == study
    assert labels(normalize.from_record(normalize.dump(study), source="study.yaml")) == labels(study)
