"""Strided rollouts: what of their draws does not depend on how a step is cut, and what does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ebft_study.algorithm.anchors import Anchors, find_anchors
from ebft_study.data import Batch
from ebft_study.rollouts.strided import StridedRollouts
from tests.small_models import small_batch, small_model

N, G, TEMPERATURE = 4, 4, 0.6
ROUNDING = 1e-5
"""Largest difference of float32 cumulative probabilities that two ways to compute them may have."""


@pytest.fixture
def batch() -> Batch:
    return small_batch([[0] * 24, [0] * 17 + [-1] * 7, [0] * 9 + [1] * 15])


def anchors_of(batch: Batch) -> Anchors:
    return find_anchors(batch.document_ids, completion_length=G, stride=2, first_context_length=3)


@torch.no_grad()
def cumulative(model: nn.Module, context: Tensor) -> Tensor:
    """Cumulative distribution [V] of the token after `context`, by a plain forward pass in float64."""
    logits = copy.deepcopy(model).double()(context[None]).logits[0, -1]
    return (logits / TEMPERATURE).softmax(dim=-1).cumsum(dim=-1)


def context_of(batch: Batch, anchors: Anchors, s: int, b: int) -> Tensor:
    end = int(anchors.positions[s, b])
    same_document = batch.document_ids[s, :end] == batch.document_ids[s, end]
    return batch.tokens[s, :end][same_document]


def noise_at_boundaries(model: nn.Module, batch: Batch, anchors: Anchors) -> Tensor:
    """Uniforms whose first ones lie on boundaries between two tokens, where rounding decides."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(*anchors.positions.shape, N, G, generator=generator)
    for s, b in anchors.valid.nonzero().tolist():
        edges = cumulative(model, context_of(batch, anchors, s, b))
        noise[s, b, :, 0] = edges[torch.searchsorted(edges[:-1], noise[s, b, :, 0].double())].float().clamp(max=0.999)
    return noise


def in_parts(model: nn.Module, batch: Batch, anchors: Anchors, noise: Tensor) -> Tensor:
    """Completions of one sequence and two anchors at a time."""
    completions = torch.zeros(noise.shape, dtype=torch.int64)
    for s in range(len(batch.tokens)):
        row = torch.tensor([s])
        for first in range(0, noise.shape[1], 2):
            part = slice(first, first + 2)
            share = Anchors(*(tensor[row, part] for tensor in anchors))
            drawn = StridedRollouts().sample(
                model, batch.select(row), share, noise=noise[row, part], temperature=TEMPERATURE
            )
            completions[row, part] = drawn.completions
    return completions


def flips(model: nn.Module, batch: Batch, anchors: Anchors, noise: Tensor, one: Tensor, other: Tensor) -> list[float]:
    """Per completion that differs, the distance of its first differing uniform from the boundaries that it crossed."""
    distances = []
    for s, b, j in ((one != other).any(dim=-1) & anchors.valid[..., None]).nonzero().tolist():
        t = int((one[s, b, j] != other[s, b, j]).nonzero()[0])
        context = torch.cat([context_of(batch, anchors, s, b), one[s, b, j, :t]])
        low, high = sorted((int(one[s, b, j, t]), int(other[s, b, j, t])))
        between = cumulative(model, context)[low:high]
        distances.append(float((between - float(noise[s, b, j, t])).abs().max()))
    return distances


@torch.no_grad()
@pytest.mark.parametrize("at_boundaries", [False, True])
def test_draws_of_a_step_cut_in_parts_differ_only_within_rounding_of_a_boundary(
    batch: Batch, at_boundaries: bool
) -> None:
    model, anchors = small_model(), anchors_of(batch)
    shape = (*anchors.positions.shape, N, G)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    if at_boundaries:
        noise = noise_at_boundaries(model, batch, anchors)
    whole = StridedRollouts().sample(model, batch, anchors, noise=noise, temperature=TEMPERATURE).completions
    distances = flips(model, batch, anchors, noise, whole, in_parts(model, batch, anchors, noise))
    assert all(distance < ROUNDING for distance in distances)
    assert at_boundaries or len(distances) <= 0.01 * int(anchors.valid.sum()) * N


@torch.no_grad()
def test_rounding_flips_draws_at_boundaries(batch: Batch) -> None:
    """The same weights, computed in another precision: what a run cut differently meets sooner or later."""
    model, anchors = small_model(), anchors_of(batch)
    noise = noise_at_boundaries(model, batch, anchors)
    completions = [
        StridedRollouts().sample(weights, batch, anchors, noise=noise, temperature=TEMPERATURE).completions
        for weights in (model, copy.deepcopy(model).double())
    ]
    distances = flips(model, batch, anchors, noise, *completions)
    assert distances
    assert all(distance < ROUNDING for distance in distances)
