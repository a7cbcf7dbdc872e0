"""What population-based training changes, and the studies that it refuses."""

from __future__ import annotations

import random
from typing import Any

import pytest

from ebft_study.errors import ConfigError
from ebft_study.study.population import explore
from ebft_study.study.resolving import population_rules
from ebft_study.study.spec import normalize, trials
from ebft_study.study.spec.study_spec import StudySpec
from tests.studies import resolved

AXES = {
    "learning_rate": {"distribution": "log_uniform", "low": 1e-5, "high": 1e-2},
    "n_samples": {"distribution": "integer", "low": 2, "high": 8},
    "alpha": [0.0, 0.25, 0.5, 1.0],
}
RUN = {"steps": 40, "eval_every_steps": 5, "checkpoint_every_steps": 10}


def spec(**changes: Any) -> StudySpec:
    content = {
        "study": "s",
        "question": "q",
        "run": RUN,
        "axes": AXES,
        "search": {"algorithm": "random", "num_configurations": 4},
        **changes,
        "scheduler": {"kind": "pbt", "perturbation_interval_steps": 20, **changes.get("scheduler", {})},
    }
    return normalize.from_record(content, source="study.yaml")


def run_of(study: StudySpec) -> dict[str, Any]:
    return trials.trials_of(study, trials.enumerated(study))[0].run.model_dump(mode="json")


def explored(study: StudySpec, donor: dict[str, Any], number: int = 300) -> list[dict[str, Any]]:
    run = run_of(study.model_copy(update={"axes": spec().axes}))
    return [explore.explore(study, run, donor, random.Random(seed)) for seed in range(number)]


DONOR = {"optimizer.learning_rate": 9e-3, "rollout.n_samples": 2, "reward.alpha": 0.25}


def test_moved_settings_are_neighbours_within_their_range() -> None:
    found = explored(spec(scheduler={"resample_probability": 0.0}), DONOR)
    assert {settings["optimizer.learning_rate"] for settings in found} == {7.2e-3, 1e-2}
    assert {settings["rollout.n_samples"] for settings in found} == {2, 3}  # small numbers move by one
    assert {settings["reward.alpha"] for settings in found} == {0.0, 0.5}


def test_a_number_is_moved_by_a_fifth_and_a_list_ends_at_its_ends() -> None:
    study = spec(scheduler={"resample_probability": 0.0})
    for alpha, neighbours in ((0.0, {0.0, 0.25}), (1.0, {0.5, 1.0})):
        found = explored(study, {"optimizer.learning_rate": 1e-3, "rollout.n_samples": 5, "reward.alpha": alpha})
        assert {settings["reward.alpha"] for settings in found} == neighbours
        assert {settings["optimizer.learning_rate"] for settings in found} == {8e-4, 1.2e-3}


def test_settings_drawn_anew_come_from_the_whole_axis() -> None:
    found = explored(spec(scheduler={"resample_probability": 1.0}), DONOR)
    assert {settings["rollout.n_samples"] for settings in found} == set(range(2, 9))
    assert {settings["reward.alpha"] for settings in found} == {0.0, 0.25, 0.5, 1.0}
    rates = [settings["optimizer.learning_rate"] for settings in found]
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    assert sum(rate < 10**-3.5 for rate in rates) == pytest.approx(150, abs=50)  # half of them, on a log scale


def test_axes_that_are_not_perturbed_are_taken_over_as_they_are() -> None:
    found = explored(spec(scheduler={"perturbed_axes": ["alpha"], "resample_probability": 1.0}), DONOR)
    assert {(s["optimizer.learning_rate"], s["rollout.n_samples"]) for s in found} == {(9e-3, 2)}
    assert len({s["reward.alpha"] for s in found}) == 4


def test_settings_that_break_a_rule_are_not_proposed() -> None:
    axes = {"n_samples": [1, 2], "alpha": [0.0, 1.0]}
    study = spec(axes=axes, run={**RUN, "baseline": "none"}, search={"algorithm": "random", "num_configurations": 2})
    found = explored(study, {"rollout.n_samples": 2, "reward.alpha": 0.0})
    assert {(s["rollout.n_samples"], s["reward.alpha"]) for s in found} == {(1, 0.0), (2, 0.0), (2, 1.0)}


