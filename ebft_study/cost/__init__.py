"""What one optimizer step costs, from shapes alone: tokens, FLOPs, weight traffic and peak memory.

Letters: T tokens per sequence, C first context, s stride, B anchors at `a_b = C + b s`, n samples of G tokens each,
N = B n blocks, S sequences and A anchors at once, H hidden size, V vocabulary. Per sequence an EBFT step runs

    scoring    x[0:T] with gradient; backward through it and through the blocks, which are run again, G - 1 tokens
               each, only where sampling did not keep its graph
    rollouts   G - 1 decode passes of N tokens against the keys and values of x; B + N (G - 1) rows of logits
    features   T + N G tokens through the frozen network, up to its deepest requested layer; no logits

and an SFT step x[0:T] alone. Sequences count as full: T tokens and B anchors each.

FLOPs are those of matrix products and attention (a multiply-add is 2), as `torch.utils.flop_counter` counts them, with
attention counted as `needed` (every token meets its true number of keys) or as `executed` (what that counter sees:
causal attention as a full square, blocks against the longest context of their chunk in the `chunked` attention).
"""

from ebft_study.cost.memory import Memory, memory, saved_bytes_per_token
from ebft_study.cost.shapes import Limits, MicroBatchPlan, ModelShape, StepShape, keeps_graph
from ebft_study.cost.splitting import largest_plan
from ebft_study.cost.work import PhaseCost, StepCost, step_cost

__all__ = [
    "Limits",
    "Memory",
    "MicroBatchPlan",
    "ModelShape",
    "PhaseCost",
    "StepCost",
    "StepShape",
    "keeps_graph",
    "largest_plan",
    "memory",
    "saved_bytes_per_token",
    "step_cost",
]
