"""Weights on their way to an engine, and what the engine does with them; needs no vLLM."""

from __future__ import annotations

import errno
import itertools
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ebft_study.config import LoraConfig
from ebft_study.errors import ConfigError
from ebft_study.networks.lora import adapted_layers, add_adapters
from ebft_study.rollouts.vllm import engine as engine_module
from ebft_study.rollouts.vllm import weights as weights_module
from ebft_study.rollouts.vllm.engine import Engine, EngineOptions, SampleRequest
from ebft_study.rollouts.vllm.weights import Layout, Segment, SharedWeights, Weight, buckets, policy_weights
from tests.small_models import ARCHITECTURES, small_model


def mixed_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "odd": torch.randn(3, 5, generator=generator),
        "small": torch.randn(7, generator=generator).bfloat16(),
        "tall": torch.randn(300, 3, generator=generator),
        "experts": torch.randn(2, 65, 4, generator=generator).bfloat16(),
        "last": torch.randn(2, 2, 2, generator=generator),
    }


def plain(tensors: dict[str, torch.Tensor]) -> dict[str, Weight]:
    return {name: Weight(tensor) for name, tensor in tensors.items()}


def bucket_bytes(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(weights_module, "_BUCKET_BYTES", {"cpu": size})


@pytest.mark.parametrize("size", [1, 64, 500, 2**20])
def test_what_is_written_is_read_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    bucket_bytes(monkeypatch, size)
    weights = mixed_weights()
    shared = SharedWeights(plain(weights), folder=tmp_path)
    mapped = Segment(shared.path, shared.layout)
    shared.unlink()
    for scale in (1.0, 2.0):
        now = {name: tensor * scale for name, tensor in weights.items()}
        shared.write(plain(now))
        read = dict(mapped.read(torch.device("cpu")))
        assert list(read) == list(weights)
        for name, tensor in now.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)
    assert not list(tmp_path.iterdir())


def test_weights_travel_in_the_type_of_the_engine(tmp_path: Path) -> None:
    weights = mixed_weights()
    shared = SharedWeights(plain(weights), dtype=torch.bfloat16, folder=tmp_path)
    shared.write(plain(weights))
    read = dict(Segment(shared.path, shared.layout).read(torch.device("cpu")))
    assert all(torch.equal(read[name], tensor.bfloat16()) for name, tensor in weights.items())
    assert shared.layout.n_bytes < Layout.from_weights(plain(weights)).n_bytes


def test_tensors_never_overlap() -> None:
    extents = [(part.start, part.stop) for part in Layout.from_weights(plain(mixed_weights())).tensors()]
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(extents))


@pytest.mark.parametrize("limit", [1, 512, 1000, 2**20])
def test_buckets_hold_every_row_once_in_as_few_bytes_as_allowed(limit: int) -> None:
    layout = Layout.from_weights(plain(mixed_weights()))
    parts = list(layout.pieces(limit))
    rows = {whole.name: whole.rows.stop for whole in layout.tensors()}
    assert [(part.name, row) for part in parts for row in range(part.rows.start, part.rows.stop)] == [
        (name, row) for name, n_rows in rows.items() for row in range(n_rows)
    ]
    grouped = list(buckets(parts, limit))
    assert [part for bucket in grouped for part in bucket] == parts
    assert all(bucket[-1].stop - bucket[0].start <= limit for bucket in grouped if len(bucket) > 1)
    # A piece of fewer than 128 rows is as large as it must be to stay aligned.
    assert all(part.stop - part.start <= limit or part.rows.stop - part.rows.start <= 64 for part in parts)
    assert all(bucket[0].start % 64 == 0 for bucket in grouped)


def test_a_bucket_is_copied_once_into_the_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each of these is a transfer of its own."""
    weights = {f"w{i}": torch.full((4, 8), float(i)) for i in range(100)}
    bucket_bytes(monkeypatch, 128 * 25)
    shared = SharedWeights(plain(weights), folder=tmp_path)
    starts: list[Any] = []
    flat = shared._segment.flat

    class Counted:
        def __getitem__(self, where: slice) -> torch.Tensor:
            starts.append(where.start)
            return flat[where]

    shared._segment.flat = Counted()  # type: ignore[assignment]
    shared.write(plain(weights))
    assert len(starts) == 4


def test_no_room_in_shared_memory_is_an_error_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"no room for .* MiB of weights \(No space left on device\).*--shm-size"):
        SharedWeights(plain(mixed_weights()), folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_and_values_are_those_of_the_checkpoint(architecture: str) -> None:
    model = small_model(architecture)
    weights, stored = policy_weights(model), model.state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(weights) == set(stored) - tied
    assert all(torch.equal(weight.value, stored[name]) for name, weight in weights.items())


def adapted_model(architecture: str, rank: int = 2) -> nn.Module:
    """A model whose adapters change its output."""
    adapted = small_model(architecture)
    add_adapters(adapted, LoraConfig(lora_rank=rank), seed=0, dtype=torch.float32, name="small")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return adapted


def transferred(model: nn.Module, folder: Path, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    weights = policy_weights(model)
    shared = SharedWeights(weights, dtype=dtype, folder=folder)
    shared.write(weights)
    return dict(Segment(shared.path, shared.layout).read(torch.device("cpu")))


@pytest.mark.parametrize("size", [100, 2**20])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_adapters_compute_what_adapters_compute(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    bucket_bytes(monkeypatch, size)
    merged, adapted = small_model(architecture), adapted_model(architecture)
    tokens = torch.arange(10)[None]
    before = merged(tokens).logits
    with torch.autocast("cpu", torch.bfloat16):  # merging is exact, whatever it is called in
        weights = transferred(adapted, tmp_path)
    missing, unexpected = merged.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    torch.testing.assert_close(merged(tokens).logits, adapted(tokens).logits, atol=1e-4, rtol=1e-4)
    assert (merged(tokens).logits - before).abs().max() > 0.1


def test_merged_weights_are_rounded_once(tmp_path: Path) -> None:
    """A sum of rounded parts would be up to twice as far off; the reference is peft's own, in float64."""
    adapted = adapted_model("qwen2-tied").bfloat16()
    expected = {
        f"{name}.weight": layer.base_layer.weight.double()
        + layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double() * layer.scaling["default"]
        for name, layer in adapted_layers(adapted).items()
    }
    weights = transferred(adapted, tmp_path, torch.bfloat16)
    assert len(expected) == 4 * 7
    for name, exact in expected.items():
        unequal = weights[name] != exact.bfloat16()  # float32 may round a tie the other way
        assert unequal.double().mean() < 0.01


class NewStorages(TorchDispatchMode):
    """Collects the sizes of all tensors that operations inside create."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.untyped_storage().data_ptr() not in self.known:
            self.sizes.append(output.untyped_storage().nbytes())
        return output


def test_merging_needs_the_memory_of_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of all merged weights, nor that of one: at 1.5B these are gigabytes."""
    bucket_bytes(monkeypatch, 64 * 32 * 4)
    model = adapted_model("llama-untied")
    weights = policy_weights(model)
    shared = SharedWeights(weights, folder=tmp_path)
    with NewStorages([*model.parameters(), shared._segment.flat]) as new:
        shared.write(weights)
    assert 0 < max(new.sizes) <= 64 * 48 * 4  # rows are cut in multiples of 64, and the widest have 48 numbers
    assert shared.layout.n_bytes > 10 * max(new.sizes)


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
