"""Loading models and feature networks, and refusing what does not fit."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from ebft_study.algorithm.anchors import find_anchors
from ebft_study.algorithm.sampling import uniforms
from ebft_study.errors import ModelError
from ebft_study.features.local import load_networks
from ebft_study.networks import loading, verification
from ebft_study.networks.blocks import completion_log_probs, run_prefix
from ebft_study.networks.loading import fingerprint, frozen_copy, load_model
from ebft_study.rollouts.strided import StridedRollouts
from ebft_study.training.setup import build_parts
from tests.small_models import small_batch
from tests.tiny_run import tiny_config, write_model


def test_a_local_folder_loads_with_its_tokenizer(tmp_path: Path) -> None:
    loaded = load_model(str(write_model(tmp_path / "model")))
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("return value")) == "return value"
    assert loaded.n_parameters == sum(p.numel() for p in loaded.model.parameters())


def test_fingerprints_tell_weights_apart(tmp_path: Path) -> None:
    first, same, other = (
        load_model(str(write_model(tmp_path / name, seed=seed))).fingerprint
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == same != other


def test_a_model_with_dropout_trains_without_it(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = PhiConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.25, attention_dropout=0.2, resid_pdrop=0.2, embd_pdrop=0.2,
    )  # fmt: skip
    PhiForCausalLM(config).save_pretrained(folder)
    model = load_model(str(folder)).model.train()
    batch = small_batch([[0] * 20])
    anchors = find_anchors(batch.document_ids, completion_length=4, stride=4, first_context_length=3)
    noise = uniforms((0,), [0], n_anchors=anchors.positions.shape[1], n_samples=3, length=4)
    rollouts = StridedRollouts().sample(model, batch, anchors, noise=noise, temperature=1.0)
    prefix = run_prefix(model, batch.tokens, batch.document_ids)
    scored = completion_log_probs(model, prefix, anchors, rollouts.completions, temperature=1.0)
    torch.testing.assert_close(rollouts.log_probs, scored, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["./nowhere", "nobody/no-such-model"])
def test_a_missing_model_is_one_clear_line(name: str) -> None:
    with pytest.raises(ModelError, match="model ") as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no usable model"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("random_weights", [False, True])
def test_code_that_comes_with_a_model_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_weights: bool
) -> None:
    """Nor asked for on the terminal."""
    folder, ran = write_model(tmp_path / "model"), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": code}))
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\n")
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked"))
    for load in (load_model, loading.read_config):
        with pytest.raises(ModelError, match=r"code of its own \(auto_map\), which is not run") as caught:
            load(str(folder), **({"random_weights": random_weights} if load is load_model else {}))
        assert "\n" not in str(caught.value)
    assert not ran.exists()


def test_a_tokenizer_with_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, ran = write_model(tmp_path / "model"), tmp_path / "ran"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    code = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **code}))
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Mine: pass\n")
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked"))
    with contextlib.suppress(ModelError):  # transformers may have a class of its own that reads the files
        loading.load_tokenizer(str(folder))
    assert not ran.exists()


def test_a_feature_network_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", words=["quite", "another", "set", "of", "words"] * 3)
    config = tiny_config(tmp_path, feature_network=str(other))
    with pytest.raises(ModelError, match="vocabulary"):
        load_networks(config, load_model(config.model))


def test_random_weights_keep_the_architecture_and_are_the_same_every_time(tmp_path: Path) -> None:
    write_model(tmp_path / "other", seed=5)
    config = tiny_config(tmp_path, random_weights=True, model=str(tmp_path / "other"))
    base = load_model(config.model)
    first, second = (load_networks(config, base)[0].network.state_dict() for _ in range(2))
    weight = base.model.state_dict()["model.embed_tokens.weight"]
    assert torch.equal(first["model.embed_tokens.weight"], second["model.embed_tokens.weight"])
    assert not torch.equal(first["model.embed_tokens.weight"], weight)


def test_the_base_feature_network_is_a_copy(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    base = load_model(config.model)
    network = load_networks(config, base)[0].network
    with torch.no_grad():
        base.model.get_input_embeddings().weight.zero_()
    assert float(network.get_input_embeddings().weight.abs().sum()) > 0


def test_the_feature_network_is_frozen(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    network = load_networks(config, load_model(config.model))[0].network
    assert not any(p.requires_grad for p in network.parameters())
    assert not network.training


# --- types, devices and workers --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_files_in_the_type_that_is_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    """And their fingerprint is the hash over names, shapes, types and bytes that caches were keyed by before."""
    folder = write_model(tmp_path / "model")
    loaded = load_model(str(folder), dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = {
        k: v for k, v in plain.config.to_dict().items() if k not in ("transformers_version", "dtype", "use_cache")
    }
    digest = hashlib.sha256(json.dumps({k: v for k, v in config.items() if k[0] != "_"}, sort_keys=True).encode())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor.to(dtype))
        digest.update(
            f"{name}{tuple(tensor.shape)}{dtype}".encode() + bytes(tensor.to(dtype).view(torch.uint8).numpy())
        )
    assert loaded.fingerprint == digest.hexdigest()[:16]
    assert loaded.model.get_input_embeddings().weight is loaded.model.get_output_embeddings().weight
    for (name, own), (_, theirs) in zip(loaded.model.named_buffers(), plain.named_buffers(), strict=True):
        assert own.dtype == theirs.dtype == torch.float32, name
        assert torch.equal(own, theirs)


def test_weights_go_to_the_device_as_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their type: the model that transformers returns has none elsewhere."""
    folder, read = write_model(tmp_path / "model"), []
    from_pretrained = AutoModelForCausalLM.from_pretrained

    def reading(*arguments: Any, **options: Any) -> Any:
        model, info = from_pretrained(*arguments, **options)
        read.extend((p.device.type, p.dtype) for p in model.parameters())
        return model, info

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", reading)
    load_model(str(folder), device="meta", dtype=torch.bfloat16, is_first=False)
    assert set(read) == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_are_drawn_in_float32_whatever_their_type(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_model(tmp_path / "model")
    torch.manual_seed(0)
    expected = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(folder).config).float()
    drawn = load_model(str(folder), random_weights=True, dtype=dtype).model
    for name, parameter in expected.named_parameters():
        assert torch.equal(drawn.get_parameter(name), parameter.to(dtype))


