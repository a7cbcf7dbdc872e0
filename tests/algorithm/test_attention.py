"""Both implementations of block attention against a dense mask, in outputs and in gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ebft_study.algorithm import attention
from ebft_study.algorithm.anchors import Contexts, contexts_of, document_positions, find_anchors
from ebft_study.algorithm.attention import block_attention, plan_chunks, prefix_attention, prefix_mask
from ebft_study.algorithm.flex_attention import TILE, flex_block_attention, flex_mask
from tests.references.dense_attention import dense_block_attention

LAYOUTS = {
    "one document": [[0] * 40],
    "ragged": [[0] * 40, [0] * 13 + [-1] * 27, [0] * 3 + [-1] * 37],
    "packed": [[0] * 11 + [1] * 9 + [2] * 20, [0] * 40],
}
SCALING = 0.3


def contexts(layout: str, n_samples: int) -> Contexts:
    documents = torch.tensor(LAYOUTS[layout])
    anchors = find_anchors(documents, completion_length=3, stride=4, first_context_length=2)
    return Contexts(*(bound.repeat_interleave(n_samples, 1) for bound in contexts_of(documents, anchors)))


def tensors(where: Contexts, *, L: int, K: int, heads: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Query, prefix keys and values, block keys and values, in the order of `block_attention`."""
    generator = torch.Generator().manual_seed(0)
    S, N = where.end.shape
    shapes = [(S, heads[0], N, L, 8), *[(S, heads[1], 40, 8)] * 2, *[(S, heads[1], N, K, 8)] * 2]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in drawn]


def chunked(
    inputs: list[Tensor],
    where: Contexts,
    scores_at_once: int = 10**6,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    length, first = inputs[0].shape[3], inputs[3].shape[3] - inputs[0].shape[3]
    rows = inputs[0].shape[1] * length
    chunks = plan_chunks(where, rows=rows, scores_at_once=scores_at_once, window=window, first=first, length=length)
    return block_attention(*inputs, chunks=chunks, scaling=SCALING, window=window, softcap=softcap)


def flex(inputs: list[Tensor], where: Contexts, window: int | None = None, softcap: float | None = None) -> Tensor:
    mask = flex_mask(where, n_prefix=inputs[1].shape[2], length=inputs[0].shape[3], window=window)
    return flex_block_attention(*inputs, mask=mask, scaling=SCALING, softcap=softcap)


def compare(
    ours: Tensor, inputs: list[Tensor], where: Contexts, tolerance: float = 1e-10, **variant: float | None
) -> None:
    expected = dense_block_attention(*inputs, start=where.start, end=where.end, scaling=SCALING, **variant)
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected)
    ours_and_theirs = (torch.autograd.grad(output, inputs, upstream) for output in (ours, expected))
    for gradient, reference in zip(*ours_and_theirs, strict=True):
        torch.testing.assert_close(gradient, reference, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_samples", [1, 3])
@pytest.mark.parametrize(("L", "K"), [(1, 1), (1, 3), (3, 3), (2, 3)])
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (3, 1)])
def test_chunked_attention_equals_a_dense_mask(
    layout: str, n_samples: int, L: int, K: int, heads: tuple[int, int]
) -> None:
    where = contexts(layout, n_samples)
    inputs = tensors(where, L=L, K=K, heads=heads, dtype=torch.float64)
    compare(chunked(inputs, where), inputs, where)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [1, 2, 5, 13, 41])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("L", "K"), [(1, 3), (3, 3), (2, 3)])