def test_neighbours_on_a_range_with_steps_are_a_step_away() -> None:
    study = spec(axes={"gamma": {"distribution": "uniform", "low": 0.0, "high": 0.3, "step": 0.1}},
                 scheduler={"resample_probability": 0.0})  # fmt: skip
    assert {s["loss.gamma"] for s in explored(study, {"loss.gamma": 0.2})} == {0.1, 0.3}


def test_excluded_settings_are_not_proposed() -> None:
    study = spec(axes={"alpha": [0.0, 0.5], "gamma": [0.0, 0.1]}, exclude=[{"alpha": 0.0, "gamma": 0.0}],
                 scheduler={"resample_probability": 1.0})  # fmt: skip
    found = {tuple(s.values()) for s in explored(study, {"reward.alpha": 0.5, "loss.gamma": 0.0})}
    assert found == {(0.0, 0.1), (0.5, 0.0), (0.5, 0.1)}


def test_what_follows_an_axis_follows_its_new_value() -> None:
    study = spec(linked={"weight_decay": {"product": ["learning_rate", 10]}})
    run = explore.perturbed_run(study, run_of(study), {"optimizer.learning_rate": 2e-3})
    assert run.optimizer.weight_decay == pytest.approx(2e-2)


def test_where_nothing_else_is_possible_the_donors_settings_stay() -> None:
    axes = {"n_samples": [1, 2]}
    study = spec(axes=axes, scheduler={"resample_probability": 0.0})
    donor = {"rollout.n_samples": 2}  # n_samples=1 has no baseline
    assert {s["rollout.n_samples"] for s in explored(study, donor, 20)} == {2}


@pytest.mark.parametrize("path", population_rules.CHANGEABLE)
def test_what_may_change_is_a_setting_of_a_run(path: str) -> None:
    assert path in explore.config.all_keys()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"axes": {"batch_size": [4, 8]}, "search": {}}, "axes.batch_size"),
        ({"axes": {"lora_rank": [4, 8]}, "search": {}}, "axes.lora_rank"),
        ({"axes": {"alpha": [1.0]}, "search": {}}, "a population of 1"),
        ({"search": {"algorithm": "optuna", "num_configurations": 4}}, "search.algorithm"),
        ({"stopping": {"divergence": {}}}, "stopping"),
        ({"scheduler": {"perturbation_interval_steps": 15}}, "checkpoint.checkpoint_every_steps"),
        ({"run": {**RUN, "eval_every_steps": 8}}, "evaluation.eval_every_steps"),
        ({"scheduler": {"perturbation_interval_steps": 40}}, "scheduler.perturbation_interval_steps"),
        ({"scheduler": {"perturbed_axes": ["gamma"]}}, "is no axis of this study"),
        ({"scheduler": {"perturbed_axes": ["gama"]}}, "Did you mean 'gamma'"),
        ({"linked": {"warm_start_learning_rate": {"same_as": "learning_rate"}}}, "linked.warm_start_learning_rate"),
        (
            {"axes": {"alpha": [0.0, 1.0], "gamma": {"values": [0.1, 0.2], "when": {"alpha": 1.0}}}, "search": {}},
            "when",
        ),
        ({"axes": {"alpha": [0.0, 1.0], "size": {"choices": {"small": {"steps": 30}}}}, "search": {}}, "axes.size"),
        ({"scheduler": {"grace_period_steps": 5}}, "grace_period_steps"),
        ({"axes": {"temperature": [0.6, 1.0]}, "search": {}}, "evaluation.evaluation_temperature"),
    ],
)
def test_what_cannot_work_is_refused_when_the_file_is_read(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(spec(**changes))
    assert said in str(caught.value)
    assert "study.yaml" in str(caught.value)


def test_a_sound_population_is_accepted() -> None:
    assert len(resolved(spec(baselines={"sft": {"method": "sft"}})).runs) == 5
    temperature = {"axes": {"temperature": [0.6, 1.0]}, "run": {**RUN, "evaluation_temperature": 1.0}, "search": {}}
    assert len(resolved(spec(**temperature)).runs) == 2
