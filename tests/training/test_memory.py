"""Steps are cut to fit a budget before anything is loaded, and the result does not depend on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers import Qwen2Config

from ebft_study.config import build_run, nest
from ebft_study.cost import ModelShape
from ebft_study.errors import ConfigError
from ebft_study.training import loop, memory
from ebft_study.training.loop import observe, start
from ebft_study.training.memory import budgets, plan_micro_batches, shapes, total_memory
from ebft_study.training.update import Run
from tests.tiny_run import MemoryRecorder, report_nothing, tiny_config

CPU = torch.device("cpu")
SEVEN_B: dict[str, Any] = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip


def large(folder: Path, **changes: Any) -> Any:
    """A run of a 7B model of which there is a configuration only: whoever reads weights fails."""
    Qwen2Config(**SEVEN_B).save_pretrained(folder / "seven")
    settings = {"model": str(folder / "seven"), "sequence_length": 1024, "batch_size": 16} | changes
    return build_run(nest(settings, source="test"), source="test")


def test_what_cannot_fit_is_refused_before_any_weights_are_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_micro_batches(large(tmp_path, memory_budget_gib=80), CPU, world_size=1)
    message = str(caught.value)
    assert "memory=80 GiB" in message
    for remedy in ("sequence_length", "n_samples", "activation_checkpointing=true", "precision=bfloat16", "lora_rank"):
        assert remedy in message


def test_more_workers_lower_precision_or_adapters_make_it_fit(tmp_path: Path) -> None:
    low = {"precision": "bfloat16", "activation_checkpointing": True, "memory_budget_gib": 80}
    with pytest.raises(ConfigError):
        plan_micro_batches(large(tmp_path, **low), CPU, world_size=8)
    sharded = plan_micro_batches(large(tmp_path, sharding="fsdp", **low), CPU, world_size=8)
    adapted = plan_micro_batches(large(tmp_path, lora_rank=16, **low), CPU, world_size=1)
    assert sharded.peak_bytes <= sharded.budget_bytes == 80 * 2**30
    assert adapted.peak_bytes <= 80 * 2**30


PAPER = {"precision": "bfloat16", "completion_length": 8, "stride": 8, "n_samples": 4}
"""With `large`, the setting of the paper's experiments."""


def plan_large(folder: Path, *, workers: int, **changes: Any) -> memory.MemoryPlan:
    settings = large(folder, **PAPER, **changes)
    return memory.plan_for(settings, "cuda", total_bytes=memory.LARGE_GPU_BYTES, world_size=workers)


@pytest.mark.parametrize(
    "changes", [{}, {"kl_coefficient": 0.1, "gamma": 0.1, "ema_decay": 0.99}, {"method": "sft"}], ids=str
)
def test_all_weights_of_seven_billion_train_on_eight_large_gpus(tmp_path: Path, changes: dict[str, Any]) -> None:
    plan = plan_large(tmp_path, workers=8, sharding="fsdp", **changes)
    assert plan.peak_bytes <= 0.9 * memory.LARGE_GPU_BYTES
    with pytest.raises(ConfigError, match="sharding=fsdp with more workers"):
        plan_large(tmp_path, workers=8, **changes)


def test_adapters_of_seven_billion_train_on_one_large_gpu(tmp_path: Path) -> None:
    assert plan_large(tmp_path, workers=1, lora_rank=16).peak_bytes <= 0.9 * memory.LARGE_GPU_BYTES


def test_too_few_workers_for_seven_billion_are_told_that_more_would_help(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more workers_per_trial"):
        plan_large(tmp_path, workers=2, sharding="fsdp")


def test_a_gpu_computes_activations_again_where_a_step_takes_less_time_so(tmp_path: Path) -> None:
    def plan(device: str = "cuda", gib: float = 71, **changes: Any) -> memory.MemoryPlan:
        config = large(tmp_path, **{"precision": "bfloat16", "lora_rank": 16} | changes)
        return memory.fit_memory(config, device, world_size=1, budget_bytes=gib * 2**30)

    auto, never, always = plan(), plan(activation_checkpointing=False), plan(activation_checkpointing=True)
    assert auto == always != never
    assert "activation_checkpointing" in auto.describe()
    assert "activation_checkpointing" not in never.describe()
    assert auto.micro_batch_size * auto.anchors_at_once > never.micro_batch_size * never.anchors_at_once
    # With room for everything there is no reason to, and a CPU has none at all.
    assert not plan(gib=10_000).activation_checkpointing
    assert not plan("cpu").activation_checkpointing
    # What fits in no other way is run so.
    assert plan(gib=17).activation_checkpointing
    with pytest.raises(ConfigError, match="activation_checkpointing=true"):
        plan(gib=17, activation_checkpointing=False)


def test_a_run_does_as_its_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = memory.fit_memory

    def again(*args: Any, **kwargs: Any) -> memory.MemoryPlan:
        return replace(planned(*args, **kwargs), activation_checkpointing=True)

    plain = Run(tiny_config(tmp_path))
    monkeypatch.setattr(memory, "fit_memory", again)
    checkpointed = Run(tiny_config(tmp_path))
    assert (plain.model.is_gradient_checkpointing, checkpointed.model.is_gradient_checkpointing) == (False, True)
    costs = [run.meter.update(samples=True).total.flops for run in (plain, checkpointed)]
    assert costs[1] > 1.1 * costs[0]


def test_adapters_are_counted_as_peft_makes_them(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, lora_rank=3, lora_targets=["q_proj", "down_proj"])
    everything = tiny_config(tmp_path, lora_rank=3)
    for run_config in (config, everything):
        run = Run(run_config)
        trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        assert shapes(run_config)[0].trainable_parameters == trained
    assert isinstance(shapes(config)[1], ModelShape)


def test_sizes_that_a_user_has_chosen_are_kept(tmp_path: Path) -> None:
    plan = plan_micro_batches(tiny_config(tmp_path, micro_batch_size=3, anchors_at_once=2), CPU, world_size=1)
    assert (plan.micro_batch_size, plan.anchors_at_once) == (3, 2)


def test_a_cpu_takes_no_more_than_is_needed_and_never_the_whole_machine(tmp_path: Path) -> None:
    settings, gib = tiny_config(tmp_path), 2**30
    assert budgets(settings, "cpu", total_bytes=40 * gib) == [4 * gib, 8 * gib, 16 * gib, 32 * gib, 36 * gib]
    assert budgets(settings, "cpu", total_bytes=2 * gib) == [1.8 * gib]
    assert budgets(tiny_config(tmp_path, memory_budget_gib=0.5), "cpu", total_bytes=40 * gib) == [2**29]


def test_a_machine_has_no_more_memory_than_its_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CONTAINER_LIMITS", (tmp_path / "none", tmp_path / "limit"))
    without = total_memory(CPU)
    (tmp_path / "limit").write_text("max\n")
    assert total_memory(CPU) == without
    (tmp_path / "limit").write_text(f"{5 * 2**29}\n")
    assert total_memory(CPU) == min(without, 2 * 2**30)


def test_cards_of_one_type_make_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for gib in (79.1, 79.65):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _, g=gib: SimpleNamespace(total_memory=g * 2**30)
        )
        found.add(total_memory(torch.device("cuda")))
    assert found == {memory.LARGE_GPU_BYTES}


