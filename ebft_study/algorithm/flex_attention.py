"""Block attention as one fused kernel: PyTorch's FlexAttention with a block-sparse mask.

The mask is described by two numbers per completion block and a rule; what is stored is one entry per tile of
`TILE x TILE` scores. Tiles without any visible key are skipped, so the work is that of the contexts and own blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ebft_study.algorithm.anchors import Contexts
from ebft_study.algorithm.attention import first_visible

TILE = 128


def flex_mask(
    contexts: Contexts, *, n_prefix: int, length: int, first: int = 0, window: int | None = None
) -> BlockMask:
    """Mask of N blocks of `length` (L) queries over the keys of `flex_block_attention`.

    Built once per pass and used by all its layers of that window; nothing of size (N L) x (T + N L) is ever stored.

    Args:
        first: position in its block of a block's first query, which is the number of its earlier tokens.
    """
    start = first_visible(contexts, window=window, first=first, length=length).expand(-1, -1, length).flatten(1)
    end = contexts.end.repeat_interleave(length, dim=1)
    # The keys of the blocks are numbered block by block; a query sees some of those before its own, and its own.
    device, size = end.device, first + length
    block = torch.arange(contexts.end.shape[1], device=device) * size
    latest = (block[:, None] + torch.arange(first, size, device=device)).flatten()
    earliest = block.repeat_interleave(length)
    earliest = earliest if window is None else torch.maximum(earliest, latest - window + 1)
    earlier = (block + torch.arange(first, device=device)[:, None]).flatten()
    number = torch.cat([earlier.new_full((n_prefix,), -1), earlier, latest])

    # It reads tensors alone: a number would become part of the kernel, and every pass would need another one.
    def visible(s: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_context = (key >= start[s, query]) & (key < end[s, query])
        in_block = (number[key] >= earliest[query]) & (number[key] <= latest[query])
        return in_context | in_block

    some, whole = _prefix_tiles(start, end, len(number))
    counts, indices = _ordered((some | _own_tiles(number, len(latest), length, size)) & ~whole)
    full_counts, full_indices = _ordered(whole)
    return BlockMask.from_kv_blocks(
        counts,
        indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=TILE,
        mask_mod=visible,
        seq_lengths=(len(latest), len(number)),
    )


def _prefix_tiles(start: Tensor, end: Tensor, n_keys: int) -> tuple[Tensor, Tensor]:
    """Tiles with some key of some context, and tiles of keys of all contexts: [S, query tiles, key tiles] bool."""
    pad = -start.shape[1] % TILE

    def by_tile(values: Tensor, fill: int) -> Tensor:
        return F.pad(values, (0, pad), value=fill).view(len(values), -1, TILE)

    earliest, latest = by_tile(start, n_keys).amin(-1), by_tile(start, -1).amax(-1)
    shortest, longest = by_tile(end, n_keys).amin(-1), by_tile(end, -1).amax(-1)
    low = torch.arange(0, n_keys, TILE, device=start.device)
    high = low + TILE
    some = (low < longest[..., None]) & (high > earliest[..., None])
    return some, (low >= latest[..., None]) & (high <= shortest[..., None])


def _own_tiles(number: Tensor, n_queries: int, length: int, size: int) -> Tensor:
    """Tiles with some key of a block that a tile's queries belong to, [query tiles, key tiles] bool.

    Args:
        number: of every key, `size` to a block.
    """
    first_query = torch.arange(0, n_queries, TILE, device=number.device)
    last_query = (first_query + TILE).clamp(max=n_queries) - 1
    low, high = first_query // length * size, (last_query // length + 1) * size
    own = (number >= low[:, None]) & (number < high[:, None])
    tiles: Tensor = F.pad(own, (0, -len(number) % TILE)).unflatten(1, (-1, TILE)).any(-1)  # type: ignore[no-untyped-call]
    return tiles


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
    # Compiled once; where shapes vary from batch to batch, one kernel comes to serve them all. Those with and without
    # gradients, and of every network, count towards one limit. Uncompiled it would hold all scores: rather an error.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    return torch.compile(flex_attention, fullgraph=True)


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
    earlier: Sequence[tuple[Tensor, Tensor]] = (),
) -> Tensor:
    """The same as `attention.block_attention`, over a mask from `flex_mask`.

    Args:
        query: [S, Hq, N, L, D]. prefix_key, prefix_value: [S, Hk, T, D]. block_key, block_value: [S, Hk, N, L, D].
        earlier: keys and values [S, Hk, N, D] of the tokens of the blocks before these L ones, one by one.

    Returns:
        [S, Hq, N, L, D] in the dtype of `block_value`. On a CPU the kernel is not compiled: correct, and slow.
    """
    own = block_key.flatten(2, 3), block_value.flatten(2, 3)
    keys, values = zip((prefix_key, prefix_value), *earlier, own, strict=True)
    attend: Any = _kernel() if query.is_cuda else flex_attention
    output: Tensor = attend(
        query.flatten(2, 3).to(block_value.dtype),
        torch.cat(keys, dim=2).to(block_value.dtype),
        torch.cat(values, dim=2),
        score_mod=_score_rule(softcap),
        block_mask=mask,
        scale=scaling,
        enable_gqa=True,
    )
    return output.unflatten(2, query.shape[2:4])  # type: ignore[no-any-return,no-untyped-call]
