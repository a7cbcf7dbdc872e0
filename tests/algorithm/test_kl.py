"""The KL term of (10): with a tiny vocabulary all completions are enumerated, and its gradient is exact."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import root
from torch import Tensor

from ebft_study.algorithm.advantages import feature_matching_advantages
from ebft_study.algorithm.losses import importance_weights, kl_loss, kl_penalty, policy_gradient_loss
from ebft_study.algorithm.rewards import feature_matching_rewards

ONE_CONTEXT = torch.ones(1, 1, dtype=torch.bool)


class Tables:
    """An autoregressive policy over V^G completions, with free logits after every prefix."""

    def __init__(self, V: int, G: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.G, self.completions = G, list(itertools.product(range(V), repeat=G))
        self.logits = [
            torch.randn((V,) * (t + 1), generator=generator, dtype=torch.float64, requires_grad=True) for t in range(G)
        ]

    @classmethod
    def of_joint(cls, probabilities: Tensor) -> Tables:
        """The policy with this joint distribution [V, ..., V]."""
        V, G = probabilities.shape[0], probabilities.dim()
        policy = cls(V, G)
        marginals = [probabilities.sum(dim=tuple(range(t + 1, G))) if t + 1 < G else probabilities for t in range(G)]
        policy.logits = [marginal.log().requires_grad_() for marginal in marginals]
        return policy

    def token_log_probs(self) -> Tensor:
        """[V^G, G]"""
        tables = [logits.log_softmax(dim=-1) for logits in self.logits]
        return torch.stack([torch.stack([tables[t][y[: t + 1]] for t in range(self.G)]) for y in self.completions])

    def gradient(self, value: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, self.logits)])


def tuples(policy: Tables, n: int) -> Tensor:
    """Indices [N, n] of all tuples of n completions."""
    return torch.tensor(list(itertools.product(range(len(policy.completions)), repeat=n)))


def expected_loss(
    policy: Tables, base: Tables, n: int, estimator: str, aggregation: str = "sum", sampler: Tables | None = None
) -> Tensor:
    """Expectation of the KL term over all tuples of n samples, each tuple as a context; `sampler` draws them."""
    log_probs, base_log_probs = policy.token_log_probs(), base.token_log_probs().detach()
    drawn_by, chosen = (sampler or policy).token_log_probs().detach(), tuples(policy, n)
    probability = drawn_by.sum(dim=-1).exp()[chosen].prod(dim=-1)
    penalty = kl_penalty(
        log_probs[chosen][:, None], base_log_probs[chosen][:, None], ONE_CONTEXT.expand(len(chosen), 1),
        estimator=estimator,
    )  # fmt: skip
    ratios = importance_weights(log_probs, drawn_by, clip=1e9)[1].double()[chosen]
    weights = (probability[:, None] * ratios)[:, None]
    return kl_loss(penalty, weights, aggregation=aggregation, denominator=n)


def kl(policy: Tables, base: Tables) -> Tensor:
    log_p = policy.token_log_probs().sum(dim=-1)
    return (log_p.exp() * (log_p - base.token_log_probs().sum(dim=-1).detach())).sum()


def kl_with_prefixes_fixed(policy: Tables, base: Tables, *, forward: bool = False) -> Tensor:
    """`sum_t E[KL(p(. | y_<t) || q(. | y_<t))]`, or of (q || p), where only the inner p is differentiated."""
    total, reached = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for logits, base_logits in zip(policy.logits, base.logits, strict=True):
        log_p, log_q = logits.log_softmax(dim=-1), base_logits.detach().log_softmax(dim=-1)
        one, other = (log_q, log_p) if forward else (log_p, log_q)
        total = total + (reached * (one.exp() * (one - other)).sum(dim=-1)).sum()
        reached = reached[..., None] * log_p.detach().exp()
    return total


SIZES = [(4, 1, 1), (4, 1, 2), (4, 1, 3), (3, 2, 1), (3, 2, 2), (3, 2, 3), (2, 3, 1), (3, 3, 2), (2, 3, 3)]


@pytest.mark.parametrize(("V", "G", "n"), SIZES)
def test_the_sequence_estimator_has_the_gradient_of_the_kl_of_completions(V: int, G: int, n: int) -> None:
    policy, base = Tables(V, G), Tables(V, G, seed=1)
    estimate = expected_loss(policy, base, n, "sequence")
    torch.testing.assert_close(estimate, kl(policy, base))
    torch.testing.assert_close(policy.gradient(estimate), policy.gradient(kl(policy, base)), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("n", [1, 2])
def test_a_mean_over_tokens_is_the_kl_per_token(n: int) -> None:
    policy, base = Tables(3, 2), Tables(3, 2, seed=1)
    estimate = expected_loss(policy, base, n, "sequence", aggregation="token_mean")
    torch.testing.assert_close(policy.gradient(2 * estimate), policy.gradient(kl(policy, base)))


@pytest.mark.parametrize("estimator", ["sequence", "k1"])
def test_weighted_samples_of_another_policy_have_the_same_expectation(estimator: str) -> None:
    policy, base, sampler = Tables(3, 2), Tables(3, 2, seed=1), Tables(3, 2, seed=2)
    own, weighted = (expected_loss(policy, base, 2, estimator, sampler=drawn_by) for drawn_by in (None, sampler))
    # Ratios are float32.
    torch.testing.assert_close(policy.gradient(weighted), policy.gradient(own), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("G", [1, 2, 3])
def test_k1_k2_and_k3_have_the_gradients_that_their_docstring_states(G: int) -> None:
    policy, base = Tables(3, G), Tables(3, G, seed=1)
    exact = policy.gradient(kl(policy, base))
    fixed = policy.gradient(kl_with_prefixes_fixed(policy, base))
    forward = policy.gradient(kl_with_prefixes_fixed(policy, base, forward=True))
    for estimator, expected in {"k1": fixed, "k2": fixed, "k3": forward}.items():
        torch.testing.assert_close(policy.gradient(expected_loss(policy, base, 1, estimator)), expected)
    assert bool((fixed - exact).norm() > 0.05 * exact.norm()) == (G > 1)
    assert (forward - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize(("estimator", "unbiased"), [("sequence", True), ("k1", True), ("k2", False), ("k3", True)])
def test_values_estimate_the_kl_of_completions(estimator: str, unbiased: bool) -> None:
    policy, base = Tables(3, 2), Tables(3, 2, seed=1)
    estimate, exact = expected_loss(policy, base, 1, estimator), kl(policy, base)
    assert torch.isclose(estimate, exact, atol=1e-9).item() == unbiased


def test_rewards_to_go_have_less_variance_than_the_ratio_of_the_whole_completion() -> None:
    policy, base, n = Tables(3, 3), Tables(3, 3, seed=1), 2
    log_probs, base_log_probs, chosen = policy.token_log_probs(), base.token_log_probs().detach(), tuples(policy, 2)
    scores = torch.stack([torch.stack([_gradient(policy, token) for token in tokens]) for tokens in log_probs])
    probability = log_probs.detach().sum(dim=-1).exp()[chosen].prod(dim=-1)
    leaf = log_probs.detach()[chosen][:, None].requires_grad_()
    valid = ONE_CONTEXT.expand(len(chosen), 1)
    penalty = kl_penalty(leaf, base_log_probs[chosen][:, None], valid, estimator="sequence")
    (to_go,) = torch.autograd.grad(penalty.sum(), leaf)
    ratios = (log_probs.detach() - base_log_probs).sum(dim=-1)[chosen]
    whole = (ratios - ratios.flip(-1))[..., None].expand(-1, -1, 3)

    def second_moment(costs: Tensor) -> Tensor:
        gradients = torch.einsum("njt,njtp->np", costs, scores[chosen]) / n
        return (probability * gradients.square().sum(dim=-1)).sum()

    assert second_moment(to_go[:, 0]) < 0.8 * second_moment(whole)


def _gradient(policy: Tables, value: Tensor) -> Tensor:
    parts = torch.autograd.grad(value, policy.logits, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def test_padded_anchors_add_nothing_and_change_nothing() -> None:
    """Neither to other contexts' values nor to their gradients."""
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    base = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    penalty = kl_penalty(log_probs, base, valid, estimator="sequence")
    (gradient,) = torch.autograd.grad(penalty.sum(), log_probs)
    assert not penalty[~valid].any()
    assert not gradient[~valid].any()
    for s, b in valid.nonzero().tolist():
        alone = log_probs[s : s + 1, b : b + 1].detach().requires_grad_()
        own = kl_penalty(alone, base[s : s + 1, b : b + 1], ONE_CONTEXT, estimator="sequence")
        torch.testing.assert_close(own[0, 0], penalty[s, b])
        torch.testing.assert_close(torch.autograd.grad(own.sum(), alone)[0][0, 0], gradient[s, b])


