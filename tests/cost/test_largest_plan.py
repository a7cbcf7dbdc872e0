"""The largest micro-batch plan that fits, of the shape that is preferred."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import Qwen2Config

from ebft_study.cost import (
    Limits,
    MicroBatchPlan,
    ModelShape,
    StepShape,
    largest_plan,
    memory,
    step_cost,
    step_kernels,
    step_seconds,
)
from ebft_study.cost.memory import EFFICIENT_BLOCK_TOKENS
from ebft_study.cost.shapes import GPU_LIMITS
from ebft_study.errors import ConfigError

SMALL = ModelShape.from_config(
    Qwen2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
)
LARGE = replace(
    SMALL,
    n_layers=28,
    hidden_size=1536,
    intermediate_size=8960,
    n_heads=12,
    head_dim=128,
    vocabulary_size=151_936,
)
LONG = StepShape(
    method="ebft",
    sequence_length=1024,
    stride=8,
    completion_length=8,
    context_length=8,
    n_samples=4,
    batch_size=16,
    depths=(0.25, 0.5, 0.75),
    precision="bfloat16",
)


CPU = Limits.on("cpu")


def peak(plan: MicroBatchPlan, step: StepShape = LONG, limits: Limits = GPU_LIMITS) -> float:
    return memory(LARGE, LARGE, step, plan, limits=limits).peak_bytes


@pytest.mark.parametrize("given", [(None, None), (4, None), (None, 32)])
@pytest.mark.parametrize("step", [LONG, replace(LONG, activation_checkpointing=True)], ids=["plain", "checkpointing"])
def test_a_gpu_takes_the_plan_with_the_least_predicted_time_that_fits(
    step: StepShape, given: tuple[int | None, int | None]
) -> None:
    sizes = [given[0]] if given[0] else [16, 8, 4, 2, 1]
    anchors = [given[1]] if given[1] else [127, 64, 32, 16, 8, 4, 2, 1]
    seconds = {
        plan: step_seconds(LARGE, LARGE, step, plan) for plan in (MicroBatchPlan(S, A) for S in sizes for A in anchors)
    }
    chosen = set()
    for budget in (2**30 * gib for gib in (30, 33, 36, 40, 50, 70, 100, 200, 2000)):
        fitting = {plan: time for plan, time in seconds.items() if peak(plan, step) <= budget}
        if fitting:
            plan = largest_plan(LARGE, LARGE, step, budget_bytes=budget, given=given)
            assert seconds[plan] == min(fitting.values())
            chosen.add(plan)
    assert len(chosen) > (1 if given == (None, None) else 0)


def test_predicted_time_is_that_of_products_and_of_kernels() -> None:
    whole, halves = MicroBatchPlan(16, 127), MicroBatchPlan(8, 127)
    kernels = [step_kernels(LARGE, LARGE, LONG, plan) for plan in (whole, halves)]
    assert kernels[1] == 2 * kernels[0]
    flops = [step_cost(LARGE, LARGE, LONG, plan=plan).total.flops for plan in (whole, halves)]
    seconds = [step_seconds(LARGE, LARGE, LONG, plan) for plan in (whole, halves)]
    assert seconds[1] - seconds[0] == pytest.approx((flops[1] - flops[0]) / 4e14 + kernels[0] * 5e-6)
    shared = replace(LONG, world_size=2)
    assert step_seconds(LARGE, LARGE, shared, MicroBatchPlan(8, 127)) == pytest.approx(
        flops[1] / 2 / 4e14 + kernels[0] * 5e-6, rel=1e-3
    )
    slower = step_seconds(LARGE, LARGE, replace(LONG, precision="float32"), whole)
    assert slower == pytest.approx(flops[0] / 5e13 + kernels[0] * 5e-6)


def test_everything_at_once_where_there_is_room() -> None:
    whole = MicroBatchPlan.whole(LONG)
    assert whole == MicroBatchPlan(16, 127)
    assert largest_plan(LARGE, LARGE, LONG, budget_bytes=peak(whole)) == whole
    shared = largest_plan(LARGE, LARGE, replace(LONG, world_size=4), budget_bytes=peak(whole))
    assert shared == MicroBatchPlan(4, 127)


@pytest.mark.parametrize("step", [LONG, replace(LONG, activation_checkpointing=True)], ids=["plain", "checkpointing"])
def test_on_a_cpu_a_split_fits_and_nothing_preferred_to_it_does(step: StepShape) -> None:
    seen = []
    budget = peak(MicroBatchPlan.whole(step), step, CPU)
    while budget >= peak(MicroBatchPlan(1, 1), step, CPU):
        plan = largest_plan(LARGE, LARGE, step, budget_bytes=budget, limits=CPU)
        assert peak(plan, step, CPU) <= budget
        assert plan == largest_plan(LARGE, LARGE, step, budget_bytes=budget, limits=CPU)
        seen.append(plan)
        budget *= 0.98
    assert seen == sorted(seen, key=lambda plan: (-plan.micro_batch_size, -plan.anchors_at_once))
    tokens_per_anchor = step.n_samples * (1 if step.differentiable_rollouts else step.completion_length - 1)
    for plan in seen:
        efficient = plan.micro_batch_size * plan.anchors_at_once * tokens_per_anchor >= EFFICIENT_BLOCK_TOKENS
        assert efficient or plan.micro_batch_size == 1 or plan.anchors_at_once == 127
    assert seen[0] == MicroBatchPlan.whole(step)
    assert seen[-1].micro_batch_size == 1
    assert any(plan.micro_batch_size == 16 and plan.anchors_at_once < 127 for plan in seen)


def test_short_completions_are_not_cut_below_what_fills_a_pass() -> None:
    step = replace(LONG, sequence_length=64, n_samples=2, completion_length=2, batch_size=4, precision="float32")
    least = memory(SMALL, SMALL, step, MicroBatchPlan(2, 7), limits=CPU).peak_bytes
    assert largest_plan(SMALL, SMALL, step, budget_bytes=least, limits=CPU) == MicroBatchPlan(2, 7)


def test_a_chosen_size_is_kept_and_the_other_one_fitted_to_it() -> None:
    budget = peak(MicroBatchPlan(4, 32), LONG)
    assert largest_plan(LARGE, LARGE, LONG, budget_bytes=budget, given=(4, None)) == MicroBatchPlan(4, 32)
    assert largest_plan(LARGE, LARGE, LONG, budget_bytes=budget, given=(None, 32)) == MicroBatchPlan(4, 32)
    assert largest_plan(LARGE, LARGE, LONG, budget_bytes=budget, given=(2, 3)) == MicroBatchPlan(2, 3)
    with pytest.raises(ConfigError, match="Use a smaller anchors_at_once, a smaller micro_batch_size"):
        largest_plan(LARGE, LARGE, LONG, budget_bytes=budget, given=(8, 64))


def test_sft_is_cut_by_sequences_only() -> None:
    step = replace(LONG, method="sft")
    plan = largest_plan(LARGE, LARGE, step, budget_bytes=memory(LARGE, LARGE, step, MicroBatchPlan(4, 1)).peak_bytes)
    assert plan == MicroBatchPlan(4, 1)


def test_what_does_not_fit_at_all_is_refused_with_what_it_needs() -> None:
    with pytest.raises(ConfigError) as caught:
        largest_plan(LARGE, LARGE, LONG, budget_bytes=8 * 2**30)
    message = str(caught.value)
    assert (
        f"needs {peak(MicroBatchPlan(1, 1)) / 2**30:.3g} GiB with micro_batch_size=1 and anchors_at_once=1" in message
    )
    assert "memory=8 GiB" in message
    for remedy in ("sequence_length", "n_samples", "completion_length", "activation_checkpointing=true", "lora_rank"):
        assert remedy in message
    assert "precision=bfloat16" not in message
    with pytest.raises(ConfigError) as caught:
        largest_plan(LARGE, LARGE, replace(LONG, method="sft", precision="float32"), budget_bytes=2**30)
    assert "precision=bfloat16" in str(caught.value)
    assert "n_samples" not in str(caught.value)
