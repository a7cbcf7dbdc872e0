"""Kernels that a step launches on a GPU, and the time that it is predicted to take there."""

from __future__ import annotations

from ebft_study.cost.flops import step_cost
from ebft_study.cost.shapes import GPU_LIMITS, Limits, MicroBatchPlan, ModelShape, StepShape

FLOPS_PER_SECOND = {"float32": 5e13, "bfloat16": 4e14}
"""Of the products of a step, by type: about half of what a GPU of today can do."""
KERNEL_SECONDS = 5e-6
"""Time that a kernel takes besides its products: its start on the host and on the GPU. An assumption, like the speeds:
nothing here has run on a GPU yet. Plans depend on the ratio of the two alone: a kernel is worth 2 GFLOP in bfloat16."""

LAYER_FORWARD, LAYER_BACKWARD = 46, 102
"""Kernels of a layer in a pass under autocast, with fused attention (Qwen2; `tests/benchmarks/test_launches.py`)."""
CHUNKED_DECODING = 33
"""More of them where a block is too long to be decoded by a fused call."""
PASS, PART = 100, 250
"""Kernels of a pass outside its layers (mask, positions, head), and of a part's rewards and metrics."""


def step_kernels(model: ModelShape, features: ModelShape, step: StepShape, plan: MicroBatchPlan) -> float:
    """Kernels that each worker launches in a step, without those of the optimizer; an estimate."""
    micro_batches = -(-step.sequences_per_worker // plan.micro_batch_size)
    parts = micro_batches * -(-len(step.anchors) // plan.anchors_at_once)
    decoded = parts * (step.completion_length - 1)
    kept = step.differentiable_rollouts
    trained = micro_batches + (decoded if kept else parts)
    sampled = 0 if kept else decoded
    based = micro_batches + parts if step.has_kl else 0
    embedded = micro_batches + parts if step.has_features and not step.remote_features else 0
    forward = LAYER_FORWARD * (2 if step.activation_checkpointing else 1)
    per_layer = trained * (forward + LAYER_BACKWARD) + sampled * (LAYER_FORWARD + CHUNKED_DECODING)
    layers = model.n_layers * (per_layer + based * LAYER_FORWARD)
    layers += features.cut(step.depths).n_layers * embedded * LAYER_FORWARD
    return layers + (trained + sampled + based + embedded) * PASS + parts * PART


def step_seconds(
    model: ModelShape, features: ModelShape, step: StepShape, plan: MicroBatchPlan, *, limits: Limits = GPU_LIMITS
) -> float:
    """Predicted time of a step on GPUs, to compare plans by."""
    flops = step_cost(model, features, step, plan=plan, limits=limits).total.flops / step.world_size
    return flops / FLOPS_PER_SECOND[step.precision] + KERNEL_SECONDS * step_kernels(model, features, step, plan)
