"""The feature map phi, computed from hidden states (section 2.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Pooling = Literal["last_token", "mean", "concat"]
Normalization = Literal["per_layer", "joint"]


def layer_indices(depths: Sequence[float], n_layers: int) -> list[int]:
    """Hidden-state indices of relative depths: `clamp(floor(p L), 1, L)`; index 0 would be the embeddings.

    Distinct depths may fall on one layer of a shallow network; the layer is then listed, and counted, once.

    Raises:
        ValueError: a depth outside (0, 1].
    """
    for depth in depths:
        if not 0.0 < depth <= 1.0:
            raise ValueError(f"depths must lie in (0, 1], but got {depth}")
    # The small term undoes binary rounding: floor(0.7 * 10) must be 7.
    return sorted({min(max(math.floor(depth * n_layers + 1e-9), 1), n_layers) for depth in depths})


def feature_map(hidden: Sequence[Tensor], *, pooling: Pooling, normalize: Normalization) -> Tensor:
    """phi from the hidden states of a completion's tokens, one tensor per layer.

    Pooling reduces the completion's G tokens: `last_token` keeps the state at the last one, `mean` averages,
    `concat` concatenates all G. Then `per_layer` divides each layer's vector by its own L2 norm and concatenates
    (the paper; `|phi|^2` = number of layers), while `joint` concatenates and divides once (`|phi|^2` = 1), so that
    layers with large activations dominate. A zero vector stays zero.

    Args:
        hidden: per layer [..., G, H].

    Returns:
        [..., d] float32 with d = layers * H (times G for `concat`).
    """
    pooled = [_pool(states.float(), pooling) for states in hidden]
    if normalize == "per_layer":
        return torch.cat([F.normalize(layer, dim=-1) for layer in pooled], dim=-1)
    return F.normalize(torch.cat(pooled, dim=-1), dim=-1)


def _pool(states: Tensor, pooling: Pooling) -> Tensor:
    if pooling == "last_token":
        return states[..., -1, :]
    return states.mean(dim=-2) if pooling == "mean" else states.flatten(-2)
