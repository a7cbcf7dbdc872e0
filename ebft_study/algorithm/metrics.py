"""Metrics of rollouts and features (method section 7), per context unless said otherwise."""

from __future__ import annotations

from torch import Tensor


def conditional_feature_matching(phi: Tensor, psi: Tensor) -> Tensor:
    """Unbiased estimate of `|E phi - psi|^2`, the conditional feature-matching loss (2), per context.

    `|psi|^2 - 2 mean_j phi_j . psi + 1/(n(n-1)) sum_{i != j} phi_i . phi_j`; single values may be negative.

    Args:
        phi: [..., n, d] with n >= 2. psi: [..., d].

    Raises:
        ValueError: n < 2, for which no unbiased estimate exists.
    """
    n = phi.shape[-2]
    if n < 2:
        raise ValueError(f"cfm_loss needs at least two samples per context, but got {n}")
    phi, psi = phi.double(), psi.double()
    total = phi.sum(dim=-2)
    pairs = (total.square().sum(dim=-1) - phi.square().sum(dim=(-2, -1))) / (n * (n - 1))
    return psi.square().sum(dim=-1) - 2.0 * (total * psi).sum(dim=-1) / n + pairs


def whitened_feature_matching(alignment: Tensor, diversity: Tensor) -> Tensor:
    """Minus the proxy (53): `- mean_j (T1_j - T2_j / 2)`, [..., n] -> [...].

    As printed, (53) grows when things improve; with this sign it is a loss.
    """
    return -(alignment - 0.5 * diversity).mean(dim=-1)


def duplicate_fraction(completions: Tensor) -> Tensor:
    """Share of a context's samples that repeat an earlier one: [..., n, G] tokens -> [...] in [0, (n-1)/n]."""
    same = (completions.unsqueeze(-2) == completions.unsqueeze(-3)).all(dim=-1)
    return same.tril(diagonal=-1).any(dim=-1).double().mean(dim=-1)
