"""The command `export`: what transformers and peft load is the model that was trained and evaluated."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ebft_study import api, results
from ebft_study.analysis.summary import summarize
from ebft_study.errors import ConfigError, EbftError, ResultsError
from ebft_study.networks.loading import load_generator
from ebft_study.study.driver.export import best_trial
from ebft_study.training import state
from tests.synthetic_study import write_study
from tests.tiny_run import tiny_config

KINDS: dict[str, dict[str, Any]] = {
    "full": {"ema_decay": 0.5},
    "lora": {"lora_rank": 2, "lora_alpha": 8.0, "learning_rate": 0.1},
}
TOKENS = torch.arange(2, 42).reshape(2, 20)


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    run = tiny_config(folder, **{"learning_rate": 0.05, **KINDS[request.param]})
    Path(run.model, "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EBFT_STUDY_CACHE", str(folder / "cache"))
        api.train(run, output=folder / "run")
    return run, folder / "run"


def trained_logits(run: Any, study: Path) -> Tensor:
    """Logits of the trained model as evaluations see it."""
    model = load_generator(run).model
    checkpoint = max(study.glob("train/*/checkpoint_*"))
    state.load_weights(model, checkpoint)
    return logits(model)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    model.eval()
    output: Tensor = model(input_ids=TOKENS).logits
    return output


def test_the_exported_model_is_the_trained_one(trained: tuple[Any, Path], tmp_path: Path) -> None:
    run, study = trained
    expected = trained_logits(run, study)
    base = logits(AutoModelForCausalLM.from_pretrained(run.model))
    is_adapted = run.lora.lora_rank > 0
    ways = {"adapter": peft.AutoPeftModelForCausalLM, "merged": AutoModelForCausalLM} if is_adapted else {
        "whole": AutoModelForCausalLM
    }  # fmt: skip
    for way, loader in ways.items():
        exported = api.export(study, "t0000", to=tmp_path / way, merge=way == "merged")
        loaded = loader.from_pretrained(tmp_path / way)
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(expected, base, rtol=1e-3, atol=1e-2)
        assert exported.step == run.total_steps
        sentence = "the name of the value"
        tokens = AutoTokenizer.from_pretrained(tmp_path / way)(sentence)["input_ids"]
        assert tokens == AutoTokenizer.from_pretrained(run.model)(sentence)["input_ids"]
        assert {path.suffix for path in (tmp_path / way).iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}
        model = loaded.generate(input_ids=TOKENS, max_new_tokens=3, do_sample=False)
        assert model.shape[1] > TOKENS.shape[1]


def test_the_card_says_what_the_model_is(trained: tuple[Any, Path], tmp_path: Path) -> None:
    run, study = trained
    api.export(study, "t0000", to=tmp_path / "model")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.base_model == run.model
    assert card.data.license == "mit"
    assert card.data.library_name == ("peft" if run.lora.lora_rank else "transformers")
    evaluations = results.load(study).evaluations
    last = evaluations[(evaluations["step"] == run.total_steps) & (evaluations["benchmark"] == "heldout")]
    value = last.loc[last["metric"] == "ce_loss", "value"].item()
    assert "| heldout | ce_loss | " in card.text
    assert f"{value:.3f}" in card.text
    assert f"| batch_size | {run.training.batch_size} |" in card.text
    assert "kl_coefficient |" not in card.text or run.loss.kl_coefficient is not None


def test_the_best_trial_is_the_best_seed_of_the_best_configuration(tmp_path: Path) -> None:
    effects = {(1.0, 0.0): (0.0, -0.2), (0.5, 0.0): (0.0, -0.1), (0.0, 0.0): (0.0, 0.3)}
    study = write_study(tmp_path / "known", effects=effects, seeds=(0, 1, 2), noise=0.01)
    summary = summarize(results.load(study))
    trials = summary.results.trials.set_index("trial_id")
    best = best_trial(summary)
    assert trials.loc[best, "alpha"] == 1.0
    configuration = next(c for c in summary.configurations if c.settings["alpha"] == 1.0)
    values = configuration.validation["cfm_loss"]
    assert values[int(trials.loc[best, "seed"])] == min(values.values())


def test_refusals(trained: tuple[Any, Path], tmp_path: Path) -> None:
    run, study = trained
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="is there already"):
        api.export(study, "t0000", to=tmp_path / "full")
    with pytest.raises(ResultsError, match=r"has no trial 't9'\. Its trials: t0000"):
        api.export(study, "t9", to=tmp_path / "new")
    with pytest.raises(ResultsError, match="no checkpoint '77'"):
        api.export(study, "t0000", to=tmp_path / "new", checkpoint="77")
    if not run.lora.lora_rank:
        with pytest.raises(ConfigError, match="has no adapters"):
            api.export(study, "t0000", to=tmp_path / "new", merge=True)
    with pytest.raises(EbftError, match="cannot be written"):
        api.export(study, "t0000", to=tmp_path / "full" / "file" / "new")
    assert not (tmp_path / "new").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_base_model_that_has_changed_is_refused(trained: tuple[Any, Path], tmp_path: Path) -> None:
    """Adapters would be added to other weights, and a benchmark would see another tokenizer."""
    run, study = trained
    config = Path(run.model, "config.json")
    kept = config.read_text()
    config.write_text(kept + "\n")
    try:
        with pytest.raises(ResultsError, match="the base model has changed since the study"):
            api.export(study, "t0000", to=tmp_path / "new")
        with pytest.raises(ResultsError, match="the base model has changed since the study"):
            api.evaluate(study, ["mini"], ["t0000"])
    finally:
        config.write_text(kept)


def test_a_push_puts_the_folder_into_a_private_repository(
    trained: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, study = trained
    calls: list[Any] = []

    def create(self: HfApi, name: str, **settings: Any) -> str:
        calls.append((name, settings["private"]))
        return f"https://hub/{name}"

    def upload(self: HfApi, *, repo_id: str, folder_path: Path) -> None:
        calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    exported = api.export(study, "t0000", to=tmp_path / "model", push="me/model")
    assert exported.url == "https://hub/me/model"
    assert calls[0] == ("me/model", True)
    assert calls[1] == ("me/model", sorted(path.name for path in (tmp_path / "model").iterdir()))


def test_a_hub_that_does_not_answer_leaves_the_folder(
    trained: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, study = trained

    def offline(self: HfApi, *arguments: Any, **settings: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(HfApi, "create_repo", offline)
    with pytest.raises(ConfigError, match=r"the hub took nothing .no route to host.. The model is in .*hf auth login"):
        api.export(study, "t0000", to=tmp_path / "model", push="me/model")
    assert (tmp_path / "model" / "config.json").exists() or (tmp_path / "model" / "adapter_config.json").exists()
    shutil.rmtree(tmp_path / "model")
