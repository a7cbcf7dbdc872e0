"""Attention over one shared prefix and many short blocks that never see each other (appendix F, Figure 10).

Letters beyond the package's: N = B * n blocks per sequence (anchor-major), L queries per block, K keys per block, Hq
query heads, Hk key/value heads (Hq is a multiple of Hk, R = Hq / Hk), D head size, W keys of the prefix in one chunk.

Both parts know two variants of attention. A *sliding window* of w tokens: a query sees itself and the w - 1 tokens
before it, counted through context and block as if they were one sequence. *Soft-capping*: scores s become
`c tanh(s / c)` before the mask.

Two implementations of `block_attention` agree in outputs and gradients: `chunked` (here: matrix products, any device)
and `flex` (`flex_attention.py`: one fused kernel on a GPU). Neither holds anything of size (T + n B G)^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ebft_study.algorithm.anchors import Contexts


def prefix_mask(document_ids: Tensor, window: int | None = None) -> Tensor | None:
    """Mask for `prefix_attention`, [S or 1, 1, T, T] bool: causal, within one document and within the window.

    None when no row holds two documents and no window is shorter than a row. Padding (-1) must only be at the end of a
    row, where causality already hides it from every real token.
    """
    T = document_ids.shape[1]
    mask = None
    if not bool((document_ids <= 0).all()):
        mask = (document_ids[:, :, None] == document_ids[:, None, :]).tril()[:, None]
    if window is not None and window < T:
        band = torch.ones(1, 1, T, T, dtype=torch.bool, device=document_ids.device).tril().triu(1 - window)
        mask = band if mask is None else mask & band
    return mask


def prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """Attention among the prefix tokens: [S, Hq, T, D] x [S, Hk, T, D] -> [S, Hq, T, D]; causal if `mask` is None.

    With `softcap` all T^2 scores of a layer are in memory, which no fused kernel of PyTorch for it can avoid.
    """
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
    T, groups = query.shape[2], query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = _product(query.to(value.dtype), key.to(value.dtype).transpose(-1, -2)) * scaling
    capped = _capped(scores, softcap)
    visible = torch.ones(T, T, dtype=torch.bool, device=query.device).tril() if mask is None else mask
    return capped.masked_fill(~visible, NOTHING).softmax(dim=-1).to(value.dtype) @ value


NOTHING = -1e30
"""Score of what must not be seen. A row with nothing to see then weighs nothing; infinities would give NaN."""

CHUNKS = {"cpu": 6, "cuda": 1}
"""Into how many chunks a sequence is cut at least: more waste less computation, fewer launch fewer kernels."""
SMALL_MASK = 2**18
"""Entries of a mask worth keeping."""

# PyTorch's fused attention for CPUs, which `scaled_dot_product_attention` calls: it also returns log-normalisers, and
# its backward pass takes those of the joint softmax, which is why a softmax can be merged from parts.
_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def fused_on(device: torch.device) -> bool:
    """Whether chunks go through the fused kernels above; elsewhere they are matrix products."""
    return device.type == "cpu"


@dataclass
class Chunk:
    """A few neighbouring blocks of a few sequences, and the span of prefix keys that their contexts cover."""

    sequences: slice
    blocks: slice
    keys: slice
    partial: slice
    """Part of the span, counted from its start, that some block may see and another may not."""
    hidden: Tensor | None
    """[s, c, q, W'] bool over `partial`: True where a block's context (q = 1) or the window of each of its queries
    (q = L) does not reach; None if nothing is hidden."""
    _mask: Tensor | None = None

    def additive_mask(self, query: Tensor, key: Tensor) -> Tensor | None:
        """[s, 1, c * M, W] for the fused kernel: 0 or NOTHING. A small one is kept for the next layer."""
        if self.hidden is None:
            return None
        shape = (self.hidden.shape[0], 1, query.shape[2], key.shape[2])
        if self._mask is not None and self._mask.shape == shape and self._mask.dtype == query.dtype:
            return self._mask
        mask = query.new_zeros(shape)
        _hide(mask, self)
        self._mask = mask if mask.numel() <= SMALL_MASK else None
        return mask


def first_visible(contexts: Contexts, *, window: int | None, first: int, length: int) -> Tensor:
    """First position of the prefix that each query of each block may see, [S, N, 1], or [S, N, L] with a window.

    Args:
        first: position in its block of a block's first query. length: L, queries per block.
    """
    start, end = contexts
    if window is None:
        return start[..., None]
    position = torch.arange(first, first + length, device=end.device)
    return torch.maximum(start[..., None], end[..., None] + position + 1 - window)


def plan_chunks(
    contexts: Contexts, *, rows: int, scores_at_once: int, window: int | None = None, first: int = 0, length: int = 1
) -> list[Chunk]:
    """Cut all blocks into chunks of similar contexts, so that little computation is wasted and scores stay small.

    With anchors in order, a chunk's longest context exceeds its shortest by a part of the sequence only. The
    chunks depend on the contexts alone: a plan is made once per pass and serves all layers.

    Args:
        rows: queries per block, key/value heads and grouped query heads included (Hk * R * L).
        scores_at_once: number of scores in memory at a time, unless one block alone needs more.
        window, first, length: see `first_visible`; the last two matter with a window only.
    """
    visible = first_visible(contexts, window=window, first=first, length=length)
    start, end = visible.cpu(), contexts.end.cpu()
    S, N = end.shape
    if N == 0:
        return []
    widest = max(int(end.max() - start.min()), 1)
    blocks = max(1, min(scores_at_once // (rows * widest), -(-N // CHUNKS[contexts.end.device.type])))
    sequences = max(1, min(S, scores_at_once // (rows * widest * blocks)))
    return [
        chunk
        for s in range(0, S, sequences)
        for b in range(0, N, blocks)
        if (
            chunk := _chunk(
                visible, contexts.end, start, end, slice(s, min(s + sequences, S)), slice(b, min(b + blocks, N))
            )
        )
    ]


def _chunk(visible: Tensor, ends: Tensor, start: Tensor, end: Tensor, sequences: slice, blocks: slice) -> Chunk | None:
    """A chunk; `start` and `end` are `visible` and `ends` on the CPU."""
    first, last = start[sequences, blocks], end[sequences, blocks][..., None]
    used = last > first
    if not bool(used.any()):
        return None
    low, high = int(first[used].min()), int(last.max())
    common = slice(int(first.max()), int(last.min()))
    # Where all contexts begin at one position, only the end of the span differs between blocks.
    partial = slice(0 if common.start > low else max(common.stop - low, 0), high - low)
    if partial.start >= partial.stop:
        return Chunk(sequences, blocks, slice(low, high), partial, None)
    index = torch.arange(low + partial.start, high, device=ends.device)
    hidden = (index < visible[sequences, blocks, :, None]) | (index >= ends[sequences, blocks, None, None])
    return Chunk(sequences, blocks, slice(low, high), partial, hidden)


def block_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    block_key: Tensor,
    block_value: Tensor,
    *,
    chunks: Sequence[Chunk],
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of completion tokens to their own context and to their own block, in one softmax.

    Query `l` of a block is at block position `K - L + l` and attends to the block's keys up to and including
    itself, and to the prefix keys of its context, as far as the window reaches. No block sees another one, so the
    cost is that of the context plus the own block, never that of all blocks. Scores exist for one chunk at a time and
    are computed again in the backward pass; only outputs and log-normalisers are kept.

    Args:
        query: [S, Hq, N, L, D], the last L tokens of each of N blocks.
        prefix_key, prefix_value: [S, Hk, T, D], shared by all blocks of a sequence.
        block_key, block_value: [S, Hk, N, K, D] with K >= L.
        chunks: from `plan_chunks`, of the same window; blocks that no chunk holds see nothing of their context.
        scaling: factor on the inner products, usually D ** -0.5.
        window: tokens that a query sees, itself included; None for all. softcap: bound of the scores, None for none.

    Returns:
        [S, Hq, N, L, D] in the dtype of `block_value`; softmax in float32 or wider. Differentiable once.
    """
    dtype = block_value.dtype
    inputs = (tensor.to(dtype) for tensor in (query, prefix_key, prefix_value, block_key))
    output: Tensor = _ChunkedAttention.apply(*inputs, block_value, chunks, scaling, window, softcap)  # type: ignore[no-untyped-call]
    return output


class _ChunkedAttention(torch.autograd.Function):
    """Partial softmaxes over prefix and block, merged by their log-normalisers, as in FlashAttention.

    With the `lse` of both parts, each part's probabilities are `exp(score - lse)`, so the backward pass
    treats the parts one after another without ever joining them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        block_key: Tensor,
        block_value: Tensor,
        chunks: Sequence[Chunk],
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            grouped, how = _group(query, block_key), (scaling, softcap)
            output, lse = _attend(grouped, block_key, block_value, _hidden_in_block(query, block_key, window), *how)
            for chunk in chunks:
                _attend_to_prefix(grouped, prefix_key, prefix_value, chunk, *how, output, lse)
        ctx.save_for_backward(grouped, prefix_key, prefix_value, block_key, block_value, output, lse)
        ctx.chunks, ctx.heads, ctx.length = chunks, query.shape[1], query.shape[3]
        ctx.window, ctx.how = window, how
        return _ungroup(output, query.shape[1], query.shape[3])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grouped, prefix_key, prefix_value, block_key, block_value, output, lse = ctx.saved_tensors
        with torch.autocast(grouped.device.type, enabled=False):
            gradient = _group(upstream.to(output.dtype), block_key)
            delta = (gradient * output).sum(dim=-1, dtype=lse.dtype)
            hidden = _hidden_in_block(upstream, block_key, ctx.window)
            d_grouped, d_block_key, d_block_value = _attend_backward(
                grouped, block_key, block_value, gradient, output, lse, delta, hidden, *ctx.how
            )
            d_prefix_key, d_prefix_value = torch.zeros_like(prefix_key), torch.zeros_like(prefix_value)
            for chunk in ctx.chunks:
                s, keys = chunk.sequences, chunk.keys
                q, dy, y, z, d = (_rows(tensor, chunk) for tensor in (grouped, gradient, output, lse, delta))
                k, v = prefix_key[s, :, keys], prefix_value[s, :, keys]
                dq, dk, dv = _attend_backward(q, k, v, dy, y, z, d, chunk, *ctx.how)
                d_grouped[s, :, chunk.blocks] += dq.view_as(d_grouped[s, :, chunk.blocks])
                d_prefix_key[s, :, keys] += dk
                d_prefix_value[s, :, keys] += dv
            d_query = _ungroup(d_grouped, ctx.heads, ctx.length)
        return d_query, d_prefix_key, d_prefix_value, d_block_key, d_block_value, None, None, None, None


def _group(states: Tensor, key: Tensor) -> Tensor:
    """[S, Hq, N, L, D] -> [S, Hk, N, R * L, D]: all queries that meet the same keys, adjacent."""
    S, Hq, N, L, D = states.shape
    Hk = key.shape[1]
    return states.reshape(S, Hk, Hq // Hk, N, L, D).transpose(2, 3).reshape(S, Hk, N, Hq // Hk * L, D)


def _ungroup(states: Tensor, heads: int, length: int) -> Tensor:
    S, Hk, N, _, D = states.shape
    return states.view(S, Hk, N, heads // Hk, length, D).transpose(2, 3).reshape(S, heads, N, length, D)


def _hidden_in_block(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """[R * L, K] bool: keys of the own block that come after the query, or before its window."""
    L, K = query.shape[3], key.shape[3]
    every = torch.ones(L, K, dtype=torch.bool, device=query.device)
    hidden = every.triu(K - L + 1) if window is None else every.triu(K - L + 1) | every.tril(K - L - window)
    return hidden.repeat(query.shape[1] // key.shape[1], 1)


def _rows(tensor: Tensor, chunk: Chunk) -> Tensor:
    """A chunk's queries of all its blocks as rows: [S, Hk, N, M(, D)] -> [s, Hk, c * M(, D)]."""
    return tensor[chunk.sequences, :, chunk.blocks].flatten(2, 3)


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in float32 or wider. Rounded to bfloat16, scores of 200 are off by up to 0.5, and the softmax by half."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:  # sums are float32 in any case; they need not be rounded
        flat: Tensor = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
        return flat.view(*a.shape[:-1], b.shape[-1])
    return a.float() @ b.float()


def _scores(query: Tensor, key: Tensor, hidden: Tensor | Chunk, scaling: float, softcap: float | None) -> Tensor:
    scores = _product(query, key.transpose(-1, -2)).mul_(scaling)
    if softcap is not None:
        scores = _capped(scores, softcap)
    if isinstance(hidden, Tensor):
        scores.masked_fill_(hidden, NOTHING)
    else:
        _hide(scores, hidden)
    return scores


def _hide(scores: Tensor, chunk: Chunk) -> None:
    """Set the scores [s, ., c * M, W] that a chunk's blocks may not see to NOTHING, in place."""
    if chunk.hidden is not None:
        s, c, q, W = chunk.hidden.shape
        of_blocks = scores[..., chunk.partial].unflatten(2, (c, -1, q))
        of_blocks.masked_fill_(chunk.hidden.view(s, 1, c, 1, q, W), NOTHING)


def _is_fused(key: Tensor, value: Tensor, hidden: Tensor | Chunk, softcap: float | None) -> bool:
    plain = softcap is None and key.shape[-1] == value.shape[-1]
    return isinstance(hidden, Chunk) and plain and fused_on(key.device)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | Chunk, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Outputs of a softmax over these keys alone, and its log-normaliser."""
    if isinstance(hidden, Chunk) and _is_fused(key, value, hidden, softcap):
        return _fused(query, key, value, attn_mask=hidden.additive_mask(query, key), scale=scaling)  # type: ignore[no-any-return]
    scores = _scores(query, key, hidden, scaling, softcap)
    largest = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(largest).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    output = (weights.to(value.dtype) @ value).to(scores.dtype) / total
    return output.to(value.dtype), (largest + total.log())[..., 0]


def _attend_to_prefix(
    grouped: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    chunk: Chunk,
    scaling: float,
    softcap: float | None,
    output: Tensor,
    lse: Tensor,
) -> None:
    """Merge the attention of one chunk's blocks to their contexts into `output` and `lse`, in place."""
    s, b, keys = chunk.sequences, chunk.blocks, chunk.keys
    states = _rows(grouped, chunk), prefix_key[s, :, keys], prefix_value[s, :, keys]
    part, part_lse = _attend(*states, chunk, scaling, softcap)
    old, old_lse = output[s, :, b], lse[s, :, b]
    # The weight of the part in the joint softmax is exp(part_lse - logaddexp(old_lse, part_lse)).
    weight = torch.sigmoid(part_lse.view_as(old_lse) - old_lse)
    old.lerp_(part.view_as(old), weight[..., None].to(old.dtype))
    torch.logaddexp(old_lse, part_lse.view_as(old_lse), out=old_lse)


def _attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    output: Tensor,
    lse: Tensor,
    delta: Tensor,
    hidden: Tensor | Chunk,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values.

    `output`, `gradient` (of the output) and `lse` are those of the joint softmax; `delta` is the inner product of the
    first two.
    """
    if isinstance(hidden, Chunk) and _is_fused(key, value, hidden, softcap):
        mask = hidden.additive_mask(query, key)
        arguments = (gradient, query, key, value, output, lse, 0.0, False)
        return _fused_backward(*arguments, attn_mask=mask, scale=scaling)  # type: ignore[no-any-return]
    scores = _scores(query, key, hidden, scaling, softcap)
    # d(c tanh(s / c)) / ds; 0 where nothing is seen.
    slope = None if softcap is None else 1 - (scores.clamp(min=-softcap) / softcap).square()
    weights = scores.sub_(lse[..., None]).exp_()
    d_value = weights.to(value.dtype).transpose(-1, -2) @ gradient
    d_scores = _product(gradient, value.transpose(-1, -2)).sub_(delta[..., None]).mul_(weights)
    d_scores = (d_scores if slope is None else d_scores.mul_(slope)).mul_(scaling).to(value.dtype)
    return d_scores @ key, d_scores.transpose(-1, -2) @ query, d_value