class LargestOf(TorchDispatchMode):
    """Entries of the largest tensor of each type that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor) and "detach" not in str(function):
            self.sizes[result.dtype] = max(self.sizes.get(result.dtype, 0), result.numel())
        return result


def test_a_frozen_copy_in_another_type_needs_no_copy_in_the_first(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, precision="bfloat16")
    base = load_model(config.model)
    with LargestOf() as made:
        copied = frozen_copy(config, base)
    assert made.sizes[torch.bfloat16] == max(p.numel() for p in base.model.parameters())
    assert made.sizes.get(torch.float32, 0) <= 8  # rotary frequencies
    assert fingerprint(copied) == load_model(config.model, dtype=torch.bfloat16).fingerprint
    assert fingerprint(base.model) == base.fingerprint
    assert copied.get_input_embeddings().weight is copied.get_output_embeddings().weight
    assert not copied.training
    assert not any(p.requires_grad for p in copied.parameters())
    assert all(p.requires_grad for p in base.model.parameters())
    own = {p.data_ptr() for p in frozen_copy(tiny_config(tmp_path), base).parameters()}
    assert not own & {p.data_ptr() for p in base.model.parameters()}


def test_of_several_workers_the_first_verifies_and_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generator, feature network and judge."""
    judge = str(write_model(tmp_path / "judge", seed=3))
    config = tiny_config(tmp_path, random_weights=True, judge=judge, judge_completion_length=3)
    verified: list[str] = []
    monkeypatch.setattr(loading, "verify", lambda model, name, **options: verified.append(name))
    second = build_parts(config, rank=1, world_size=2)
    assert verified == []
    assert second.base.fingerprint == second.features.fingerprint == ""
    first = build_parts(config, rank=0, world_size=2)
    assert sorted(verified) == sorted([config.model, config.model, judge])
    assert first.base.fingerprint == fingerprint(second.base.model)
    judges = [parts.evaluator.judge for parts in (first, second)]
    assert [bool(each and each.fingerprint) for each in judges] == [True, False]


def test_a_model_in_16_bits_is_compared_in_float32_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[set[torch.dtype]] = []
    compare = verification._compare

    def comparing(model: torch.nn.Module, *arguments: Any) -> None:
        compared.append({p.dtype for p in model.parameters()})
        compare(model, *arguments)

    monkeypatch.setattr(verification, "_compare", comparing)
    loaded = load_model(str(write_model(tmp_path / "model")), dtype=torch.bfloat16)
    assert compared == [{torch.float32}, {torch.bfloat16}]
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_a_hub_model_is_identified_by_its_commit_and_a_folder_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster's head may have a part of a hub model's files only, and another part in the next session."""
    snapshot = write_model(tmp_path / "hub" / "snapshots" / ("c" * 40))
    monkeypatch.setattr(loading, "cached_file", lambda *_, **__: str(snapshot / "config.json"))
    before = loading.digest_of_files("some/model")
    (snapshot / "model.safetensors").unlink()
    assert loading.digest_of_files("some/model") == before == "c" * 40
    monkeypatch.undo()
    folder = write_model(tmp_path / "model")
    before = loading.digest_of_files(str(folder))
    (folder / "notes.md").write_text("not read by anyone")
    assert loading.digest_of_files(str(folder)) == before
    (folder / "model.safetensors").write_bytes(b"x")
    assert loading.digest_of_files(str(folder)) != before
