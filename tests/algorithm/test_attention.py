"""Both implementations of block attention against a dense mask, in outputs and in gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as flex_module

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
    query, prefix_key, prefix_value, key, value = inputs
    length, first = query.shape[3], key.shape[3] - query.shape[3]
    mask = flex_mask(where, n_prefix=prefix_key.shape[2], length=length, first=first, window=window)
    earlier = [(key[:, :, :, token], value[:, :, :, token]) for token in range(first)]
    now = key[:, :, :, first:], value[:, :, :, first:]
    return flex_block_attention(
        query, prefix_key, prefix_value, *now, mask=mask, scaling=SCALING, softcap=softcap, earlier=earlier
    )


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


@pytest.fixture
def flex_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has the backward pass of the uncompiled kernel on a CPU, too, but refuses it."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)


@pytest.mark.usefixtures("flex_with_gradients")
@pytest.mark.filterwarnings("ignore")  # it is slow, says PyTorch
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
@pytest.mark.parametrize(("L", "K"), [(1, 1), (1, 3), (3, 3), (2, 3)])
def test_flex_attention_equals_a_dense_mask(layout: str, heads: tuple[int, int], L: int, K: int) -> None:
    where = contexts(layout, 2)
    inputs = tensors(where, L=L, K=K, heads=heads, dtype=torch.float64)
    compare(flex(inputs, where), inputs, where)


@pytest.mark.usefixtures("flex_with_gradients")
@pytest.mark.filterwarnings("ignore")  # it is slow, says PyTorch
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [1, 2, 5, 41])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("L", "K"), [(1, 1), (1, 3), (3, 3)])
def test_flex_attention_with_windows_and_bounded_scores_equals_a_dense_mask(
    layout: str, window: int, softcap: float | None, L: int, K: int
) -> None:
    where = contexts(layout, 2)
    inputs = tensors(where, L=L, K=K, heads=(4, 2), dtype=torch.float64)
    compare(flex(inputs, where, window, softcap), inputs, where, window=window, softcap=softcap)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("L", "K"), [(1, 1), (3, 3), (40, 40), (1, 16), (2, 5)])
def test_the_tiles_of_the_flex_mask_miss_nothing_and_whole_ones_are_whole(layout: str, L: int, K: int) -> None:
    where, T = contexts(layout, 12), 40
    S, N = where.end.shape
    mask = flex_mask(where, n_prefix=T, length=L, first=K - L)
    query = [(n, K - L + token) for n in range(N) for token in range(L)]
    key = [(n, token) for token in range(K - L) for n in range(N)] + query
    block, token = torch.tensor(query).T[:, :, None]
    key_block, key_token = torch.tensor(key).T
    own = (key_block == block) & (key_token <= token)
    for s in range(S):
        start, end = (bound[s].repeat_interleave(L)[:, None] for bound in where)
        visible = torch.cat([(torch.arange(T) >= start) & (torch.arange(T) < end), own], dim=1)
        some, whole = (
            tiles(mask.kv_num_blocks, mask.kv_indices, s),
            tiles(mask.full_kv_num_blocks, mask.full_kv_indices, s),
        )
        for i in range(-(-N * L // TILE)):
            for j in range(-(-(T + N * K) // TILE)):
                tile = visible[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE]
                assert bool(tile.any()) <= ((i, j) in some | whole)
                assert bool(tile.all()) or (i, j) not in whole
    assert mask.shape == (S, 1, N * L, T + N * K)


def test_a_tile_of_one_token_of_every_block_meets_one_or_two_tiles_of_every_earlier_token() -> None:
    where = Contexts(torch.zeros(1, 1280, dtype=torch.long), torch.zeros(1, 1280, dtype=torch.long))
    mask = flex_mask(where, n_prefix=256, length=1, first=4)
    assert mask.kv_num_blocks.tolist() == [[[5] * 10]]


@pytest.mark.filterwarnings("ignore")
def test_passes_of_one_model_share_few_compiled_kernels() -> None:
    """Each takes seconds to compile, or more."""
    torch._dynamo.reset()
    counter = CompileCounter()
    attend = torch.compile(flex_module.flex_attention, backend=counter, fullgraph=True)
    for layout in ("ragged", "packed"):  # another number of sequences
        for length, first in [(1, 0), (1, 1), (1, 2), (1, 3), (4, 0)]:  # decoding, embedding
            where = contexts(layout, 30)
            N, K = where.end.shape[1], first + length
            mask = flex_mask(where, n_prefix=40, length=length, first=first)
            query = torch.zeros(len(where.end), 4, N * length, 16)
            key = torch.zeros(len(where.end), 2, 40 + N * K, 16)
            attend(query, key, key, block_mask=mask, scale=1.0, enable_gqa=True)
    assert counter.frame_count <= 5


def tiles(counts: Tensor | None, indices: Tensor | None, s: int) -> set[tuple[int, int]]:
    assert counts is not None
    assert indices is not None
    return {(i, int(j)) for i in range(counts.shape[2]) for j in indices[s, 0, i, : counts[s, 0, i]]}
