"""With a tiny vocabulary every sample tuple can be enumerated, and expectations are exact."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ebft_study.algorithm.advantages import feature_matching_advantages
from ebft_study.algorithm.losses import policy_gradient_loss
from ebft_study.algorithm.rewards import feature_matching_rewards

V, G, D = 3, 2, 4
COMPLETIONS = list(itertools.product(range(V), repeat=G))
ONE_CONTEXT = torch.ones(1, 1, dtype=torch.bool)


class TabularPolicy:
    """p(y) = p(y_1) p(y_2 | y_1) with free logits."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.first = torch.randn(V, generator=generator, dtype=torch.float64, requires_grad=True)
        self.second = torch.randn(V, V, generator=generator, dtype=torch.float64, requires_grad=True)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.first, self.second]

    def token_log_probs(self) -> Tensor:
        """[V^G, G]"""
        first, second = self.first.log_softmax(-1), self.second.log_softmax(-1)
        return torch.stack([torch.stack([first[a], second[a, b]]) for a, b in COMPLETIONS])

    def probabilities(self) -> Tensor:
        return self.token_log_probs().sum(-1).exp()


@pytest.fixture
def setting() -> tuple[TabularPolicy, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    phi = torch.randn(len(COMPLETIONS), D, generator=generator, dtype=torch.float64)
    psi = torch.randn(D, generator=generator, dtype=torch.float64)
    return TabularPolicy(), phi, psi


def expected_gradient(
    policy: TabularPolicy, phi: Tensor, psi: Tensor, n: int, alpha: float, baseline: str
) -> list[Tensor]:
    """Expectation of the estimator's gradient over all V^(G n) sample tuples."""
    log_probs, p = policy.token_log_probs(), policy.probabilities().detach()
    total = torch.zeros((), dtype=torch.float64)
    for chosen in itertools.product(range(len(COMPLETIONS)), repeat=n):
        index = list(chosen)
        rewards = feature_matching_rewards(phi[index], psi, alpha=alpha, whitening="none")
        advantages = feature_matching_advantages(rewards.alignment, rewards.diversity, alpha=alpha, baseline=baseline)
        loss = policy_gradient_loss(
            log_probs[index][None, None], advantages[None, None], ONE_CONTEXT, aggregation="sum", denominator=n
        )
        total = total + p[index].prod() * loss
    return list(torch.autograd.grad(total, policy.parameters))


def exact_gradient(policy: TabularPolicy, phi: Tensor, psi: Tensor, alpha: float = 1.0) -> list[Tensor]:
    """Gradient of alpha |E phi - psi / alpha|^2, that is alpha |E phi|^2 - 2 E phi . psi up to a constant (65)."""
    mean = policy.probabilities() @ phi
    return list(torch.autograd.grad(alpha * mean.square().sum() - 2 * mean @ psi, policy.parameters))


@pytest.mark.parametrize(("n", "baseline"), [(2, "none"), (2, "rloo"), (3, "none"), (3, "rloo")])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_estimator_is_unbiased_for_the_gradient_of_the_feature_matching_loss(
    setting: tuple[TabularPolicy, Tensor, Tensor], n: int, baseline: str, alpha: float
) -> None:
    for estimated, exact in zip(
        expected_gradient(*setting, n, alpha, baseline), exact_gradient(*setting, alpha), strict=True
    ):
        torch.testing.assert_close(estimated, exact, atol=1e-10, rtol=1e-8)


def test_the_naive_baseline_is_biased(setting: tuple[TabularPolicy, Tensor, Tensor]) -> None:
    estimated = expected_gradient(*setting, 3, 1.0, "naive")
    exact = exact_gradient(*setting)
    assert max(float((a - b).abs().max()) for a, b in zip(estimated, exact, strict=True)) > 1e-3


def test_one_hot_features_of_one_token_give_the_squared_distance_of_distributions_3() -> None:
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    p_data = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    p, eye = logits.softmax(-1), torch.eye(3, dtype=torch.float64)
    exact = torch.autograd.grad((p - p_data).square().sum(), logits)[0]
    total = torch.zeros((), dtype=torch.float64)
    for y, i, j in itertools.product(range(3), repeat=3):
        rewards = feature_matching_rewards(eye[[i, j]], eye[y], alpha=1.0, whitening="none")
        log_probs = logits.log_softmax(-1)[[i, j]].view(1, 1, 2, 1)
        loss = policy_gradient_loss(
            log_probs, rewards.reward[None, None], ONE_CONTEXT, aggregation="sum", denominator=2
        )
        total = total + (p_data[y] * p[i] * p[j]).detach() * loss
    torch.testing.assert_close(torch.autograd.grad(total, logits)[0], exact)


@pytest.mark.parametrize(("alpha", "stationary"), [(1.0, True), (0.5, False), (0.0, False)])
def test_the_data_distribution_is_stationary_for_alpha_one_only(
    setting: tuple[TabularPolicy, Tensor, Tensor], alpha: float, stationary: bool
) -> None:
    policy, phi, _ = setting
    psi = policy.probabilities().detach() @ phi
    size = max(float(g.abs().max()) for g in expected_gradient(policy, phi, psi, 2, alpha, "none"))
    assert (size < 1e-10) == stationary
