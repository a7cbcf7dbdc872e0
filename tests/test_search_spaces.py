"""The ready studies: each loads under each of its profiles, gives reasons for its ranges, and fits a laptop."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ebft_study import config
from ebft_study.study.forecast import plan as planning
from ebft_study.study.resolving.study_file import load_study
from ebft_study.study.spec import trials

FOLDER = Path(__file__).parent.parent / "search_spaces"
RECIPES = sorted(FOLDER.glob("*.yaml"))
LAPTOP_GIB = 4.0

each = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


def head(recipe: Path) -> list[str]:
    lines = recipe.read_text().splitlines()
    return lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))]


def test_the_ready_studies_are_these() -> None:
    assert {path.stem for path in RECIPES} >= {
        *("quickstart", "alpha_gamma", "samples_per_prompt", "feature_depths", "feature_network"),
        *("completion_length", "warm_start", "model_scale", "sft_baseline", "learning_rate_search"),
        *("rlvr_baseline", "paper_table1"),
    }


@each
def test_every_trial_under_every_profile_has_settings_that_can_run(recipe: Path) -> None:
    profiles = yaml.safe_load(recipe.read_text())["profiles"]
    assert set(profiles) >= {"cpu", "cluster"}
    for profile in profiles:
        spec = load_study(recipe, profile).spec
        assert spec.study == recipe.stem
        made = trials.trials_of(spec, trials.enumerated(spec))
        assert len({trial.label for trial in made}) == len(made) > 0
        if profile == "cpu":
            assert not spec.resources.gpus_per_worker
        else:
            assert all(trial.run.model.startswith(("Qwen/", "meta-llama/")) for trial in made)


@each
def test_profiles_do_not_change_what_is_studied(recipe: Path) -> None:
    specs = [load_study(recipe, profile).spec for profile in yaml.safe_load(recipe.read_text())["profiles"]]
    first = [configuration.label for configuration in trials.enumerated(specs[0])]
    for spec in specs[1:]:
        assert [configuration.label for configuration in trials.enumerated(spec)] == first
        assert (spec.seeds, spec.search, spec.objective) == (specs[0].seeds, specs[0].search, specs[0].objective)


@each
def test_the_head_asks_a_question_and_gives_a_reason_for_every_axis(recipe: Path) -> None:
    assert re.fullmatch(r"# .+\?( \((Figures?|Tables?) [\d and]+\))?", head(recipe)[0])
    for axis in load_study(recipe, "cpu").spec.axes:
        name = config.short_name(axis)
        assert any(re.match(rf"#   {name} .{{30,}}", line) for line in head(recipe)), name


@each
def test_a_laptop_holds_the_cpu_profile_without_any_model_being_trained(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EBFT_STUDY_CACHE", str(tmp_path / "cache"))
    study = load_study(recipe, "cpu")
    planned = planning.plan(study, storage=tmp_path, memory_gib=LAPTOP_GIB)
    assert planned.fits
    assert planned.n_trials == trials.number_of_trials(study.spec)
    assert not list(tmp_path.rglob("pretraining.json"))
