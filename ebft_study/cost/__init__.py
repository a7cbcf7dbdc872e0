"""Cost of one optimizer step, from shapes alone: tokens, FLOPs and peak memory.

    model, step = ModelShape.from_config(hugging_face_config), StepShape.from_config(run_config)
    step_cost(model, features, step)         FLOPs by phase
    evaluation_flops(model, features, step)  those of an evaluation of its sequences
    memory(model, features, step, plan)      peak bytes of a worker by phase, under a micro-batch plan
    largest_plan(..., budget_bytes=...)      the best plan that fits: the fewest passes or, on a GPU, the least time
    step_kernels, step_seconds               kernels of a step on a GPU, and its predicted time

Letters: T tokens per sequence, C first context, s stride, B anchors at `a_b = C + b s`, n samples of G tokens each,
N = B n blocks, S sequences and A anchors at a time, H hidden size, V vocabulary. Per sequence an EBFT step runs

    scoring    x[0:T] with gradient; backward through it and through the blocks, which are run again, G - 1 tokens
               each, only where sampling did not keep its graph
    rollouts   G - 1 decode passes of N tokens against the keys and values of x; B + N (G - 1) rows of logits
    features   T + N G tokens through the frozen network, up to its deepest requested layer; no logits

and an SFT step x[0:T] alone. Sequences count as full: T tokens and B anchors each.

FLOPs are those of matrix products and attention (a multiply-add is 2), as `torch.utils.flop_counter` counts them, with
attention counted as `needed` (every token meets its true number of keys) or as `executed` (what that counter sees:
causal attention as a full square, blocks against the longest context of their chunk in the `chunked` attention).
"""

from ebft_study.cost.flops import PhaseCost, StepCost, answers_flops, evaluation_flops, step_cost
from ebft_study.cost.launches import step_kernels, step_seconds
from ebft_study.cost.memory import Memory, embedded_bytes_per_token, largest_plan, memory, saved_bytes_per_token
from ebft_study.cost.shapes import Limits, MicroBatchPlan, ModelShape, StepShape, keeps_graph

__all__ = [
    "Limits",
    "Memory",
    "MicroBatchPlan",
    "ModelShape",
    "PhaseCost",
    "StepCost",
    "StepShape",
    "answers_flops",
    "embedded_bytes_per_token",
    "evaluation_flops",
    "keeps_graph",
    "largest_plan",
    "memory",
    "saved_bytes_per_token",
    "step_cost",
    "step_kernels",
    "step_seconds",
]
