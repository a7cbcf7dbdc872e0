"""How to cut a step so that it fits into a given memory."""

from __future__ import annotations

from collections.abc import Iterator

from ebft_study.cost.memory import Memory, memory
from ebft_study.cost.shapes import Limits, MicroBatchPlan, ModelShape, StepShape
from ebft_study.errors import ConfigError

EFFICIENT_BLOCK_TOKENS = 1024
"""Fewer tokens per pass than this no longer fill a matrix product."""


def largest_plan(
    model: ModelShape,
    features: ModelShape,
    step: StepShape,
    *,
    budget_bytes: float,
    limits: Limits | None = None,
    given: tuple[int | None, int | None] = (None, None),
) -> MicroBatchPlan:
    """The fewest passes whose peak memory fits into `budget_bytes` on one worker; depends on its arguments alone.

    All sequences and all anchors if that fits; otherwise fewer anchors at once, while a pass still has
    `EFFICIENT_BLOCK_TOKENS`; otherwise fewer sequences, with as many anchors as fit; at last fewer anchors still.

    Args:
        given: micro_batch_size and anchors_at_once where the user has chosen them.

    Raises:
        ConfigError: not even one sequence and one anchor at a time fit, or what the user has chosen does not.
    """
    least = MicroBatchPlan(1, 1)
    for least in _splits(step, given):
        if memory(model, features, step, least, limits=limits).peak_bytes <= budget_bytes:
            return least
    raise _does_not_fit(memory(model, features, step, least, limits=limits), step, least, budget_bytes)


def _splits(step: StepShape, given: tuple[int | None, int | None]) -> Iterator[MicroBatchPlan]:
    """From the one preferred to the smallest."""
    whole = MicroBatchPlan.whole(step)
    tokens_per_anchor = step.n_samples * (1 if step.differentiable_rollouts else step.completion_length - 1)
    sizes = list(_choices(whole.micro_batch_size, given[0]))
    for S in sizes:
        for A in _choices(whole.anchors_at_once, given[1]):
            widest = min(whole.anchors_at_once, given[1] or whole.anchors_at_once)
            efficient = S * A * tokens_per_anchor >= EFFICIENT_BLOCK_TOKENS
            if efficient or sizes[-1] == S or widest == A:
                yield MicroBatchPlan(S, A)


def _choices(count: int, given: int | None) -> Iterator[int]:
    if given is not None:
        yield min(given, count)
        return
    while count > 1:
        yield count
        count = -(-count // 2)
    yield 1


def _does_not_fit(least: Memory, step: StepShape, split: MicroBatchPlan, budget_bytes: float) -> ConfigError:
    remedies = ["a shorter sequence_length"]
    if split.micro_batch_size > 1:
        remedies.insert(0, "a smaller micro_batch_size")
    if split.anchors_at_once > 1:
        remedies.insert(0, "a smaller anchors_at_once")
    if step.method == "ebft":
        remedies += ["fewer n_samples", "a shorter completion_length"]
    if not step.activation_checkpointing:
        remedies.append("activation_checkpointing=true")
    if step.precision == "float32":
        remedies.append("precision=bfloat16")
    needed, lasting, budget = (b / 2**30 for b in (least.peak_bytes, least.phases_bytes["optimizer"], budget_bytes))
    return ConfigError(
        f"memory={budget:.3g} GiB: one optimizer step needs {needed:.3g} GiB with "
        f"micro_batch_size={split.micro_batch_size} and anchors_at_once={split.anchors_at_once}; {lasting:.3g} GiB of "
        f"them are weights, gradients, optimizer states and the feature network. Use {', '.join(remedies)}, lora_rank, "
        "or a smaller model"
    )
