"""The judge: one feature map by which trials of any model, feature network and completion length compare."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ebft_study.config import RunConfig
from ebft_study.errors import ConfigError, DataError, ModelError
from ebft_study.evaluation import base
from ebft_study.features import service
from ebft_study.features.keys import FeatureSpec
from ebft_study.features.local import LocalFeatures, load_networks
from ebft_study.networks.loading import load_generator, load_model
from ebft_study.study.forecast import throughput
from ebft_study.training.memory import judge_parameters
from ebft_study.training.recorded import Services
from ebft_study.training.setup import build_parts
from ebft_study.training.update import Run
from ebft_study.training.validation import evaluate_shared, shared_model
from tests.tiny_run import DETERMINISTIC, run_tiny, tiny_config, write_model

# Packed documents: contexts without room for a longer completion are missing in the middle of a sequence.
PACKED: dict[str, Any] = {"packing": True, "sequence_length": 60, "judge_completion_length": 4, "depths": [0.5, 1.0]}
HIDDEN_SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its data, `judge` and `other`: networks of other weights."""
    folder = tmp_path_factory.mktemp("judge")
    tiny_config(folder)
    write_model(folder / "judge", seed=5)
    write_model(folder / "other", seed=9)
    return folder


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "get", lambda entry: None)
    monkeypatch.setattr(base, "put", lambda entry, measured: None)


def configured(folder: Path, **changes: Any) -> RunConfig:
    networks = {key: str(folder / changes[key]) for key in ("judge", "feature_network", "model") if key in changes}
    return tiny_config(folder, **changes | networks)


def at_start(folder: Path, **changes: Any) -> tuple[float, float]:
    """The judge's values of the base model, on the validation and on the held-out split."""
    run = Run(configured(folder, **{"judge": "judge", **PACKED, **changes}))
    row, _, heldout = evaluate_shared(run, shared_model(run))
    return row["judge_cfm_loss"], heldout["judge_cfm_loss", None].value


@pytest.fixture(scope="module")
def usual(folder: Path) -> tuple[float, float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "get", lambda entry: None)
        patch.setattr(base, "put", lambda entry, measured: None)
        return at_start(folder)


@pytest.mark.parametrize("copied", [False, True])
def test_a_judge_with_the_feature_map_of_training_measures_the_ordinary_cfm(folder: Path, copied: bool) -> None:
    name = "copy" if copied else "model"
    if copied:
        shutil.copytree(folder / "model", folder / name)
    changes = {"depths": [0.5, 1.0], "judge_depths": [0.5, 1.0], "judge_completion_length": 3, "learning_rate": 1e-2}
    _, recorder = run_tiny(configured(folder, judge=name, steps=2, **changes))
    for step in (0, 2):
        row = recorder.rows[step]
        assert row["judge_cfm_loss"] == row["cfm_loss"]
        rows = {(r["metric"], r["position"]): (r["value"], r["standard_error"]) for r in recorder.evaluated[step]}
        assert rows["judge_cfm_loss", None] == rows["cfm_loss", 3]
    assert recorder.rows[0]["cfm_loss"] != recorder.rows[2]["cfm_loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {"feature_network": "other", "depths": [0.5], "normalize": "joint"},
        {"random_weights": True, "pooling": "mean", "completion_length": 2},
        {"completion_length": 9, "profile_lengths": [1]},
        {"method": "sft", "profile_lengths": [1, 4, 7]},
        {"lora_rank": 2, "n_samples": 2, "alpha": 0.5},
    ],
    ids=str,
)
def test_a_model_has_one_value_whatever_it_is_trained_with(
    folder: Path, usual: tuple[float, float], changes: dict[str, Any]
) -> None:
    assert at_start(folder, **changes) == pytest.approx(usual, rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "other"},
        {"judge": "other"},
        {"judge_depths": [1.0]},
        {"judge_pooling": "mean"},
        {"judge_completion_length": 2},
        {"evaluation_temperature": 1.4},
    ],
    ids=str,
)
def test_what_the_judge_is_and_is_given_changes_its_value(
    folder: Path, usual: tuple[float, float], changes: dict[str, Any]
) -> None:
    assert all(abs(a - b) > 1e-3 for a, b in zip(usual, at_start(folder, **changes), strict=True))


def test_a_judge_changes_nothing_else(folder: Path) -> None:
    _, without = run_tiny(configured(folder, steps=2))
    _, judged = run_tiny(configured(folder, steps=2, judge="judge", judge_completion_length=2))
    for step, row in without.rows.items():
        assert {k: v for k, v in row.items() if k in DETERMINISTIC}.items() <= judged.rows[step].items()
        assert ("judge_cfm_loss" in judged.rows[step]) == ("cfm_loss" in row)
    # Of four evaluations of equal size, the last one comes after the row.
    whole = throughput.evaluation_flops(configured(folder, steps=2, judge="judge", judge_completion_length=2))
    assert judged.rows[2]["evaluation_flops"] == pytest.approx(3 / 4 * whole)
    for table in ("evaluated", "scored"):
        for step, rows in getattr(without, table).items():
            assert rows == [r for r in getattr(judged, table)[step] if r["metric"] != "judge_cfm_loss"]