# --- Theorem D.3 ---------------------------------------------------------------------------------------------------

D, COEFFICIENT = 2, 0.4
ExpectedGradient = Callable[[Tables], Tensor]


def setting(V: int, G: int) -> tuple[Tables, Tensor, Tensor, Tensor]:
    """Base model, features [V^G, D], target mean, and the minimiser of (76): the tilt that solves its own equation.

    The derivative of (76) by rho(y) is constant where `2 phi(y) . (E phi - psi) + log(rho(y) / q(y)) / beta` is, so
    `chi = 2 beta (E phi - psi)`; with `1/beta` = COEFFICIENT.
    """
    base, generator = Tables(V, G, seed=3), torch.Generator().manual_seed(4)
    phi = torch.randn(len(base.completions), D, generator=generator, dtype=torch.float64)
    psi = torch.tensor([0.4, -0.3], dtype=torch.float64)
    log_q = base.token_log_probs().sum(dim=-1).detach()

    def tilt(chi: np.ndarray) -> Tensor:
        return (log_q - phi @ torch.from_numpy(chi)).softmax(dim=-1)

    solution = root(lambda chi: chi - 2 / COEFFICIENT * (tilt(chi) @ phi - psi).numpy(), np.zeros(D), tol=1e-13)
    assert solution.success
    return base, phi, psi, tilt(solution.x)


