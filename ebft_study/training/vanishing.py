"""Updates that vanish: steps too small for the digits of a weight's type leave the weight as it is.

In bfloat16 neighbours of a weight w are |w| / 256 to |w| / 128 apart, and AdamW changes a weight by about the learning
rate: what is less than half of that distance is lost, in every step again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

METRIC = "unchanged_weight_fraction"
MOST = 0.5
"""A run is warned when more of the weights do not change."""
MATRICES, ENTRIES = 64, 1024
"""Matrices, and entries of each, that are compared."""


def watch(parameters: Iterable[nn.Parameter]) -> Callable[[], tuple[float, float]]:
    """Note a sample of the matrices before a step; those entries whose gradient is 0 are left out.

    Returns:
        A function to call after the step: the number of entries that it left unchanged, and that of all. On sharded
        weights both are of this worker's shards.
    """
    matrices = [(p, p.grad) for p in parameters if p.dim() > 1 and p.grad is not None]
    # At random: layers repeat, and even steps through them could meet one kind of matrix only.
    chosen = torch.randperm(len(matrices), generator=torch.Generator().manual_seed(0))[:MATRICES].tolist()
    noted = [(p, _sample(p), _sample(gradient) != 0) for p, gradient in (matrices[i] for i in chosen)]

    def unchanged() -> tuple[float, float]:
        same = sum(float(((_sample(p) == before) & moves).sum()) for p, before, moves in noted)
        return same, sum(float(moves.sum()) for *_, moves in noted)

    return unchanged


@torch.no_grad()
def _sample(tensor: Tensor) -> Tensor:
    """A copy of evenly spread entries; the odd distance keeps them from being those of one column."""
    flat = (tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()).flatten()
    return flat[:: (len(flat) // ENTRIES) | 1].clone()


def warning(fraction: float, *, learning_rate: float, weight_dtype: str) -> str:
    """What to tell the user of a run, most of whose updates vanish."""
    return (
        f"{100 * fraction:.3g} % of the weights that have a gradient did not change: with weight_dtype={weight_dtype} "
        f"they have too few digits for steps of learning rate {learning_rate:.3g}. Use weight_dtype=float32 "
        "(precision=bfloat16 keeps passes fast), lora_rank with it or rounding=stochastic without it where memory is "
        "short, or a larger learning_rate"
    )
