"""The peak memory of workers with sharded weights: the plan against the live tensors of two of them."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from ebft_study.config import RunConfig
from ebft_study.cost import Limits, MicroBatchPlan, StepShape, memory
from ebft_study.networks.sharding import shards_of
from ebft_study.training.memory import shapes
from ebft_study.training.update import Run
from tests.cost.test_cost import LiveBytes
from tests.tiny_run import WORDS, tiny_config, write_model

SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 2000,
}  # fmt: skip
COMMON: dict[str, Any] = {
    "sharding": "fsdp", "batch_size": 4, "micro_batch_size": 1, "sequence_length": 64, "completion_length": 4,
    "stride": 8, "n_samples": 2,
}  # fmt: skip
"""Two micro-batches: before the first, a step has no gradients yet, which the plan counts all the same."""
RUNS: dict[str, dict[str, Any]] = {
    "ebft": {},
    "all-terms": {"gamma": 0.1, "kl_coefficient": 0.1, "ema_decay": 0.9},
    "checkpointed": {"activation_checkpointing": True, "kl_coefficient": 0.1},
    "in-parts": {"anchors_at_once": 3},
    "few-tokens": {"sequence_length": 16},
    "sft": {"method": "sft"},
    "unsharded": {"sharding": "none"},
}


class LiveWithResized(LiveBytes):
    """Also follows storages that FSDP resizes, which no operation shows."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()

    def note(self, tensor: Tensor) -> None:
        self.follow(tensor.untyped_storage())

    def follow(self, storage: Any) -> None:
        if storage not in self.sizes:
            size = self.sizes[storage] = [0]
            weakref.finalize(storage, lambda: self._change(-size[0]))
        size = self.sizes[storage]
        before, size[0] = size[0], storage.nbytes()
        self._change(size[0] - before)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own dispatch runs the operation on this worker's part
        return super().__torch_dispatch__(function, types, args, kwargs)


def measure(run: Run) -> int:
    """Largest number of live bytes in an update, the second one."""
    run.update()
    live, resize = LiveWithResized(), torch.UntypedStorage.resize_

    def followed(storage: Any, size: int) -> Any:
        result = resize(storage, size)
        live.follow(storage)
        return result

    lasting = [*run.model.parameters(), *run.average.weights.values()]
    lasting += [tensor for state in run.optimizer.state.values() for tensor in state.values()]
    for network in {id(network): network for network in frozen(run)}.values():
        lasting += [shards.own for shards in shards_of(network)] or list(network.parameters())  # type: ignore[attr-defined]
    for tensor in lasting:
        live.note(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
    with pytest.MonkeyPatch.context() as patch, live:
        patch.setattr(torch.UntypedStorage, "resize_", followed)
        run.update()
    return live.peak


def frozen(run: Run) -> list[Any]:
    base = getattr(run.parts.method, "base", None)
    return [*run.parts.networks[1:], *([base] if base is not None else [])]


def predicted(config: RunConfig, run: Run) -> float:
    """The plan's peak of an update."""
    model, network = shapes(config)
    step, plan = StepShape.from_config(config, world_size=2), run.parts.memory_plan
    expected = memory(
        model, network, step, MicroBatchPlan(plan.micro_batch_size, plan.anchors_at_once), limits=Limits.on("cpu")
    )
    phases = {name: peak for name, peak in expected.phases_bytes.items() if name != "evaluation"}
    return max(phases.values())


def configured(folder: Path, name: str) -> RunConfig:
    return tiny_config(folder, **{**COMMON, **RUNS[name]})


def two_workers(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    found = {}
    for name in RUNS:
        config = configured(Path(folder), name)
        run = Run(config, rank=rank, world_size=world_size)
        found[name] = [measure(run), predicted(config, run)]
    (Path(folder) / f"found-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of both workers: run -> measured and predicted peak."""
    there = tmp_path_factory.mktemp("memory")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EBFT_STUDY_CACHE", str(there / "cache"))
        write_model(there / "model")
        (there / "data.jsonl").write_text(
            "\n".join(json.dumps({"text": " ".join(WORDS[k % 18 :] + WORDS * 8) + f" {k}"}) for k in range(60))
        )
        torch.manual_seed(0)
        ids = json.loads((there / "model" / "config.json").read_text())
        config = Qwen2Config(**SIZES, tie_word_embeddings=False, **{key: ids[key] for key in ("eos_token_id",)})
        Qwen2ForCausalLM(config).save_pretrained(there / "model")
        multiprocessing.spawn(two_workers, args=(2, str(there)), nprocs=2)
    return [json.loads((there / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", [name for name in RUNS if name != "unsharded"])
def test_the_peak_of_a_worker_is_that_of_the_plan(found: Any, name: str) -> None:
    for worker in found:
        measured, planned = worker[name]
        assert planned == pytest.approx(measured, rel=0.1)


def test_shards_save_memory_inside_a_step(found: Any) -> None:
    for worker in found:
        assert worker["ebft"][0] < 0.7 * worker["unsharded"][0]
