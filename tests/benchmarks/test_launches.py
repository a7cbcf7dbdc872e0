"""Kernels of a step on a GPU are counted without one: they must not grow, and plans must know how many there are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from benchmarks import launches
from benchmarks.launches import Counting, count
from benchmarks.settings import PAPER, Settings
from benchmarks.workload import shapes
from ebft_study.cost import MicroBatchPlan, largest_plan, step_kernels
from ebft_study.networks import blocks
from ebft_study.training.memory import LARGE_GPU_BYTES, USABLE

SHORT = replace(PAPER, sequence_lengths=(128,), batch_size=4)


def test_operations_are_kernels_views_and_synchronisations() -> None:
    counts = Counter[str]()
    table = torch.ones(4, 4, requires_grad=True)
    with Counting(counts):
        product = table.detach() @ table.detach().T  # three views, a kernel
        assert float(product.relu().sum()) == 64.0  # two kernels; waits
        assert product[product > 4].tolist() == []  # a kernel; waits twice
        torch.empty(3)
    assert counts == {"kernels": 4, "views": 3, "synchronisations": 3}
    total = (table * table).sum()
    counts.clear()
    with Counting(counts):
        total.backward()
    assert counts["kernels"] == 4  # ones, two products, their sum
    assert counts["views"] >= 1


def test_a_step_at_the_papers_setting_launches_few_kernels() -> None:
    """Measured: 46,560 kernels, 52,300 views, 28 synchronisations; in several parts with chunks it was 745,000."""
    settings = replace(PAPER, activation_checkpointing=True)
    plan = largest_plan(*shapes(settings), settings.shape, budget_bytes=USABLE * LARGE_GPU_BYTES)
    assert plan == MicroBatchPlan.whole(settings.shape)
    counted = count(settings, plan).total
    assert counted["kernels"] <= 47_000
    assert counted["views"] <= 53_000
    assert counted["synchronisations"] <= 30
    predicted = step_kernels(*shapes(settings), settings.shape, plan)
    assert predicted == pytest.approx(counted["kernels"], rel=0.05)


@pytest.mark.parametrize(
    ("settings", "plan"),
    [
        (SHORT, MicroBatchPlan(2, 8)),
        (replace(SHORT, activation_checkpointing=True), MicroBatchPlan(4, 4)),
        (replace(SHORT, completion_length=20, stride=20), MicroBatchPlan(4, 6)),
        (replace(SHORT, batch_size=2, lora_rank=4), MicroBatchPlan(2, 15)),
    ],
    ids=["parts", "checkpointed", "scored again", "adapters"],
)
def test_plans_know_how_many_kernels_a_step_launches(settings: Settings, plan: MicroBatchPlan) -> None:
    counted = count(settings, plan).total["kernels"]
    tolerance = 0.35 if settings.lora_rank else 0.1  # adapters have kernels of their own
    assert step_kernels(*shapes(settings), settings.shape, plan) == pytest.approx(counted, rel=tolerance)


def test_a_layer_decodes_a_token_with_few_kernels() -> None:
    with launches.as_on_a_gpu(1, 32):
        assert blocks.backend_on(torch.device("cpu")) == "flex"
    settings, plan = replace(SHORT, batch_size=1), MicroBatchPlan(1, 15)
    longer = replace(settings, completion_length=9, stride=8)
    kernels = [count(each, plan).counts["rollout_seconds"]["kernels"] for each in (settings, longer)]
    assert kernels[1] - kernels[0] <= 28 * 47 + 60
