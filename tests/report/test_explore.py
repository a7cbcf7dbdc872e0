"""The values that the report's script works on: they are those of the tables, safe in a page, and bounded in size."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ebft_study.analysis.summary import StudySummary, summarize
from ebft_study.report import explore, samples
from ebft_study.results import TrialRecorder, load
from tests.synthetic_study import write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudySummary:
    folder = tmp_path_factory.mktemp("explore") / "s"
    write_study(folder, statuses={((1.0, 0.0), 1): "stopped"})
    texts = {"context": "def area(r):\n    return ", "ground_truth": "math.pi * r * r"}
    parts = {"reward": 0.1, "alignment": 1.0, "diversity": 0.9, "advantage": 0.0}
    row = {"sequence": 3, "anchor": 16, "sample": 0, "completion": "before training", **texts, **parts}
    TrialRecorder(folder, study="s", trial_id="t000", attempt=0).samples(0, [row])
    return summarize(load(folder))


def test_curves_are_the_means_and_ranges_of_finished_trials(study: StudySummary) -> None:
    data = explore.data(study)
    names = [each["name"] for each in data["metrics"]]
    assert names[:2] == ["cfm_loss", "ce_loss"]
    assert "reward" in names
    rows = study.results.metrics
    for c, drawn in zip(study.configurations, data["configurations"], strict=True):
        assert drawn["label"] == c.label
        measured = rows[rows["trial_id"].isin(c.finished["trial_id"])].groupby("step")["cfm_loss"]
        curve = drawn["curves"]["cfm_loss"]
        expected = measured.agg(["mean", "min", "max"])
        assert curve["x"] == expected.index.tolist()
        for name, column in (("mean", "mean"), ("low", "min"), ("high", "max")):
            assert curve[name] == pytest.approx(expected[column].tolist(), rel=1e-5)
    (stopped,) = [each for each in data["configurations"] if "open" in each["curves"]["cfm_loss"]]
    assert stopped["label"] == "α=1, γ=0"
    assert stopped["curves"]["cfm_loss"]["open"][0]["x"] == [0, 20]


def test_a_trial_has_its_settings_events_and_samples_beside_those_of_base_and_sft(study: StudySummary) -> None:
    trials = explore.data(study)["trials"]
    assert set(trials) == set(study.results.trials["trial_id"])
    about = trials["t003"]
    assert ["alpha", "0", "not read"] in [[a, b.removesuffix(".0"), c] for a, b, c in about["differs"]]
    assert ["method", "ebft", "sft"] in about["differs"]
    assert about["reference"] == "SFT"
    first = next(c for c in study.configurations if (c.trials["trial_id"] == "t000").any())
    (prompt,) = trials["t000"]["samples"]
    names = [name for name, _ in prompt["models"]]
    assert names == [samples.BASE, "SFT", f"{first.label}, t000"]
    assert prompt["models"][0][1] == [("before training", "0.10")]
    sft = next(c for c in study.configurations if c.is_sft)
    assert trials[sft.trials["trial_id"].iloc[0]]["differs"] == []


def test_samples_of_models_stand_beside_each_other_on_the_same_prompt(study: StudySummary) -> None:
    (prompt,) = samples.best_of_methods(study, samples.Samples(study))
    assert list(prompt.models)[:2] == [samples.BASE, "SFT"]
    assert len(prompt.models) == 3
    assert prompt.rows[0][0] == ("before training", "0.10")
    assert prompt.rows[1][0] is None  # the base model has one sample, the others two


def test_nothing_in_a_text_ends_the_script_that_holds_it() -> None:
    hostile = {"a": "</script><!--<script>\u2028 & '\"", "b": [1.5, None]}
    written = explore.as_json(hostile)
    assert "<" not in written
    assert "\u2028" not in written
    assert json.loads(written) == hostile
    with pytest.raises(ValueError):
        explore.as_json({"a": float("nan")})


def test_many_configurations_have_curves_for_the_best_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explore, "MAX_VALUES", 1000)
    effects: dict[Any, Any] = {1e-5 * rate: (0.0, -0.01 * rate) for rate in range(1, 91)} | {None: (0.0, 0.5)}
    options: dict[str, Any] = {"settings": lambda key: {"learning_rate": key}, "seeds": (0,), "noise": 0.0}
    study = summarize(load(write_study(tmp_path / "s", effects=effects, log_every=1, **options)))
    data = explore.data(study)
    labels = [each["label"] for each in data["configurations"]]
    assert len(labels) == explore.MAX_CONFIGURATIONS + 1
    assert labels[-1] == "SFT"
    assert "lr=9e-4" in labels
    assert "lr=1e-5" not in labels
    assert re.match(r"Curves and samples are those of the 61 best .* of 91\.", data["note"])
    points = [len(curve["x"]) for each in data["configurations"] for curve in each["curves"].values()]
    assert explore.MIN_POINTS // 2 < max(points) <= explore.MIN_POINTS + 1
    assert all(each["curves"]["cfm_loss"]["x"][-1] == 40 for each in data["configurations"])


def test_settings_that_are_equal_are_no_difference(study: StudySummary) -> None:
    assert all(name not in ("seed", "steps", "model") for name, *_ in explore.data(study)["trials"]["t000"]["differs"])