def expected_gradient(policy: Tables, base: Tables, phi: Tensor, psi: Tensor, estimator: str) -> Tensor:
    """Of the whole loss with n = 2, aggregated by `sum`, over all pairs of samples."""
    log_probs, chosen = policy.token_log_probs(), tuples(policy, 2)
    probability = log_probs.detach().sum(dim=-1).exp()[chosen].prod(dim=-1)
    rewards = feature_matching_rewards(phi[chosen], psi.expand(len(chosen), D), alpha=1.0, whitening="none")
    advantages = feature_matching_advantages(rewards.alignment, rewards.diversity, alpha=1.0, baseline="rloo")
    loss = policy_gradient_loss(
        log_probs[chosen][:, None], (probability[:, None] * advantages)[:, None],
        ONE_CONTEXT.expand(len(chosen), 1), aggregation="sum", denominator=2,
    )  # fmt: skip
    return policy.gradient(loss + COEFFICIENT * expected_loss(policy, base, 2, estimator))


@pytest.mark.parametrize(
    ("V", "G", "estimator", "fixed"),
    [
        *((5, 1, name, True) for name in ("sequence", "k1", "k2")),
        (5, 1, "k3", False),
        (3, 2, "sequence", True),
        *((3, 2, name, False) for name in ("k1", "k2", "k3")),
    ],
)
def test_the_exponential_tilt_is_a_fixed_point_of_the_right_estimators_only(
    V: int, G: int, estimator: str, fixed: bool
) -> None:
    base, phi, psi, tilt = setting(V, G)
    size = expected_gradient(Tables.of_joint(tilt.view((V,) * G)), base, phi, psi, estimator).norm()
    assert (size < 1e-10) if fixed else (size > 1e-2)


def test_descent_along_the_expected_gradient_ends_at_the_exponential_tilt() -> None:
    base, phi, psi, tilt = setting(3, 2)
    policy = Tables(3, 2, seed=3)
    assert (policy.token_log_probs().sum(dim=-1).exp() - tilt).abs().max() > 0.05
    optimizer = torch.optim.SGD(policy.logits, lr=2.0)
    for _ in range(600):
        gradient = expected_gradient(policy, base, phi, psi, "sequence")
        parts = gradient.split([logits.numel() for logits in policy.logits])
        for logits, part in zip(policy.logits, parts, strict=True):
            logits.grad = part.view_as(logits)
        optimizer.step()
    torch.testing.assert_close(policy.token_log_probs().sum(dim=-1).exp(), tilt, atol=1e-6, rtol=0)
