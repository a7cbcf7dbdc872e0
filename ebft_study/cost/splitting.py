"""How to cut a step so that it fits into a given memory."""

from __future__ import annotations

from collections.abc import Iterator

from ebft_study.cost.memory import Memory, memory
from ebft_study.cost.shapes import Limits, ModelShape, Split, StepShape
from ebft_study.errors import ConfigError

EFFICIENT_BLOCK_TOKENS = 1024
"""Fewer tokens per pass than this no longer fill a matrix product."""


def largest_split(
    model: ModelShape, features: ModelShape, step: StepShape, *, budget_bytes: float, limits: Limits | None = None
) -> Split:
    """The fewest passes whose peak memory fits into `budget_bytes` on one worker; depends on its arguments alone.

    All sequences and all anchors if that fits; otherwise fewer anchors at once, while a pass still has
    `EFFICIENT_BLOCK_TOKENS`; otherwise fewer sequences, with as many anchors as fit; at last fewer anchors still.

    Raises:
        ConfigError: not even one sequence and one anchor at a time fit.
    """
    for split in _splits(step):
        if memory(model, features, step, split, limits=limits).peak_bytes <= budget_bytes:
            return split
    raise _does_not_fit(memory(model, features, step, Split(1, 1), limits=limits), step, budget_bytes)


def _splits(step: StepShape) -> Iterator[Split]:
    whole = Split.whole(step)
    tokens_per_anchor = step.n_samples * (1 if step.keeps_graph else step.completion_length - 1)
    for S in _halvings(whole.micro_batch_size):
        for A in _halvings(whole.anchors_at_once):
            if S == 1 or whole.anchors_at_once == A or S * A * tokens_per_anchor >= EFFICIENT_BLOCK_TOKENS:
                yield Split(S, A)


def _halvings(count: int) -> Iterator[int]:
    while count > 1:
        yield count
        count = -(-count // 2)
    yield 1


def _does_not_fit(least: Memory, step: StepShape, budget_bytes: float) -> ConfigError:
    remedies = ["a shorter sequence_length"]
    if step.method == "ebft":
        remedies += ["fewer n_samples", "a shorter completion_length"]
    if not step.activation_checkpointing:
        remedies.append("activation_checkpointing=true")
    if step.precision == "float32":
        remedies.append("precision=bfloat16")
    needed, lasting, budget = (b / 2**30 for b in (least.peak_bytes, least.phases_bytes["optimizer"], budget_bytes))
    return ConfigError(
        f"memory={budget:.3g} GiB: one optimizer step needs at least {needed:.3g} GiB, with micro_batch_size=1 and "
        f"anchors_at_once=1; {lasting:.3g} GiB of them are weights, gradients, optimizer states and the feature "
        f"network. Use {', '.join(remedies)}, lora_rank, or a smaller model"
    )
