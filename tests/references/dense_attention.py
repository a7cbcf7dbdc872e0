"""Block attention with everything written out: one dense mask over all keys, one softmax per query."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dense_block_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    block_key: Tensor,
    block_value: Tensor,
    *,
    start: Tensor,
    end: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """[S, Hq, N, L, D] queries over [S, Hk, T, D] prefix keys and [S, Hk, N, K, D] block keys, query by query."""
    S, Hq, N, L, D = query.shape
    T, K = prefix_key.shape[2], block_key.shape[3]
    head = torch.arange(Hq) // (Hq // prefix_key.shape[1])
    output = []
    for s in range(S):
        keys = torch.cat([prefix_key[s, head], block_key[s, head].flatten(1, 2)], dim=1)
        values = torch.cat([prefix_value[s, head], block_value[s, head].flatten(1, 2)], dim=1)
        visible = torch.zeros(N * L, T + N * K, dtype=torch.bool)
        for b in range(N):
            for t in range(L):
                # The query's own sequence: its context, then its block up to itself; a window is the end of it.
                own = [*range(int(start[s, b]), int(end[s, b])), *range(T + b * K, T + b * K + K - L + t + 1)]
                visible[b * L + t, own if window is None else own[-window:]] = True
        scores = query[s].reshape(Hq, N * L, D) @ keys.transpose(-1, -2) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
        output.append((weights @ values).view(Hq, N, L, D))
    return torch.stack(output)
