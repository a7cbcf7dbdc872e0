"""Known points that are tried first, and results of earlier studies that a search begins with."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from optuna.trial import TrialState

from ebft_study import config, results
from ebft_study.errors import ConfigError, ResultsError
from ebft_study.results import load
from ebft_study.storage import storage_path
from ebft_study.study.folder.trial_states import TrialResult
from ebft_study.study.resolving import extending
from ebft_study.study.resolving.study_file import load_study
from ebft_study.study.search import earlier, journal
from ebft_study.study.search.journal import JOURNAL
from ebft_study.study.search.optuna_search import OptunaSearch
from ebft_study.study.spec import enumeration, normalize, trials
from ebft_study.study.spec.study_spec import StudySpec
from ebft_study.study.spec.trials import Trial
from tests.study.search.searches import plain_optuna, run_all
from tests.synthetic_study import write_study

AXES: dict[str, Any] = {
    "learning_rate": {"distribution": "log_uniform", "low": 1e-5, "high": 1e-2},
    "alpha": [0.0, 0.5, 1.0],
}
KNOWN = [{"learning_rate": 3e-4, "alpha": 1.0}, {"alpha": 0.5}]


def content(**changes: Any) -> dict[str, Any]:
    search = {"algorithm": "optuna", "num_configurations": 6, **changes.pop("search", {})}
    return {"study": "s", "question": "q", "run": {"steps": 40}, "axes": AXES, "search": search, **changes}


def spec(**changes: Any) -> StudySpec:
    return normalize.from_record(content(**changes), source="test")


def result(trial: Trial) -> TrialResult:
    return TrialResult("finished", math.log10(trial.run.optimizer.learning_rate / 1e-3) ** 2, 40)


def points(done: list[Trial]) -> list[tuple[float, float]]:
    return [(trial.run.optimizer.learning_rate, trial.run.reward.alpha) for trial in done]


# --- known points ----------------------------------------------------------------------------------------------


def test_known_points_are_the_first_that_optuna_tries(tmp_path: Path) -> None:
    study = spec(search={"known": KNOWN}, baselines={"sft": {"method": "sft"}})
    done = run_all(OptunaSearch(study, tmp_path / JOURNAL, {}), result)
    assert done[0].configuration.baseline == "sft"
    assert points(done[1:3])[0] == (3e-4, 1.0)
    assert points(done[1:3])[1][1] == 0.5
    assert [trial.trial_id for trial in done] == [f"t{number:04d}" for number in range(7)]
    assert len(set(points(done[1:]))) == 6


def test_known_points_are_the_first_of_random_draws_which_stay_the_same() -> None:
    search = {"algorithm": "random", "search_seed": 3}
    drawn = enumeration.draws(spec(search=search), 4)
    with_known = enumeration.draws(spec(search={**search, "known": KNOWN}), 6)
    assert with_known[0] == {"optimizer.learning_rate": 3e-4, "reward.alpha": 1.0}
    assert with_known[1]["reward.alpha"] == 0.5
    assert with_known[2:] == drawn


def test_known_points_start_first_under_a_scheduler_too() -> None:
    search = {"algorithm": "random", "num_configurations": 30, "known": [{"learning_rate": 3e-4, "alpha": 1.0}]}
    study = spec(search=search, seeds=[0, 1])
    ordered = trials.shuffled(trials.listed(study), "s", lambda trial: trial.unit, first=trials.known_labels(study))
    assert points([ordered[0], ordered[30]]) == [(3e-4, 1.0)] * 2
    assert (ordered[0].seed, ordered[30].seed) == (0, 1)


def test_the_documented_search_loads() -> None:
    page = (Path(__file__).parents[3] / "docs" / "comparing.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    loaded = load_study(content(**yaml.safe_load(block)))
    assert [len(loaded.spec.search.known), loaded.n_trials] == [2, 20]


@pytest.mark.parametrize(
    ("search", "parts"),
    [
        ({"known": [{"alpha": 0.6}]}, ["search.known.0: alpha=0.6", "no value of this axis. The nearest is 0.5"]),
        ({"known": [{"learning_rate": 0.5}]}, ["learning_rate=0.5", "The nearest is 0.01"]),
        ({"known": [{"learning_rate": "1e-3", "alpha": True}]}, ["alpha=True", "no value"]),
        ({"known": [{"gamma": 0.1}]}, ["search.known.0: gamma: is no axis", "learning_rate, alpha"]),
        ({"known": KNOWN, "num_configurations": 1}, ["known: lists 2 points"]),
        ({"known": KNOWN, "algorithm": "grid", "num_configurations": None}, ["a grid runs every combination"]),
        ({"warm_start_from": ["x"], "sampler": "nsga2"}, ["warm_start_from: only these samplers", "tpe or gp"]),
        ({"warm_start_from": ["x"], "algorithm": "random"}, ["warm_start_from: only these samplers"]),
    ],
)
def test_what_cannot_be_tried_is_refused_with_the_nearest_value(search: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load_study(content(search=search))
    for part in parts:
        assert part in str(refused.value)


def test_a_known_point_that_is_excluded_or_given_twice_is_refused() -> None:
    axes = {"alpha": [0.0, 1.0], "gamma": [0.0, 0.1]}
    search = {"algorithm": "random", "num_configurations": 2, "known": [{"alpha": 1.0}]}
    with pytest.raises(ConfigError, match=r"search.known.0=.*is excluded by the study"):
        load_study(content(axes=axes, search=search, exclude=[{"alpha": 1.0}]))
    both = {**search, "known": [{"alpha": 1.0, "gamma": 0.1}, {"alpha": 1.0, "gamma": 0.1}]}
    with pytest.raises(ConfigError, match=r"search.known.1: is excluded, or a point above again"):
        load_study(content(axes=axes, search=both))
    # What one point leaves open is drawn so that it is another one.
    left = {**search, "known": [{"alpha": 1.0, "gamma": 0.1}, {"alpha": 1.0}]}
    assert [trial.label for trial in load_study(content(axes=axes, search=left)).trials] == [
        "alpha=1 gamma=0.1 seed=0",
        "alpha=1 gamma=0 seed=0",
    ]


def test_a_known_point_names_what_its_axes_depend_on() -> None:
    axes = {"whitening": ["none", "variant_i"], "n_samples": {"values": [4, 8], "when": {"whitening": "variant_i"}}}
    search = {"algorithm": "random", "num_configurations": 2}
    known = [{"whitening": "variant_i", "n_samples": 8}, {"whitening": "none"}]
    loaded = load_study(content(axes=axes, search={**search, "known": known}))
    assert [t.label for t in loaded.trials] == ["whitening=variant_i n_samples=8 seed=0", "whitening=none seed=0"]
    for point in ({"n_samples": 8}, {"whitening": "none", "n_samples": 8}):
        with pytest.raises(ConfigError, match="n_samples=8: this axis exists with whitening=variant_i only"):
            load_study(content(axes=axes, search={**search, "known": [point]}))


def test_a_known_point_that_breaks_a_rule_is_refused_before_anything_starts() -> None:
    axes = {"n_samples": {"distribution": "integer", "low": 2, "high": 8}}
    linked = {"batch_size": {"quotient": [32, "n_samples"]}}  # no whole number at 3
    assert load_study(content(axes=axes, linked=linked, search={"known": [{"n_samples": 4}]}))
    with pytest.raises(ConfigError, match="batch_size"):
        load_study(content(axes=axes, linked=linked, search={"known": [{"n_samples": 3}]}))


# --- what a search is told -------------------------------------------------------------------------------------


def told(*values: float, study: str = "before", **changes: Any) -> StudySpec:
    """A study whose search is told that learning rates near 1e-3 are best, at `values` of them."""
    record = {
        "study": study,
        "sha256": "0" * 64,
        "data": {},
        "models": {},
        "not_used": {},
        "points": [
            {
                "configuration": f"lr={value:g}",
                "assignment": {"optimizer.learning_rate": value, "reward.alpha": 1.0},
                "values": [math.log10(value / 1e-3) ** 2],
            }
            for value in values
        ],
    }
    return spec(warm_start=[record], **changes)


RATES = tuple(float(f"{value:.6g}") for value in np.geomspace(1e-5, 1e-2, 13))


def test_what_it_is_told_changes_what_tpe_suggests(tmp_path: Path) -> None:
    distances = {}
    for name, study in {"alone": spec(), "told": told(*RATES)}.items():
        found = [
            run_all(OptunaSearch(_seeded(study, seed), tmp_path / f"{name}{seed}", {}), result) for seed in range(6)
        ]
        assert all(len(done) == 6 and done[0].trial_id == "t0000" for done in found)
        distances[name] = np.mean([abs(math.log10(rate / 1e-3)) for done in found for rate, _ in points(done)])
    # A search that knows nothing draws its first ten at random: 0.83 decades from the best on average.
    assert distances["told"] < 0.6 * distances["alone"]


def _seeded(study: StudySpec, seed: int) -> StudySpec:
    return study.model_copy(update={"search": study.search.model_copy(update={"search_seed": seed})})


def test_a_search_does_not_repeat_the_first_draws_of_the_one_that_it_is_told_of(tmp_path: Path) -> None:
    """With few results TPE still draws at random, and both searches have the same seed."""
    first = run_all(OptunaSearch(spec(), tmp_path / "first", {}), result)[:3]
    rates = [trial.run.optimizer.learning_rate for trial in first]
    second = run_all(OptunaSearch(told(*rates), tmp_path / "second", {}), result)
    assert not {trial.run.optimizer.learning_rate for trial in second} & set(rates)


def test_gp_begins_informed_too(tmp_path: Path) -> None:
    study = told(*RATES, search={"sampler": "gp", "num_configurations": 2})
    assert all(abs(math.log10(rate / 1e-3)) < 1 for rate, _ in points(run_all(_search(study, tmp_path), result)))


def _search(study: StudySpec, folder: Path, over: dict[str, TrialResult] | None = None) -> OptunaSearch:
    return OptunaSearch(study, folder / JOURNAL, over or {})


def test_what_it_is_told_is_no_trial_of_the_study(tmp_path: Path) -> None:
    study = told(*RATES, search={"known": KNOWN}, seeds=[0, 1])
    done = run_all(_search(study, tmp_path), result)
    assert len(done) == 12
    assert [trial.trial_id for trial in done] == [f"t{number:04d}" for number in range(12)]
    assert points(done)[0] == (3e-4, 1.0), "known points come first"
    asked = plain_optuna(tmp_path / JOURNAL).get_trials()
    assert len(asked) == 13 + 6
    assert [frozen.user_attrs.get("told") for frozen in asked[:13]] == [f"lr={rate:g}" for rate in RATES]
    assert journal.is_over(study, storage_path(tmp_path))


def test_a_resumed_search_continues_with_the_same_trials(tmp_path: Path) -> None:
    """After every number of trials, from the journal and the study's own record of what it was told."""
    study = told(*RATES, search={"known": KNOWN}, seeds=[0, 1])
    through_yaml = normalize.from_record(yaml.safe_load(yaml.safe_dump(normalize.dump(study))), source="study.yaml")
    assert through_yaml == study
    over: dict[str, TrialResult] = {}
    seen = list[str]()
    for _ in range(12):
        search = _search(through_yaml, tmp_path, over)
        trial = search.next()
        assert trial is not None
        again = _search(through_yaml, tmp_path, over).next()
        assert again is not None
        assert (again.trial_id, again.run) == (trial.trial_id, trial.run), "killed before it started"
        over[trial.trial_id] = result(trial)
        seen.append(trial.trial_id)
    assert seen == [f"t{number:04d}" for number in range(12)]
    assert _search(through_yaml, tmp_path, over).exhausted
    asked = plain_optuna(tmp_path / JOURNAL).get_trials()
    assert len(asked) == 19
    assert all(frozen.state is TrialState.COMPLETE for frozen in asked)


