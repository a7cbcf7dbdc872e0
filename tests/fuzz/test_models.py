"""Folders of models and tokenizers that nobody should publish: the model that was saved, or one line."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebft_study.cost import ModelShape
from ebft_study.errors import EbftError, ModelError
from ebft_study.networks.loading import LoadedModel, digest_of_files, load_model, read_config
from ebft_study.training.inputs import read_inputs
from ebft_study.training.memory import plan_for
from tests.fuzz.outcomes import answer, check, flip, inputs, places, truncate
from tests.tiny_run import tiny_config, write_data, write_model

VALUES: list[Any] = [
    None, True, 0, 1, -1, 3, 64, 2**31, 2**63, 10**30, 1e308, -0.5, "", "x", "auto", "../..", "a" * 300, [], {}, [1],
    [[]], {"a": 1}, "[red]",
]  # fmt: skip
LATER = ["rope_parameters", "architectures", "model_type", "auto_map", "quantization_config", "vocab_size", "dtype"]
HEADER_VALUES: list[Any] = [None, "F64", "I64", [1], [2**40], [-1, 3], [0, 2**60], [0, 10], {}]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    write_data(folder / "data.jsonl")
    write_model(folder / "model")
    return folder


def load(folder: Path, data: Path) -> LoadedModel:
    """A model after all that `plan`, `study` and `train` read before."""
    config = tiny_config(data, model=str(folder))
    ModelShape.from_config(read_config(str(folder)))
    digest_of_files(str(folder))
    plan_for(config, "cpu", total_bytes=8 * 2**30, world_size=1, gpu_fraction=1.0)
    read_inputs(config).close()
    return load_model(str(folder), n_tokens=24, completion_length=3)


# --- damage ------------------------------------------------------------------------------------------------------


def other_settings(folder: Path, draw: Random) -> None:
    path = folder / draw.choice(["config.json", "config.json", "tokenizer_config.json", "generation_config.json"])
    content = json.loads(path.read_text())
    for key in draw.sample([*content, *LATER], k=draw.choice([1, 2])):
        content[key] = draw.choice(VALUES)
        if draw.random() < 0.2:
            del content[key]
    path.write_text(json.dumps(content))


def other_tokenizer(folder: Path, draw: Random) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    where = draw.choice([place for place in places(content) if len(place) < 4])
    node = content
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = draw.choice(VALUES)
    path.write_text(json.dumps(content))


def other_tensors(folder: Path, draw: Random) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    name = draw.choice(sorted(header.keys() - {"__metadata__"}))
    if draw.random() < 0.3:
        path.write_bytes(draw.choice([0, 1, 10**8, 2**62, 2**64 - 1]).to_bytes(8, "little") + content[8:])
        return
    if draw.random() < 0.3:
        del header[name]
    else:
        header[name][draw.choice(["dtype", "shape", "data_offsets"])] = draw.choice(HEADER_VALUES)
    written = json.dumps(header).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written + content[end:])


def other_bytes(folder: Path, draw: Random) -> None:
    path = draw.choice(sorted(folder.iterdir()))
    draw.choice([flip, truncate, lambda path, _: path.write_bytes(draw.choice([b"", b"\0", b"{}", b"[" * 10**5]))])(
        path, draw
    )


def missing(folder: Path, draw: Random) -> None:
    path = draw.choice(sorted(folder.iterdir()))
    path.unlink()
    if draw.random() < 0.3:
        path.mkdir()


HOW = [other_settings, other_settings, other_tokenizer, other_tensors, other_bytes, missing]


@inputs(250)
@given(draw=st.randoms(use_true_random=False))
def test_models(tmp_path_factory: pytest.TempPathFactory, saved: Path, draw: Random) -> None:
    """Whatever loads has the weights of its files."""
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(saved / "model", folder)
    draw.choice(HOW)(folder, draw)
    loaded, _ = answer("models", lambda: load(folder, saved))
    if loaded is not None:
        stored, weights = safetensors.torch.load_file(folder / "model.safetensors"), loaded.model.state_dict()
        absent = [name for name in weights if name not in stored and name != "lm_head.weight"]
        check(not absent, f"{absent} are in no file")
        wrong = [name for name in weights if name in stored and not same(weights[name], stored[name])]
        check(not wrong, f"{wrong} differ from those in the file")
    shutil.rmtree(folder)


def same(weights: torch.Tensor, stored: torch.Tensor) -> bool:
    return torch.equal(weights.nan_to_num(), stored.to(weights.dtype).nan_to_num())


# --- what once went wrong ----------------------------------------------------------------------------------------


class Writes:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_weights_are_refused_and_run_nothing(tmp_path: Path, zipped: bool) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    weights = {"lm_head.weight": Writes(tmp_path / "ran")}
    torch.save(weights, folder / "pytorch_model.bin")
    if not zipped:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(weights))
    with pytest.raises(ModelError, match="pickled file that brings code of its own, which is not run") as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_weights_that_the_files_lack_are_not_drawn_at_random(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"its files lack the weights model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(folder))
    assert load_model(str(folder), random_weights=True).n_parameters > 0


def test_a_feature_network_needs_no_head(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(ModelError, match=r"its files lack the weights lm_head\.weight"):
        load_model(str(folder))
    assert load_model(str(folder), needs_head=False).fingerprint


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    settings = tmp_path / "model" / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "vocab_size": 50}))
    with pytest.raises(ModelError, match="has a vocabulary of 50 tokens, and its tokenizer gives the data number"):
        read_inputs(config)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_whatever_libraries_raise_is_one_line(tmp_path: Path, name: str) -> None:
    """Errors of their own and bare exceptions, which have no common base."""
    folder = write_model(tmp_path / "model")
    (folder / name).write_bytes(b"[" * 10**5)
    with pytest.raises(EbftError) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
