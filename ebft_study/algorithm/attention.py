"""Attention over one shared prefix and many short blocks that never see each other (appendix F, Figure 10).

Letters beyond the package's: N = B * n blocks per sequence (anchor-major), L queries per block,
K keys per block, Hq query heads, Hk key/value heads (Hq is a multiple of Hk), D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def prefix_mask(document_ids: Tensor) -> Tensor | None:
    """Mask for `prefix_attention`, [S, 1, T, T] bool: causal and within one document.

    None when no row holds two documents. Padding (-1) must only stand at the end of a row, where causality already
    hides it from every real token.
    """
    if bool((document_ids <= 0).all()):
        return None
    return (document_ids[:, :, None] == document_ids[:, None, :]).tril()[:, None]


def prefix_attention(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention among the prefix tokens: [S, Hq, T, D] x [S, Hk, T, D] -> [S, Hq, T, D]; causal if `mask` is None."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )


def block_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    block_key: Tensor,
    block_value: Tensor,
    *,
    context: Tensor,
    scaling: float,
) -> Tensor:
    """Attention of completion tokens to their own context and to their own block, in one softmax.

    Query `l` of a block stands at block position `K - L + l` and attends to the block's keys up to and including
    itself, and to the prefix keys that `context` allows. No block sees another one, so the cost is that of the
    prefix plus the own block, never that of all blocks.

    Args:
        query: [S, Hq, N, L, D], the last L tokens of each of N = B * n blocks, anchor-major.
        prefix_key, prefix_value: [S, Hk, T, D], shared by all n samples of all anchors.
        block_key, block_value: [S, Hk, N, K, D] with K >= L.
        context: [S, B, T] bool; a row without any True (a padded anchor) attends to its own block only.
        scaling: factor on the inner products, normally D ** -0.5.

    Returns:
        [S, Hq, N, L, D] in the dtype of `query`; softmax in float32 or wider.
    """
    S, Hq, N, L, D = query.shape
    Hk, T, K = prefix_key.shape[1], prefix_key.shape[2], block_key.shape[3]
    B, R = context.shape[1], Hq // Hk
    # Scaling the queries touches far fewer numbers than scaling the scores.
    grouped = (query * scaling).view(S, Hk, R, N, L, D)
    to_prefix = (grouped.reshape(S, Hk, R * N * L, D) @ prefix_key.transpose(-1, -2)).view(S, Hk, R, B, N // B, L, T)
    hidden = ~context[:, None, None, :, None, None, :]
    to_prefix = to_prefix.masked_fill(hidden, float("-inf")).view(S, Hk, R, N, L, T)
    # [S, Hk, N, R * L, D] x [S, Hk, N, D, K]: every block meets its own keys only.
    own_query = grouped.transpose(2, 3).reshape(S, Hk, N, R * L, D)
    to_block = (own_query @ block_key.transpose(-1, -2)).view(S, Hk, N, R, L, K).transpose(2, 3)
    future = torch.ones(L, K, dtype=torch.bool, device=query.device).triu(K - L + 1)
    to_block = to_block.masked_fill(future, float("-inf"))
    scores = torch.cat([to_prefix, to_block], dim=-1)
    softmax_dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=softmax_dtype).to(prefix_value.dtype)
    from_prefix = weights[..., :T].reshape(S, Hk, R * N * L, T) @ prefix_value
    own_weights = weights[..., T:].transpose(2, 3).reshape(S, Hk, N, R * L, K)
    from_block = (own_weights @ block_value).view(S, Hk, N, R, L, D).transpose(2, 3)
    return (from_prefix.view(S, Hk, R, N, L, D) + from_block).reshape(S, Hq, N, L, D)