@pytest.mark.parametrize("damage", ["gone", "half of what it was told", "another value"])
def test_a_damaged_journal_is_rebuilt_with_what_it_was_told(tmp_path: Path, damage: str) -> None:
    study = told(*RATES, search={"known": KNOWN})
    search, recorder, handed = _search(study, tmp_path), results.StudyRecorder(tmp_path, study="s"), list[Trial]()
    for _ in range(4):
        trial = search.next()
        assert trial is not None
        row = {"trial_id": trial.trial_id, "status": "pending", "attempt": 0}
        settings = config.flatten(trial.run)
        if len(handed) != 1:  # killed after the journal, before the table of trials
            recorder.trial({**row, "hyperparameters": settings, "configuration": trial.configuration.label})
        handed.append(trial)
    path = tmp_path / JOURNAL
    if damage == "gone":
        path.unlink()
    elif damage == "half of what it was told":
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:8]))
    else:
        path.write_bytes(path.read_bytes().replace(b'"value":4.0', b'"value":5.0', 1))
    rows = results.read_table(tmp_path, "trials")
    assert journal.repair(study, path, rows, {})
    assert len(plain_optuna(path).get_trials()) == 13 + 4
    assert not journal.repair(study, path, rows, {}), "it is whole now"
    again = _search(study, tmp_path)
    left = [again.next() for _ in range(4)]
    assert [(t.trial_id, t.run) for t in left if t] == [(t.trial_id, t.run) for t in handed]
    asked = plain_optuna(path).get_trials()
    assert [frozen.values for frozen in asked[:13]] == [list(point.values) for point in study.told]


