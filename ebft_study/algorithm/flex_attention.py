"""Block attention as one fused kernel: PyTorch's FlexAttention with a block-sparse mask.

The mask is described by two numbers per completion block and a rule; what is stored is one entry per tile of
`TILE x TILE` scores. Tiles without any visible key are skipped, so the work is that of the contexts and own blocks.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ebft_study.algorithm.anchors import Contexts
from ebft_study.algorithm.attention import first_visible

TILE = 128


def flex_mask(contexts: Contexts, *, n_prefix: int, length: int, window: int | None = None) -> BlockMask:
    """Mask of N blocks of `length` (L) queries over T prefix keys followed by the N * L keys of the blocks.

    Built once per pass and used by all its layers of that window; nothing of size (N L) x (T + N L) is ever stored.
    """
    start = first_visible(contexts, window=window, first=0, length=length).expand(-1, -1, length).flatten(1)
    end, reach = contexts.end.repeat_interleave(length, dim=1), length if window is None else window

    def visible(s: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = key - n_prefix
        in_context = (key < n_prefix) & (key >= start[s, query]) & (key < end[s, query])
        in_block = (own >= 0) & (own // length == query // length) & (own <= query) & (own > query - reach)
        return in_context | in_block

    some, whole = _tiles(start, end, n_prefix, length)
    counts, indices = _ordered(some & ~whole)
    full_counts, full_indices = _ordered(whole)
    n_queries = start.shape[1]
    return BlockMask.from_kv_blocks(
        counts,
        indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=TILE,
        mask_mod=visible,
        seq_lengths=(n_queries, n_prefix + n_queries),
    )


def _tiles(start: Tensor, end: Tensor, n_prefix: int, length: int) -> tuple[Tensor, Tensor]:
    """Tiles that hold some visible key, and tiles of which every key is visible: [S, query tiles, key tiles] bool."""
    n_queries = start.shape[1]
    first_query = torch.arange(0, n_queries, TILE, device=start.device)
    last_query = (first_query + TILE).clamp(max=n_queries) - 1
    pad = -n_queries % TILE

    def by_tile(values: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(values, (0, pad), value=fill).view(len(values), -1, TILE)

    huge = n_prefix + 1
    earliest, latest = by_tile(start, huge).amin(-1), by_tile(start, -1).amax(-1)
    shortest, longest = by_tile(end, huge).amin(-1), by_tile(end, -1).amax(-1)
    low = torch.arange(0, n_prefix + n_queries, TILE, device=start.device)
    high = low + TILE
    in_prefix = (low < longest[..., None]) & (high > earliest[..., None])
    whole = (low >= latest[..., None]) & (high <= shortest[..., None])
    # Keys of the blocks that a tile's queries belong to.
    own_low = n_prefix + first_query // length * length
    own_high = n_prefix + (last_query // length + 1) * length
    own = (low < own_high[:, None]) & (high > own_low[:, None])
    return in_prefix | own, whole


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    counts = tiles.sum(dim=-1, dtype=torch.int32)[:, None]
    indices = torch.argsort(tiles.to(torch.int8), dim=-1, descending=True, stable=True)
    return counts, indices.to(torch.int32)[:, None].contiguous()


@functools.cache
def _score_rule(softcap: float | None) -> Any:
    """One function per value, so that all layers share a kernel."""
    if softcap is None:
        return None

    def capped(score: Tensor, _s: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@functools.cache
def _kernel() -> Any:
    # Compiled once; where shapes vary from batch to batch, one kernel comes to serve them all.
    return torch.compile(flex_attention)


def flex_block_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    block_key: Tensor,
    block_value: Tensor,
    *,
    mask: BlockMask,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """The same as `attention.block_attention` with K = L, over a mask from `flex_mask`.

    Args:
        query: [S, Hq, N, L, D]. prefix_key, prefix_value: [S, Hk, T, D]. block_key, block_value: [S, Hk, N, L, D].

    Returns:
        [S, Hq, N, L, D] in the dtype of `block_value`. On a CPU the kernel is not compiled: correct, and slow.
    """
    key = torch.cat([prefix_key, block_key.flatten(2, 3)], dim=2).to(block_value.dtype)
    value = torch.cat([prefix_value, block_value.flatten(2, 3)], dim=2)
    attend: Any = _kernel() if query.is_cuda else flex_attention
    output: Tensor = attend(
        query.flatten(2, 3).to(block_value.dtype),
        key,
        value,
        score_mod=_score_rule(softcap),
        block_mask=mask,
        scale=scaling,
        enable_gqa=True,
    )
    blocks: Tensor = output.unflatten(2, query.shape[2:4])  # type: ignore[no-untyped-call]
    return blocks