@pytest.mark.parametrize("scores_at_once", [200, 10**6])
def test_chunked_attention_with_windows_and_bounded_scores_equals_a_dense_mask(
    layout: str, window: int, softcap: float | None, L: int, K: int, scores_at_once: int
) -> None:
    where = contexts(layout, 2)
    inputs = tensors(where, L=L, K=K, heads=(4, 2), dtype=torch.float64)
    ours = chunked(inputs, where, scores_at_once, window, softcap)
    compare(ours, inputs, where, window=window, softcap=softcap)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 6, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefix_attention_equals_blocks_of_one_token_each(
    layout: str, window: int | None, softcap: float | None
) -> None:
    documents = torch.tensor(LAYOUTS[layout])
    S, T = documents.shape
    drawn = torch.randn(3, S, 4, T, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    query, key, value = drawn[0].requires_grad_(), drawn[1][:, :2].requires_grad_(), drawn[2][:, :2].requires_grad_()
    ours = prefix_attention(query, key, value, mask=prefix_mask(documents, window), scaling=0.3, softcap=softcap)
    # Every token is a block that sees the tokens before it in its document, and itself.
    end = torch.arange(T).expand(S, T)
    start = end - document_positions(documents)
    one_by_one = (query[:, :, :, None], key, value, key[:, :, :, None], value[:, :, :, None])
    expected = dense_block_attention(
        *one_by_one, start=start, end=end, scaling=0.3, window=window, softcap=softcap
    ).squeeze(3)
    real = (documents >= 0)[:, None, :, None]
    torch.testing.assert_close(ours.masked_fill(~real, 0.0), expected.masked_fill(~real, 0.0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scores_at_once", [1, 200, 5000])
def test_chunked_attention_does_not_depend_on_the_chunks(
    layout: str, fused: bool, scores_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "fused_on", lambda device: fused)
    where = contexts(layout, 2)
    inputs = tensors(where, L=2, K=2, heads=(4, 2), dtype=torch.float64)
    compare(chunked(inputs, where, scores_at_once), inputs, where)


@pytest.mark.parametrize("factor", [12, 40, 120])
@pytest.mark.parametrize("L", [1, 3])
@pytest.mark.parametrize("fused", [True, False])
def test_bfloat16_scores_are_not_rounded_before_the_softmax(
    factor: int, L: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the softmax's weights and the output are: as much as at small scores."""
    monkeypatch.setattr(attention, "fused_on", lambda device: fused)
    where = contexts("one document", 2)
    inputs = [tensor.detach() for tensor in tensors(where, L=L, K=3, heads=(4, 2), dtype=torch.bfloat16)]
    inputs[0] = inputs[0] * factor
    exact = dense_block_attention(
        *(tensor.double() for tensor in inputs), start=where.start, end=where.end, scaling=SCALING
    )
    torch.testing.assert_close(chunked(inputs, where).double(), exact, atol=0.02, rtol=0.005)


def test_chunks_hold_every_block_with_a_context_once_and_its_whole_context() -> None:
    where = contexts("packed", 3)
    seen = torch.zeros(where.end.shape, dtype=torch.long)
    for chunk in plan_chunks(where, rows=4, scores_at_once=300):
        seen[chunk.sequences, chunk.blocks] += 1
        used = where.end[chunk.sequences, chunk.blocks] > where.start[chunk.sequences, chunk.blocks]
        assert int(where.start[chunk.sequences, chunk.blocks][used].min()) == chunk.keys.start
        assert int(where.end[chunk.sequences, chunk.blocks].max()) == chunk.keys.stop
    assert torch.equal(seen[where.end > where.start], torch.ones_like(seen[where.end > where.start]))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
@pytest.mark.parametrize("L", [1, 3])
def test_flex_attention_equals_a_dense_mask(layout: str, heads: tuple[int, int], L: int) -> None:
    where = contexts(layout, 2)
    inputs = tensors(where, L=L, K=L, heads=heads, dtype=torch.float32)
    with torch.no_grad():  # gradients need a GPU, and are compared in tests/gpu
        expected = dense_block_attention(*inputs, start=where.start, end=where.end, scaling=SCALING)
        torch.testing.assert_close(flex([t.detach() for t in inputs], where), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [1, 2, 5, 41])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("L", [1, 3])
def test_flex_attention_with_windows_and_bounded_scores_equals_a_dense_mask(
    layout: str, window: int, softcap: float | None, L: int
) -> None:
    where = contexts(layout, 2)
    inputs = tensors(where, L=L, K=L, heads=(4, 2), dtype=torch.float32)
    with torch.no_grad():
        expected = dense_block_attention(
            *inputs, start=where.start, end=where.end, scaling=SCALING, window=window, softcap=softcap
        )
        ours = flex([t.detach() for t in inputs], where, window, softcap)
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [1, 3, 100])
def test_the_tiles_of_the_flex_mask_miss_nothing_and_whole_ones_are_whole(layout: str, length: int) -> None:
    where = contexts(layout, 2)
    S, N = where.end.shape
    T = 40
    mask = flex_mask(where, n_prefix=T, length=length)
    rows, keys = N * length, T + N * length
    query, key = torch.arange(rows)[:, None], torch.arange(keys)[None]
    for s in range(S):
        own = (key >= T) & ((key - T) // length == query // length) & (key - T <= query)
        start, end = (bound[s].repeat_interleave(length)[:, None] for bound in where)
        visible = own | ((key >= start) & (key < end) & (key < T))
        some, whole = (
            tiles(mask.kv_num_blocks, mask.kv_indices, s),
            tiles(mask.full_kv_num_blocks, mask.full_kv_indices, s),
        )
        for i in range(-(-rows // TILE)):
            for j in range(-(-keys // TILE)):
                tile = visible[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE]
                assert not bool(tile.any()) or (i, j) in some | whole
                assert bool(tile.all()) or (i, j) not in whole
    assert mask.shape == (S, 1, rows, keys)


def tiles(counts: Tensor | None, indices: Tensor | None, s: int) -> set[tuple[int, int]]:
    assert counts is not None
    assert indices is not None
    return {(i, int(j)) for i in range(counts.shape[2]) for j in indices[s, 0, i, : counts[s, 0, i]]}