# --- from the tables of earlier studies ------------------------------------------------------------------------

EFFECTS = {(1e-4, 1.0): (0.1, 0.3), (1e-3, 1.0): (0.1, -0.2), (5e-2, 1.0): (0.0, 0.0), (1e-3, 0.3): (0.0, 0.0)}


def before(folder: Path, name: str = "before", **changes: Any) -> Path:
    def settings(key: tuple[float, float]) -> dict[str, Any]:
        return {"learning_rate": key[0], "alpha": key[1], **changes}

    statuses = {((1e-4, 1.0), 1): "failed"} if name == "failed" else None
    return write_study(folder / name, effects=EFFECTS, settings=settings, seeds=(0, 1), statuses=statuses)


def warm_started(folder: Path, *names: str, **changes: Any) -> StudySpec:
    return earlier.warm_started(spec(search={"warm_start_from": list(names)}, **changes), folder)


def test_finished_configurations_on_the_axes_are_told_by_their_means_over_seeds(tmp_path: Path) -> None:
    table = load(before(tmp_path))
    (record,) = warm_started(tmp_path, "before").warm_start
    assert [point.assignment for point in record.points] == [
        {"optimizer.learning_rate": rate, "reward.alpha": 1.0} for rate in (1e-4, 1e-3)
    ]
    for point in record.points:
        rows = table.trials[
            (table.trials["learning_rate"] == point.assignment["optimizer.learning_rate"])
            & (table.trials["alpha"] == 1)
        ]
        last = [table.metrics[table.metrics["trial_id"] == name]["cfm_loss"].iloc[-1] for name in rows["trial_id"]]
        assert point.values == (pytest.approx(sum(last) / 2),)
    assert record.not_used == {"learning_rate is not on the axes": 1, "alpha is not on the axes": 1}
    assert earlier.described(record).startswith("2 configurations of before; 2 not used (1: ")


