"""Weights on their way to an engine, and what the engine does with them; needs no vLLM."""

from __future__ import annotations

import errno
import itertools
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ebft_study.config import LoraConfig
from ebft_study.errors import ConfigError
from ebft_study.networks.lora import add_adapters
from ebft_study.rollouts.vllm import engine as engine_module
from ebft_study.rollouts.vllm.engine import Engine, EngineOptions, SampleRequest
from ebft_study.rollouts.vllm.weights import Layout, SharedWeights, policy_weights, views
from tests.small_models import ARCHITECTURES, small_model


def mixed_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "odd": torch.randn(3, 5, generator=generator),
        "small": torch.randn(7, generator=generator).bfloat16(),
        "last": torch.randn(2, 2, 2, generator=generator),
    }


def test_what_is_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    weights = mixed_weights()
    shared = SharedWeights(weights, folder=tmp_path)
    mapped = views(shared.path, shared.layout)
    shared.unlink()
    for scale in (1.0, 2.0):
        now = {name: tensor * scale for name, tensor in weights.items()}
        shared.write(now)
        assert list(mapped) == list(weights)
        for name, tensor in now.items():
            assert mapped[name].dtype == tensor.dtype
            assert torch.equal(mapped[name], tensor)
    assert not list(tmp_path.iterdir())


def test_weights_travel_in_the_type_of_the_engine(tmp_path: Path) -> None:
    weights = mixed_weights()
    shared = SharedWeights(weights, dtype=torch.bfloat16, folder=tmp_path)
    shared.write(weights)
    mapped = views(shared.path, shared.layout)
    assert all(torch.equal(mapped[name], tensor.bfloat16()) for name, tensor in weights.items())
    assert shared.layout.n_bytes < Layout.from_weights(weights).n_bytes


def test_tensors_never_overlap() -> None:
    extents = [(offset, offset + size) for *_, offset, size in Layout.from_weights(mixed_weights()).tensors()]
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(extents))


def test_no_room_in_shared_memory_is_an_error_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"no room for .* MiB of weights \(No space left on device\).*--shm-size"):
        SharedWeights(mixed_weights(), folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_and_values_are_those_of_the_checkpoint(architecture: str) -> None:
    model = small_model(architecture)
    weights, stored = policy_weights(model), model.state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(weights) == set(stored) - tied
    assert all(torch.equal(tensor, stored[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_adapters_compute_what_adapters_compute(architecture: str) -> None:
    plain, adapted = small_model(architecture), small_model(architecture)
    add_adapters(adapted, LoraConfig(lora_rank=2), seed=0, dtype=torch.float32, name="small")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    tokens = torch.arange(10)[None]
    before = plain(tokens).logits
    missing, unexpected = plain.load_state_dict(policy_weights(adapted), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    torch.testing.assert_close(plain(tokens).logits, adapted(tokens).logits, atol=1e-4, rtol=1e-4)
    assert (plain(tokens).logits - before).abs().max() > 0.1


class RecordedLlm:
    """Stands in for `vllm.LLM` and writes down what is asked of it."""

    def __init__(self, cache_is_emptied: bool = True) -> None:
        self.calls: list[str] = []
        self.cache_is_emptied = cache_is_emptied

    def collective_rpc(self, method: str, args: Any) -> None:
        self.calls.append(method)

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {tags[0]}")

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def reset_prefix_cache(self) -> bool:
        self.calls.append("empty cache")
        return self.cache_is_emptied


def started(monkeypatch: pytest.MonkeyPatch, llm: RecordedLlm, *, colocated: bool) -> Engine:
    def generate(self: Engine, request: SampleRequest) -> list[Any]:
        llm.calls.append("generate")
        shape = (request.n_samples, request.completion_length)
        output = [
            SimpleNamespace(token_ids=row, logprobs=SimpleNamespace(logprobs=-row)) for row in np.ones(shape, dtype=int)
        ]
        return [SimpleNamespace(outputs=output) for _ in request.prompts]

    monkeypatch.setattr(engine_module, "_build", lambda options: llm)
    monkeypatch.setattr(Engine, "_generate", generate)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    engine = Engine()
    engine.start(OPTIONS if not colocated else EngineOptions(**{**vars(OPTIONS), "colocated_with": "0"}))
    return engine


OPTIONS = EngineOptions("m", None, "float32", "cpu", 16, 1, 0.3, 2**20)


def request(policy: str = "p", version: int = 0) -> SampleRequest:
    return SampleRequest(policy, version, [[1, 2]], [0], n_samples=2, completion_length=3, temperature=1.0)


def test_weights_are_read_when_version_or_policy_changes_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = RecordedLlm()
    engine = started(monkeypatch, llm, colocated=False)
    read = ["read_weights", "empty cache", "generate"]
    for asked, expected in [(("p", 0), read), (("p", 0), ["generate"]), (("p", 1), read), (("q", 1), read)]:
        llm.calls.clear()
        assert engine.sample(request(*asked)).version == asked[1]
        assert llm.calls == expected


def test_an_engine_on_the_trainers_gpu_sleeps_while_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = RecordedLlm()
    engine = started(monkeypatch, llm, colocated=True)
    assert llm.calls == ["generate", "sleep 2"]
    once = ["wake weights", "read_weights", "wake kv_cache", "empty cache", "generate", "sleep 2"]
    for _ in range(2):
        llm.calls.clear()
        engine.sample(request())
        assert llm.calls == once


def test_a_cache_that_is_not_emptied_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = started(monkeypatch, RecordedLlm(cache_is_emptied=False), colocated=False)
    with pytest.raises(Exception, match="prefix cache"):
        engine.sample(request())


def test_a_missing_vllm_is_an_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"ebft-study\[vllm\].*backend=strided"):
        Engine().start(OPTIONS)