@pytest.mark.parametrize(
    ("gpu_fraction", "changes", "usable"),
    [
        (1.0, {}, 0.9),
        (0.25, {}, 0.9 * 0.25),
        (1.0, {"backend": "vllm", "placement": "colocated", "gpu_memory_utilization": 0.4}, 0.9 * 0.6),
        (0.5, {"backend": "vllm", "placement": "colocated", "gpu_memory_utilization": 0.4}, 0.9 * 0.1),
        (1.0, {"backend": "vllm", "placement": "own", "gpu_memory_utilization": 0.4}, 0.9),
        (0.5, {"placement": "colocated", "gpu_memory_utilization": 0.4}, 0.9 * 0.5),
    ],
)
def test_a_worker_has_what_others_on_its_gpu_leave(
    tmp_path: Path, gpu_fraction: float, changes: dict[str, Any], usable: float
) -> None:
    keys = {"backend": "rollout.backend", "placement": "vllm.placement"}
    settings = tiny_config(tmp_path, **{keys.get(key, key): value for key, value in changes.items()})
    (budget,) = budgets(settings, "cuda", total_bytes=80e9, gpu_fraction=gpu_fraction)
    assert budget == pytest.approx(usable * 80e9)


def test_an_engine_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    settings = tiny_config(tmp_path, **{"rollout.backend": "vllm", "vllm.placement": "colocated"})
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization=0\.3: a worker has 0\.25 of a GPU"):
        budgets(settings, "cuda", total_bytes=80e9, gpu_fraction=0.25)


def test_too_little_free_memory_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_config(tmp_path)
    peak = plan_micro_batches(settings, CPU, world_size=1).peak_bytes
    recorder = MemoryRecorder()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=40 * 2**30, available=peak - 1))
    monkeypatch.setattr(loop, "Run", lambda *_, **__: pytest.fail("out of memory"))
    with pytest.raises(BaseException, match="out of memory"):
        loop.train(settings, recorder=recorder, on_report=report_nothing)
    ((kind, message),) = recorder.events
    assert kind == "memory"
    assert f"{peak - 1:.0f} bytes" in message
    assert f"{peak:.0f}" in message
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=40 * 2**30, available=peak))
    with pytest.raises(BaseException, match="out of memory"):
        loop.train(settings, recorder=recorder, on_report=report_nothing)
    assert len(recorder.events) == 1


def test_free_memory_of_a_gpu_counts_what_this_process_holds_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"memory_reserved": 700, "memory_allocated": 200, "mem_get_info": (1000, 4000)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert memory.free_memory(torch.device("cuda")) == 1500


def test_a_smaller_budget_cuts_the_step_and_changes_neither_tokens_nor_gradients(tmp_path: Path) -> None:
    gib = 2**30
    roomy = tiny_config(tmp_path, gamma=0.1, batch_size=8)
    whole = plan_micro_batches(roomy, CPU, world_size=1)
    tight = tiny_config(tmp_path, gamma=0.1, batch_size=8, memory_budget_gib=0.5 * whole.peak_bytes / gib)
    cut = plan_micro_batches(tight, CPU, world_size=1)
    assert whole.micro_batch_size == 8
    assert cut.micro_batch_size * cut.anchors_at_once < 8 * whole.anchors_at_once
    rows, weights = [], []
    for config in (roomy, tight):
        recorder = MemoryRecorder()
        run = Run(config)
        start(run, recorder, report_nothing)
        run.update()
        observe(run, recorder, report_nothing)
        rows.append(recorder.rows[1])
        weights.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
        assert run.parts.memory_plan.describe() in recorder.events[0][1]
    for name in ("loss", "reward", "policy_loss", "train_ce_loss", "grad_norm", "duplicate_rate", "policy_entropy"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4, abs=1e-6), name
    torch.testing.assert_close(weights[0], weights[1], atol=2e-5, rtol=1e-4)


def test_flex_attention_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.attention='flex': FlexAttention needs a GPU"):
        Run(tiny_config(tmp_path, attention="flex"))