@pytest.mark.parametrize(
    ("there", "here", "reason"),
    [
        ({}, {"run": {"steps": 41}}, "steps differs"),
        ({"batch_size": 4}, {}, "batch_size differs"),
        ({"completion_length": 4}, {}, "completion_length differs"),
        ({"cfm_samples": 8}, {}, "cfm_samples differs"),
        ({"validation_sequences": 16}, {}, "validation_sequences differs"),
        ({"evaluation_seed": 1}, {}, "evaluation_seed differs"),
        ({"n_samples": 8, "depths": [0.5]}, {}, "n_samples and depths differ"),
        ({}, {"exclude": [{"alpha": 1.0}]}, "the study excludes it"),
        ({}, {"objective": {"metric": "judge_cfm_loss"}}, "it has no judge_cfm_loss on the validation split"),
    ],
)
def test_what_was_measured_otherwise_is_refused_with_the_reason(
    tmp_path: Path, there: dict[str, Any], here: dict[str, Any], reason: str
) -> None:
    before(tmp_path, **there)
    with pytest.raises(ConfigError) as refused:
        warm_started(tmp_path, "before", **here)
    assert "search.warm_start_from=before: nothing of it can be used: 4 not used" in str(refused.value)
    assert f"2: {reason}" in str(refused.value)


