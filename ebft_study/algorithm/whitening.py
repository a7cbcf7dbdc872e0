"""Whitening of the features of one context (8), computed from inner products alone.

With `Phi` the d x n matrix of sample features, `Sigma = Phi Phi^T / n` and `K = Phi^T Phi`, every whitened inner
product follows from the n x n Gram matrix; nothing of size d is ever decomposed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RELATIVE_TOLERANCE = 1e-5
"""A direction counts when its singular value exceeds this fraction of the largest one."""


class WhitenedProducts(NamedTuple):
    """Inner products of `phi~ = (Sigma^+)^(1/2) phi` for the samples and for the ground truth `psi~`."""

    samples: Tensor
    """[..., n, n]: `phi~_i . phi~_j = n (K K^+)_ij`."""
    target: Tensor
    """[..., n]: `phi~_i . psi~ = n (K^+ k)_i` with `k_i = phi_i . psi`."""
    target_norm_squared: Tensor
    """[...]: `|psi~|^2 = n |K^+ k|^2`; psi enters through its projection on the span of the samples."""


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues, which of them count, and eigenvectors of Gram matrices [..., n, n], in float64."""
    values, vectors = torch.linalg.eigh(gram.double())
    # Eigenvalues of K are squared singular values of Phi.
    counts = values > RELATIVE_TOLERANCE**2 * values[..., -1:].clamp(min=0.0)
    return values, counts & (values > 0), vectors


def _power(values: Tensor, counts: Tensor, vectors: Tensor, exponent: float) -> Tensor:
    scaled = torch.where(counts, torch.where(counts, values, 1.0) ** exponent, 0.0)
    return (vectors * scaled[..., None, :]) @ vectors.transpose(-1, -2)


def whitened_products(gram: Tensor, cross: Tensor) -> WhitenedProducts:
    """All whitened inner products of one or many contexts (8), in float64.

    Args:
        gram: [..., n, n], `K_ij = phi_i . phi_j`.
        cross: [..., n], `k_i = phi_i . psi`.

    Edge cases: duplicated samples lower the rank, and the pseudo-inverse shares their weight equally (44); if every
    feature is zero, all products are zero.
    """
    n = gram.shape[-1]
    eigen = _eigen(gram)
    projector = _power(*eigen, 0.0)
    solved = (_power(*eigen, -1.0) @ cross.double()[..., None])[..., 0]
    return WhitenedProducts(n * projector, n * solved, n * solved.square().sum(dim=-1))


def reference_code_products(gram: Tensor, cross: Tensor) -> WhitenedProducts:
    """Products as in the authors' published code, for comparison: `Phi~ = Phi W`, `W = K^(-1/2)`, no factor n.

    The ground truth is not projected: as row j of a matrix of n copies it is multiplied by the scalar
    `w_j = sum_i W_ji`. A cosine cancels the scalar but for its sign, so `target` holds
    `sign(w_j) (W k)_j` and the caller divides by the unprojected norm |psi|; `target_norm_squared` is therefore NaN.
    """
    eigen = _eigen(gram)
    root = _power(*eigen, -0.5)
    target = root.sum(dim=-1).sign() * (root @ cross.double()[..., None])[..., 0]
    return WhitenedProducts(_power(*eigen, 0.0), target, torch.full_like(target[..., 0], float("nan")))
