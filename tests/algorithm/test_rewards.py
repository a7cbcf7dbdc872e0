"""Rewards, whitening and advantages against their definitions and the paper's closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ebft_study.algorithm.advantages import feature_matching_advantages
from ebft_study.algorithm.metrics import conditional_feature_matching, duplicate_fraction, whitened_feature_matching
from ebft_study.algorithm.rewards import feature_matching_rewards
from ebft_study.algorithm.whitening import whitened_products
from tests.references import feature_matching as reference

PAPER = ["none", "variant_i", "variant_ii", "variant_iii"]


def features(n: int, d: int, seed: int = 0, contexts: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randn(*contexts, n, d, generator=generator, dtype=torch.float64)
    return phi, torch.randn(*contexts, d, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("whitening", PAPER)
@pytest.mark.parametrize(("n", "d"), [(2, 5), (4, 7), (4, 3), (6, 40)])
def test_rewards_equal_the_definition(whitening: str, n: int, d: int) -> None:
    phi, psi = features(n, d)
    rewards = feature_matching_rewards(phi, psi, alpha=0.7, whitening=whitening)
    t1, t2 = reference.terms(phi.numpy(), psi.numpy(), whitening)
    np.testing.assert_allclose(rewards.alignment, t1, atol=1e-8)
    np.testing.assert_allclose(rewards.diversity, t2, atol=1e-8)
    np.testing.assert_allclose(rewards.reward, t1 - 0.7 * t2, atol=1e-8)


@pytest.mark.parametrize("whitening", [*PAPER, "reference_code"])
def test_a_batch_of_contexts_gives_each_contexts_own_rewards(whitening: str) -> None:
    phi, psi = features(4, 9, contexts=(2, 3))
    batched = feature_matching_rewards(phi, psi, alpha=1.0, whitening=whitening).reward
    for s in range(2):
        for b in range(3):
            single = feature_matching_rewards(phi[s, b], psi[s, b], alpha=1.0, whitening=whitening).reward
            torch.testing.assert_close(batched[s, b], single)


@pytest.mark.parametrize("multiplicities", [(1, 1, 1, 1), (2, 1, 1), (2, 2), (3, 1), (4,)])
def test_whitened_products_have_the_closed_forms_of_lemma_b2(multiplicities: tuple[int, ...]) -> None:
    distinct, psi = features(len(multiplicities), 12)
    owner = [k for k, count in enumerate(multiplicities) for _ in range(count)]
    phi = distinct[owner]
    n = len(owner)
    products = whitened_products(phi @ phi.T, phi @ psi)
    x = torch.linalg.lstsq(distinct.T, psi[:, None]).solution[:, 0]
    count = torch.tensor([float(multiplicities[k]) for k in owner], dtype=torch.float64)
    same = torch.tensor([[a == b for b in owner] for a in owner])
    # The paper's tilde quantities lack the factor sqrt(n) of (8); inner products differ by n.
    torch.testing.assert_close(products.samples / n, torch.where(same, 1 / count[:, None], 0.0), atol=1e-9, rtol=0)
    torch.testing.assert_close(products.target / n, x[owner] / count, atol=1e-9, rtol=1e-9)
    norm = sum(x[k] ** 2 / c for k, c in enumerate(multiplicities))
    torch.testing.assert_close(products.target_norm_squared / n, norm, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("multiplicities", [(2, 1, 1), (3, 1), (2, 2)])
def test_variant_i_has_the_closed_forms_48_and_50(multiplicities: tuple[int, ...]) -> None:
    distinct, psi = features(len(multiplicities), 12, seed=3)
    owner = [k for k, count in enumerate(multiplicities) for _ in range(count)]
    n = len(owner)
    rewards = feature_matching_rewards(distinct[owner], psi, alpha=1.0, whitening="variant_i")
    count = torch.tensor([float(multiplicities[k]) for k in owner], dtype=torch.float64)
    x = torch.linalg.lstsq(distinct.T, psi[:, None]).solution[:, 0][owner] / count.sqrt()
    norm = sum((distinct.pinverse().T @ psi)[k] ** 2 / c for k, c in enumerate(multiplicities)).sqrt()
    torch.testing.assert_close(rewards.alignment, 2 * x / norm, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(rewards.diversity, 2 * (1 - 1 / count) / (1 - 1 / n), atol=1e-9, rtol=1e-9)


def test_whitening_leaves_no_diversity_term_without_duplicates() -> None:
    phi, psi = features(4, 30)
    rewards = feature_matching_rewards(phi.float(), psi.float(), alpha=1.0, whitening="variant_i")
    assert float(rewards.diversity.abs().max()) < 1e-5


def test_a_ground_truth_outside_the_samples_span_has_no_alignment() -> None:
    phi, psi = torch.eye(3, 5), torch.eye(5)[4]
    for whitening in PAPER:
        assert feature_matching_rewards(phi, psi, alpha=1.0, whitening=whitening).alignment.abs().max() < 1e-12


def test_zero_features_give_zero_rewards_not_nan() -> None:
    for whitening in [*PAPER, "reference_code"]:
        rewards = feature_matching_rewards(torch.zeros(4, 6), torch.zeros(6), alpha=1.0, whitening=whitening)
        assert torch.equal(rewards.reward, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("whitening", PAPER[1:])
def test_a_direction_counts_above_a_hundred_thousandth_of_the_largest_singular_value(whitening: str) -> None:
    """These two samples have singular values of about 1.4 and 0.7 times their distance."""
    psi = torch.tensor([0.3, 0.2, 0.5], dtype=torch.float64)
    for distance, n_directions in ((1e-3, 2), (1e-4, 2), (1e-6, 1)):
        phi = torch.tensor([[1.0, 0.0, 0.0], [1.0, distance, 0.0]], dtype=torch.float64)
        rewards = feature_matching_rewards(phi, psi, alpha=0.5, whitening=whitening)
        t1, t2 = reference.terms(phi.numpy(), psi.numpy(), whitening)
        np.testing.assert_allclose(rewards.alignment, t1, atol=1e-4)
        np.testing.assert_allclose(rewards.diversity, t2, atol=1e-4)
        assert torch.linalg.matrix_rank(whitened_products(phi @ phi.T, phi @ psi).samples, rtol=1e-3) == n_directions


@pytest.mark.parametrize("common", [0.0, 5.0])
def test_reference_code_whitens_rows_by_an_svd_and_scales_copies_of_the_ground_truth(common: float) -> None:
    """With much in common, some samples have a negative row sum in the whitening matrix."""
    phi, psi = features(4, 10, seed=5)
    phi = phi + common * torch.tensor([[0.2], [0.5], [1.0], [2.0]], dtype=torch.float64)
    U, S, _ = np.linalg.svd(phi.numpy(), full_matrices=False)
    W = U @ np.diag(1 / S) @ U.T
    assert (W.sum(axis=1).min() < 0) == (common > 0)
    white, truth = W @ phi.numpy(), W @ np.tile(psi.numpy(), (4, 1))
    expected = [2 * reference.cosine(white[j], truth[j]) for j in range(4)]
    rewards = feature_matching_rewards(phi, psi, alpha=1.0, whitening="reference_code")
    np.testing.assert_allclose(rewards.alignment, expected, atol=1e-9)
    pairs = white @ white.T
    np.testing.assert_allclose(rewards.diversity, 2 / 3 * (pairs.sum(1) - np.diag(pairs)), atol=1e-9)


@pytest.mark.parametrize("n", [3, 4, 7])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_rloo_equals_its_definition_93(n: int, alpha: float) -> None:
    phi, psi = features(n, 6, seed=n)
    rewards = feature_matching_rewards(phi, psi, alpha=alpha, whitening="none")
    advantages = feature_matching_advantages(rewards.alignment, rewards.diversity, alpha=alpha, baseline="rloo")
    expected = rewards.reward.numpy() - reference.rloo_baseline(phi.numpy(), psi.numpy(), alpha)
    np.testing.assert_allclose(advantages, expected, atol=1e-10)


def test_rloo_with_two_samples_uses_the_alignment_alone() -> None:
    t1, t2 = torch.tensor([3.0, 1.0]), torch.tensor([0.5, 0.5])
    advantages = feature_matching_advantages(t1, t2, alpha=1.0, baseline="rloo")
    torch.testing.assert_close(advantages, torch.tensor([3.0 - 0.5 - 1.0, 1.0 - 0.5 - 3.0]))


def test_a_baseline_needs_other_samples() -> None:
    with pytest.raises(ValueError, match="n_samples=1"):
        feature_matching_advantages(torch.ones(1), torch.zeros(1), alpha=0.0, baseline="rloo")
    reward = feature_matching_advantages(torch.ones(1), torch.zeros(1), alpha=0.0, baseline="none")
    assert reward.item() == 1.0


def test_group_norm_is_zero_without_variance_and_standardised_with_it() -> None:
    flat = feature_matching_advantages(torch.ones(5), torch.zeros(5), alpha=1.0, baseline="group_norm")
    assert torch.equal(flat, torch.zeros(5))
    spread = feature_matching_advantages(torch.arange(5.0), torch.zeros(5), alpha=1.0, baseline="group_norm")
    torch.testing.assert_close(spread.std(), torch.tensor(1.0))


@pytest.mark.parametrize("n", [2, 4])
def test_cfm_equals_its_definition(n: int) -> None:
    phi, psi = features(n, 8, seed=9)
    np.testing.assert_allclose(conditional_feature_matching(phi, psi), reference.cfm(phi.numpy(), psi.numpy()))


def test_cfm_is_unbiased_for_the_squared_distance_of_means() -> None:
    """Exact expectation over all pairs of outcomes of a three-point distribution."""
    outcomes, psi = features(3, 4, seed=2)
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    expected = sum(
        p[i] * p[j] * conditional_feature_matching(torch.stack([outcomes[i], outcomes[j]]), psi)
        for i in range(3)
        for j in range(3)
    )
    torch.testing.assert_close(expected, (p @ outcomes - psi).square().sum())


def test_cfm_refuses_a_single_sample() -> None:
    with pytest.raises(ValueError, match="two samples"):
        conditional_feature_matching(torch.ones(1, 3), torch.ones(3))


def test_fm_whitened_falls_when_alignment_grows() -> None:
    better = whitened_feature_matching(torch.tensor([2.0, 2.0]), torch.tensor([0.0, 0.0]))
    worse = whitened_feature_matching(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0]))
    assert better < worse


def test_duplicate_fraction_counts_repeats_of_earlier_samples() -> None:
    completions = torch.tensor([[[1, 2], [1, 2], [3, 4], [1, 2]], [[1, 2], [2, 1], [3, 3], [4, 4]]])
    assert duplicate_fraction(completions).tolist() == [0.5, 0.0]
