"""The CUDA path against the CPU path. Shown as skipped on machines without a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from ebft_study.algorithm.anchors import Contexts, contexts_of, find_anchors
from ebft_study.algorithm.attention import block_attention, plan_chunks
from ebft_study.algorithm.flex_attention import flex_block_attention, flex_mask
from ebft_study.algorithm.rewards import feature_matching_rewards
from ebft_study.features.local import LocalFeatures
from ebft_study.networks.blocks import Backend, completion_log_probs, run_prefix
from ebft_study.rollouts.strided import StridedRollouts
from tests.references.dense_attention import dense_block_attention
from tests.small_models import ARCHITECTURES, small_batch, small_model

# Advice of a compiler (on TF32, on few processors) is no failure.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
LAYOUTS = [[0] * 24, [0] * 9 + [1] * 15, [0] * 17 + [-1] * 7]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("backend", ["chunked", "flex"])
def test_a_step_on_the_gpu_agrees_with_the_cpu(architecture: str, backend: Backend) -> None:
    results = [step("cpu", architecture, "chunked"), step("cuda", architecture, backend)]
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, atol=1e-4, rtol=1e-3)


def step(device: str, architecture: str, backend: Backend) -> list[Tensor]:
    """Completions, their log-probabilities sampled and scored again, rewards, and the gradients of both."""
    model = small_model(architecture, head_dim=16).to(device)  # FlexAttention takes no smaller heads
    features = LocalFeatures(
        copy.deepcopy(model), depths=(0.25, 0.5, 0.75), pooling="last_token", normalize="per_layer", backend=backend
    )
    batch = small_batch(LAYOUTS).to(device)
    anchors = find_anchors(batch.document_ids, completion_length=4, stride=4, first_context_length=4)
    noise = torch.rand(*anchors.positions.shape, 4, 4, generator=torch.Generator().manual_seed(0))
    rollouts = StridedRollouts(backend).sample(model, batch, anchors, noise=noise, temperature=0.8)
    embedded = features.embed(batch, anchors, rollouts.completions)[0]
    rewards = feature_matching_rewards(embedded.phi, embedded.psi, alpha=1.0, whitening="variant_i")
    prefix = run_prefix(model, batch.tokens, batch.document_ids)
    scored = completion_log_probs(model, prefix, anchors, rollouts.completions, temperature=0.8, backend=backend)
    gradients = []
    for log_probs in (rollouts.log_probs, scored):
        (gradient,) = torch.autograd.grad(log_probs[anchors.valid].sum(), model.get_input_embeddings().weight)
        gradients.append(gradient)
    found = [rollouts.completions, rollouts.log_probs, scored, rewards.reward, *gradients]
    return [tensor.detach().cpu() for tensor in found]


@pytest.mark.parametrize("backend", ["chunked", "flex"])
@pytest.mark.parametrize(("length", "first"), [(1, 0), (7, 0), (1, 4)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (40, None), (5, 2.0)])
def test_attention_on_the_gpu_equals_a_dense_mask(
    backend: Backend, length: int, first: int, window: int | None, softcap: float | None
) -> None:
    documents = torch.tensor([[0] * 300, [0] * 100 + [1] * 150 + [-1] * 50])
    anchors = find_anchors(documents, completion_length=8, stride=8, first_context_length=8)
    where = Contexts(*(bound.repeat_interleave(4, 1) for bound in contexts_of(documents, anchors)))
    S, N = where.end.shape
    shapes = [(S, 4, N, length, 64), *[(S, 2, 300, 64)] * 2, *[(S, 2, N, first + length, 64)] * 2]
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_() for shape in shapes]
    expected = dense_block_attention(
        *inputs, start=where.start, end=where.end, scaling=0.125, window=window, softcap=softcap
    )
    gradients = torch.autograd.grad(expected.square().sum(), inputs)
    there = Contexts(*(bound.cuda() for bound in where))
    moved = [tensor.detach().cuda().requires_grad_() for tensor in inputs]
    if backend == "flex":
        mask = flex_mask(there, n_prefix=300, length=length, first=first, window=window)
        *others, key, value = moved
        earlier = [(key[:, :, :, token], value[:, :, :, token]) for token in range(first)]
        now = key[:, :, :, first:], value[:, :, :, first:]
        output = flex_block_attention(*others, *now, mask=mask, scaling=0.125, softcap=softcap, earlier=earlier)
    else:
        rows = 4 * length
        chunks = plan_chunks(there, rows=rows, scores_at_once=10**6, window=window, first=first, length=length)
        output = block_attention(*moved, chunks=chunks, scaling=0.125, window=window, softcap=softcap)
    torch.testing.assert_close(output.cpu(), expected, atol=1e-3, rtol=1e-3)
    for found, wanted in zip(torch.autograd.grad(output.square().sum(), moved), gradients, strict=True):
        torch.testing.assert_close(found.cpu(), wanted, atol=1e-2, rtol=1e-2)
