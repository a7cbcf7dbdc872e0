"""The CUDA path against the CPU path. Shown as skipped on machines without a GPU."""

from __future__ import annotations

import copy

import pytest
import torch

from ebft_study.algorithm.anchors import find_anchors
from ebft_study.algorithm.rewards import feature_matching_rewards
from ebft_study.block_model import BlockPass, completion_states, score, token_log_probs
from ebft_study.features.local import LocalFeatures
from ebft_study.rollouts.strided import StridedRollouts
from tests.small_models import ARCHITECTURES, small_batch, small_model

pytestmark = pytest.mark.gpu
LAYOUTS = [[0] * 24, [0] * 9 + [1] * 15, [0] * 17 + [-1] * 7]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_on_the_gpu_agrees_with_the_cpu(architecture: str) -> None:
    results = []
    for device in ("cpu", "cuda"):
        model = small_model(architecture).to(device)
        features = LocalFeatures(
            copy.deepcopy(model), depths=(0.25, 0.5, 0.75), pooling="last_token", normalize="per_layer"
        )
        batch = small_batch(LAYOUTS).to(device)
        anchors = find_anchors(batch.document_ids, completion_length=4, stride=4, first_context_length=4)
        noise = torch.rand(*anchors.positions.shape, 4, 4, generator=torch.Generator().manual_seed(0))
        rollouts = StridedRollouts().sample(model, batch, anchors, noise=noise, temperature=0.8)
        embedded = features.embed(batch, anchors, rollouts.completions)[0]
        rewards = feature_matching_rewards(embedded.phi, embedded.psi, alpha=1.0, whitening="variant_i")
        block_pass = BlockPass(batch.document_ids, anchors, n_samples=4)
        states = completion_states(*score(model, batch.tokens, rollouts.completions[..., :-1], block_pass), anchors)
        log_probs = token_log_probs(model, states, rollouts.completions, temperature=0.8)
        log_probs[anchors.valid].sum().backward()
        gradient = model.get_input_embeddings().weight.grad
        results.append([t.cpu() for t in (rollouts.completions, log_probs.detach(), rewards.reward, gradient)])
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, atol=1e-4, rtol=1e-3)