# --- networks --------------------------------------------------------------------------------------------------


def networks(config: RunConfig) -> tuple[LocalFeatures, LocalFeatures | None]:
    return load_networks(config, load_generator(config))


@pytest.mark.parametrize(("depths", "judge_depths"), [([0.5], [1.0]), ([1.0], [0.5]), ([0.5], [0.5])])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_weights_of_one_network_are_loaded_once(
    folder: Path, depths: list[float], judge_depths: list[float], lora_rank: int
) -> None:
    settings = {"depths": depths, "judge_depths": judge_depths, "lora_rank": lora_rank}
    config = configured(folder, judge="model", judge_completion_length=3, **settings)
    features, judge = networks(config)
    assert judge is not None
    assert features.network.get_input_embeddings().weight is judge.network.get_input_embeddings().weight
    assert (features.indices, judge.indices) == ([1 + (depths == [1.0])], [1 + (judge_depths == [1.0])])
    if not lora_rank:
        own = sum(p.numel() for p in features.network.parameters())
        both = {id(p): p.numel() for network in (features, judge) for p in network.network.parameters()}
        assert judge_parameters(config) == pytest.approx(sum(both.values()) - own, abs=HIDDEN_SIZE)  # the final norm
    else:
        assert judge_parameters(config) == 0


@pytest.mark.parametrize("changes", [{}, {"random_weights": True}, {"model_revision": "main"}])
def test_another_network_is_the_judges_own(folder: Path, changes: dict[str, Any]) -> None:
    name = "model" if changes else "judge"
    config = configured(folder, judge=name, judge_completion_length=3, **changes)
    features, own = networks(config)
    assert own is not None
    assert own.fingerprint == load_model(str(folder / name)).fingerprint
    n_parameters = sum(p.numel() for p in own.network.parameters())
    assert judge_parameters(config) == pytest.approx(n_parameters, abs=HIDDEN_SIZE)
    assert not {p.data_ptr() for p in own.network.parameters()} & {p.data_ptr() for p in features.network.parameters()}


def test_a_service_is_the_judge_where_it_has_its_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        def __init__(self, options: Any, spec: FeatureSpec, *, timeout_seconds: float) -> None:
            self.name, self.spec = options.name, spec

    monkeypatch.setattr(service, "ServiceFeatures", Client)
    base = load_model(str(folder / "model"))
    settings: dict[str, Any] = {
        "features.backend": "service",
        "judge_completion_length": 3,
        "judge_pooling": "mean",
        "judge_depths": [1.0],
    }
    for name, is_served in (("model", True), ("judge", False)):
        config = configured(folder, judge=name, **settings)
        features, own = Services("t0-1").networks(config, base)
        assert (features.name, features.spec.pooling) == (config.model, "last_token")  # type: ignore[attr-defined]
        assert isinstance(own, Client if is_served else LocalFeatures)
        assert (own.spec.pooling if isinstance(own, Client) else own.pooling) == "mean"
        assert (judge_parameters(config) == 0) == is_served
    without = configured(folder, **{"features.backend": "service"})
    assert Services("t0-1").networks(without, base)[1] is None


# --- refusals --------------------------------------------------------------------------------------------------


def test_a_judge_of_another_vocabulary_is_refused(folder: Path) -> None:
    write_model(folder / "foreign", words=["quite", "another", "set", "of", "words"] * 3)
    with pytest.raises(ModelError, match=r"evaluation\.judge=.*vocabulary.*Use a network with the same tokenizer"):
        build_parts(configured(folder, judge="foreign", judge_completion_length=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": "base"}, "evaluation.judge='base': the judge is one network for all trials"),
        ({"judge": "tiny-1m", "judge_completion_length": 21}, "Use judge_completion_length <= 20"),
        ({"judge": "tiny-1m", "judge_depths": [0.5, 1.5]}, "every depth must lie in"),
        ({"judge": "tiny-1m", "judge_depths": []}, "evaluation.judge_depths"),
    ],
)
def test_settings_without_sense_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_config(folder, **changes)
    assert message in str(caught.value)


def test_texts_without_room_for_the_judges_completions_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text("".join(f'{{"text": "def value {n}"}}\n' for n in range(60)))
    settings: dict[str, Any] = {
        "dataset": str(tmp_path / "short.jsonl"),
        "completion_length": 1,
        "profile_lengths": [1],
    }
    with pytest.raises(DataError, match="Use a shorter judge_completion_length"):
        build_parts(configured(folder, judge="judge", judge_completion_length=18, **settings))