def test_settings_that_change_neither_training_nor_measurement_may_differ(tmp_path: Path) -> None:
    before(tmp_path, eval_every_steps=5, checkpoint_every_steps=7, heldout_sequences=32, device="cpu")
    assert len(warm_started(tmp_path, "before").told) == 2


def test_configurations_without_all_seeds_are_not_told_and_copies_only_once(tmp_path: Path) -> None:
    before(tmp_path, "failed")
    shutil.copytree(tmp_path / "failed", tmp_path / "copy")
    (record,) = warm_started(tmp_path, "failed").warm_start
    assert [point.assignment["optimizer.learning_rate"] for point in record.points] == [1e-3]
    assert record.not_used["seeds are missing"] == 1
    with pytest.raises(ConfigError, match="1: the search was told before"):
        warm_started(tmp_path, "failed", "copy")


def test_an_axis_of_choices_is_recognised_by_what_its_choices_set(tmp_path: Path) -> None:
    before(tmp_path)
    axes = {
        "speed": {"choices": {"slow": {"learning_rate": 1e-4}, "fast": {"learning_rate": 1e-3, "alpha": 1.0}}},
    }
    study = warm_started(tmp_path, "before", axes=axes)
    assert [point.assignment for point in study.told] == [{"speed": "slow"}, {"speed": "fast"}]


def test_earlier_studies_must_exist_and_have_the_same_files(tmp_path: Path) -> None:
    before(tmp_path)
    with pytest.raises(ResultsError, match="nothing: is neither"):
        warm_started(tmp_path, "nothing")
    study = warm_started(tmp_path, "before")
    earlier.check_files(study, {"data": {"qa": {"fingerprint": "9f" * 32}}, "models": {}})
    with pytest.raises(ConfigError, match=r"search\.warm_start_from=before: its data 'qa' differ"):
        earlier.check_files(study, {"data": {"qa": {"fingerprint": "00" * 32}}, "models": {}})


def test_the_record_is_part_of_no_study_file_and_survives_an_extension(tmp_path: Path) -> None:
    before(tmp_path)
    recorded = warm_started(tmp_path, "before")
    asked = spec(search={"warm_start_from": ["before"]})
    assert extending.differences(recorded, asked) == []
    more = load_study(content(search={"warm_start_from": ["before"], "num_configurations": 9}))
    assert extending.extended(recorded, more).told == recorded.told
    with pytest.raises(ConfigError, match="warm_start: is written by the study itself"):
        load_study(content(warm_start=normalize.dump(recorded)["warm_start"]))
