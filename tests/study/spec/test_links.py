"""Settings that follow others: their arithmetic, their order, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from ebft_study.config import RunConfig
from ebft_study.errors import ConfigError
from ebft_study.study.spec import normalize, trials
from ebft_study.study.spec.study_spec import StudySpec


def spec(linked: dict[str, Any], **changes: Any) -> StudySpec:
    content = {"study": "s", "question": "q", "axes": {"n_samples": [2, 4]}, "linked": linked, **changes}
    return normalize.from_record(content, source="test")


def runs(linked: dict[str, Any], **changes: Any) -> list[RunConfig]:
    study = spec(linked, **changes)
    return [trial.run for trial in trials.trials_of(study, trials.enumerated(study))]


def test_products_quotients_and_copies_follow_the_axes() -> None:
    first, second = runs(
        {
            "steps": {"quotient": [640, "batch_size"]},  # follows what is linked itself, in whichever order
            "batch_size": {"product": ["n_samples", 4]},
            "warm_start_learning_rate": {"product": ["learning_rate", "1e1"]},
            "stride": {"same_as": "completion_length"},
        },
        run={"learning_rate": 1e-3, "completion_length": 5},
    )
    assert (first.training.batch_size, first.training.steps) == (8, 80)
    assert (second.training.batch_size, second.training.steps) == (16, 40)
    assert first.training.warm_start_learning_rate == pytest.approx(1e-2)
    assert first.rollout.stride == 5


def test_a_link_may_follow_a_default_and_the_choices_of_an_axis() -> None:
    axes = {"size": {"choices": {"small": {"model": "a"}, "large": {"model": "b"}}}}
    linked = {"feature_network": {"same_as": "model"}, "checkpoint_every_steps": {"same_as": "steps"}}
    found = runs(linked, axes=axes)
    assert [run.features.feature_network for run in found] == ["a", "b"]
    assert {run.checkpoint.checkpoint_every_steps for run in found} == {RunConfig().training.steps}


def test_baselines_follow_too_unless_they_set_it_themselves() -> None:
    own = {"method": "sft", "batch_size": 3}
    found = runs({"batch_size": {"product": ["n_samples", 4]}}, baselines={"sft": {"method": "sft"}, "own": own})
    assert [run.training.batch_size for run in found] == [16, 3, 8, 16]


@pytest.mark.parametrize(
    ("linked", "part"),
    [
        ({"batch_size": {"product": ["n_samples"], "same_as": "stride"}}, "Give one of same_as, product, quotient"),
        ({"batch_size": {}}, "Give one of same_as, product, quotient"),
        ({"batch_size": {"product": [2, 4]}}, "product of numbers alone"),
        ({"batch_size": {"quotient": [2, "n_samples", 3]}}, "quotient"),
        ({"batch_size": {"product": ["n_sampels", 4]}}, "unknown key 'n_sampels'. Did you mean 'n_samples'"),
        ({"batch_sice": {"same_as": "n_samples"}}, "unknown key 'batch_sice'"),
        ({"seed": {"same_as": "n_samples"}}, "cannot follow a setting"),
        ({"batch_size": {"same_as": "steps"}, "steps": {"same_as": "batch_size"}}, "batch_size -> steps -> batch_size"),
        ({"batch_size": {"product": ["batch_size", 2]}}, "batch_size -> batch_size"),
    ],
)
def test_what_follows_nothing_is_refused_when_the_file_is_read(linked: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        spec(linked)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("linked", "part"),
    [
        ({"batch_size": {"quotient": [10, "n_samples"]}}, "n_samples=4: linked.batch_size=2.5: is a whole number"),
        ({"batch_size": {"product": ["model", 2]}}, "n_samples=2: linked.batch_size=['model', 2]: model is 'tiny-1m'"),
        ({"batch_size": {"quotient": [10, "gamma"]}}, "divides by zero"),
    ],
)
def test_what_does_not_work_out_names_the_configuration(linked: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        runs(linked)
    assert part in str(caught.value)
