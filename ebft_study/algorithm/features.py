"""The feature map phi, computed from hidden states (section 2.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Pooling = Literal["last_token", "mean", "concat"]
Normalization = Literal["per_layer", "joint", "token_per_layer", "token_joint"]


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
    """phi from the hidden states of a completion's tokens, one tensor per layer (section 2.1).

    Pooling reduces the completion's G tokens: `last_token` keeps the state at the last one, `mean` averages,
    `concat` concatenates all G. Normalisation divides by an L2 norm, before or after pooling:

    - `per_layer`: pools, then divides each layer's vector by its own norm (the paper; `|phi|^2` = number of layers).
    - `joint`: pools, then divides the concatenated layers by one norm (`|phi|^2` = 1), so that layers with large
      activations dominate.
    - `token_per_layer`, `token_joint`: the same of every token's states, and then pools. `token_joint` is the authors'
      code. With `mean`, `|phi|^2` is the mean cosine of all pairs of tokens times the above: smaller, the more a
      completion's states differ. With `concat` it is G times the above.

    The two orders differ for `mean` and `concat`, and agree for `last_token`. A zero vector stays zero.

    Args:
        hidden: per layer [..., G, H].

    Returns:
        [..., d] float32 with d = layers * H (times G for `concat`).
    """
    states = [layer.float() for layer in hidden]
    if normalize in ("token_per_layer", "token_joint"):
        states = _normalized(states, jointly=normalize == "token_joint")
        return torch.cat([_pool(layer, pooling) for layer in states], dim=-1)
    pooled = [_pool(layer, pooling) for layer in states]
    return torch.cat(_normalized(pooled, jointly=normalize == "joint"), dim=-1)


def _normalized(layers: list[Tensor], *, jointly: bool) -> list[Tensor]:
    """Layers [..., H], each divided by its own norm, or all by that of their concatenation."""
    if not jointly:
        return [F.normalize(layer, dim=-1) for layer in layers]
    together = F.normalize(torch.cat(layers, dim=-1), dim=-1)
    return list(together.tensor_split(len(layers), dim=-1))


def _pool(states: Tensor, pooling: Pooling) -> Tensor:
    if pooling == "last_token":
        return states[..., -1, :]
    return states.mean(dim=-2) if pooling == "mean" else states.flatten(-2)
