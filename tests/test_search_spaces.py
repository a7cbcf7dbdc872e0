"""The ready studies: each loads under each of its profiles, gives reasons for its ranges, and fits a laptop."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from transformers import Qwen2Config

from ebft_study import config
from ebft_study.cost import ModelShape
from ebft_study.study.forecast import plan as planning
from ebft_study.study.resolving.study_file import load_study
from ebft_study.study.spec import trials
from ebft_study.training import memory

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
        *("rlvr_baseline", "paper_table1", "scaling"),
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


def qwen(n_layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int, tied: bool) -> ModelShape:
    return ModelShape.from_config(
        Qwen2Config(
            num_hidden_layers=n_layers,
            hidden_size=hidden,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            tie_word_embeddings=tied,
        )
    )


QWEN = {
    "Qwen/Qwen2.5-0.5B": qwen(24, 896, 4864, 14, 2, 151936, True),
    "Qwen/Qwen2.5-1.5B": qwen(28, 1536, 8960, 12, 2, 151936, True),
    "Qwen/Qwen2.5-3B": qwen(36, 2048, 11008, 16, 2, 151936, True),
    "Qwen/Qwen2.5-7B": qwen(28, 3584, 18944, 28, 4, 152064, False),
    "Qwen/Qwen2.5-14B": qwen(48, 5120, 13824, 40, 8, 152064, False),
}
"""The published configurations."""


@pytest.mark.parametrize(
    ("recipe", "workers"),
    [
        ("model_scale", {"1.5B": 1, "3B": 2, "7B": 4}),
        ("scaling", {"0.5B": 1, "1.5B": 1, "3B": 2, "7B": 4, "14B": 8}),
    ],
)
def test_every_size_of_a_study_of_sizes_fits_the_gpus_that_it_asks_for(
    recipe: str, workers: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_shape", lambda name, _revision: QWEN[name])
    spec = load_study(FOLDER / f"{recipe}.yaml", "cluster").spec
    found = dict[str, int]()
    for trial in trials.trials_of(spec, trials.enumerated(spec)):
        found[trial.run.model] = trial.resources.processes
        plan = memory.plan_for(
            trial.run, "cuda", total_bytes=memory.LARGE_GPU_BYTES, world_size=trial.resources.processes
        )
        assert plan.peak_bytes <= plan.budget_bytes < memory.LARGE_GPU_BYTES, trial.label
    assert found == {f"Qwen/Qwen2.5-{size}": n for size, n in workers.items()}
