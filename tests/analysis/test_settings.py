"""Grouped settings are one axis of a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ebft_study import results, text
from ebft_study.analysis.settings import grouped_settings, sort_key
from ebft_study.analysis.summary import summarize
from ebft_study.report import facts, write_report
from tests.synthetic_study import write_study

SIZES = {
    "large": {"model": "tiny-1m", "features.feature_network": "base", "optimizer.learning_rate": 2e-4},
    "small": {"model": "tiny-4m", "features.feature_network": "tiny-1m", "optimizer.learning_rate": 1e-4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes and gamma in a grid, batch_size following gamma, and the names that the driver writes."""

    def settings(key: Any) -> dict[str, Any]:
        size, gamma = key
        return {**SIZES[size], "gamma": gamma, "batch_size": 4 if gamma == 0 else 8}

    effects: dict[Any, Any] = {(size, gamma): (-0.1 - gamma, -0.02) for size in SIZES for gamma in (0.0, 0.1)}
    made = write_study(
        tmp_path_factory.mktemp("study"), effects={**effects, None: (-0.1, -0.01)}, settings=settings, seeds=(0, 1)
    )
    spec = yaml.safe_load((made / "study.yaml").read_text())
    spec["axes"] = {"size": {"choices": SIZES}, "loss.gamma": [0.0, 0.1]}
    spec["linked"] = {"training.batch_size": {"product": ["loss.gamma", 40]}}
    (made / "study.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    recorder, names = results.StudyRecorder(made, study="s"), {"base": "large", "tiny-1m": "small"}
    for row in results.read_table(made, "trials").to_dict("records"):
        if row["method"] == "ebft":
            name = f"size={names[row['feature_network']]} gamma={row['gamma']:g}"
            recorder.trial({**{key: row[key] for key in ("trial_id", "status", "attempt")}, "configuration": name})
    return made


@pytest.fixture(scope="module")
def loaded(folder: Path) -> results.Results:
    return results.load(folder)


def test_choices_and_links_are_shown_as_one_axis_each(loaded: results.Results) -> None:
    study = summarize(loaded)
    assert set(study.varying) == {"size", "gamma"}
    assert study.shown_as["model"] == study.shown_as["learning_rate"] == "size"
    assert study.shown_as["batch_size"] == "gamma"
    assert {c.label for c in study.ebft} == {f"size={s}, γ={g}" for s in SIZES for g in ("0", "0.1")}
    assert study.not_comparable == ("size",)
    assert [c.settings["size"] for c in study.sft] == [None]


def test_choices_are_ordered_as_the_study_file_lists_them(loaded: results.Results) -> None:
    sizes = [c.settings["size"] for c in summarize(loaded).ebft]
    assert sorted(set(sizes), key=sort_key) == ["large", "small"]
    assert sizes in (["large", "large", "small", "small"], ["large", "small"] * 2)


def test_the_report_says_what_choices_stand_for(loaded: results.Results) -> None:
    asked = dict(facts.asked(summarize(loaded)))
    assert "small (model tiny-4m, feature_network tiny-1m, lr 1e-4)" in asked["size"]
    assert text.named("size") == "size"


def test_a_setting_of_several_axes_stands_for_itself() -> None:
    spec = {"axes": {axis: {"choices": {"a": {"features.depths": [0.5]}}} for axis in ("one", "two")}}
    assert grouped_settings(spec, ("depths", "alpha")) == {"depths": "depths", "alpha": "alpha"}


def test_the_report_of_such_a_study_draws_outcomes_along_the_axis(folder: Path) -> None:
    page = write_report(folder).read_text()
    assert "Outcome along each setting" in page
    assert "size=small, γ=0.1" in page
