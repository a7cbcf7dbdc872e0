"""Feature-matching rewards: (7) with the alignment bias of (67), and the whitened variants (9), (49)-(52)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ebft_study.algorithm.whitening import reference_code_products, whitened_products

Whitening = Literal["none", "variant_i", "variant_ii", "variant_iii", "reference_code"]


NUMBERS_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
"""Features widened to float64 at a time: as many as fit into a CPU's cache, or as fill a GPU."""


class Rewards(NamedTuple):
    """Rewards of the n samples of each context; all [..., n] float64."""

    reward: Tensor
    """`r_j = T1_j - alpha T2_j`."""
    alignment: Tensor
    """`T1_j`, the term that pulls towards the ground truth, its factor 2 included."""
    diversity: Tensor
    """`T2_j`, the term that pushes the samples apart, its factor 2 / (n - 1) included, alpha not."""


def feature_matching_rewards(phi: Tensor, psi: Tensor, *, alpha: float, whitening: Whitening) -> Rewards:
    """Reward of every sample against the ground truth of its context.

    - `none` (7): `T1_j = 2 phi_j . psi`, `T2_j = 2/(n-1) sum_{j' != j} phi_j . phi_j'`.
    - `variant_i` (9), (49): `T1_j = 2 cos(phi~_j, psi~)`, `T2_j` as above on whitened features.
    - `variant_ii` (51): cosines in both terms.
    - `variant_iii` (52): `T1_j = 2 phi~_j . psi~ / |psi~|`, with phi~ as in (8). The last two expressions of (52) drop
      the factor sqrt(n) of that definition; this is the first one.
    - `reference_code`: cosines and products as the authors' code computes them (`reference_code_products`).

    Args:
        phi: [..., n, d] sample features. psi: [..., d] ground-truth features.
        alpha: weight of the diversity term in [0, 1]; 1 is the proper scoring rule.

    Edge cases: for n = 1 there is no other sample and `diversity` is 0 (alpha must be 0 for the loss to mean
    anything); a vector that whitens to zero has cosine 0 with everything.
    """
    n = phi.shape[-2]
    gram, cross, length = inner_products(phi, psi)
    if whitening == "none":
        alignment, pairs = cross, gram
    elif whitening == "reference_code":
        products = reference_code_products(gram, cross)
        sample_norm = _diagonal(products.samples).sqrt()
        alignment = _divide(products.target, sample_norm * length[..., None])
        pairs = products.samples
    else:
        products = whitened_products(gram, cross)
        sample_norm = _diagonal(products.samples).sqrt()
        target_norm = products.target_norm_squared.sqrt()[..., None]
        cosine = whitening in ("variant_i", "variant_ii")
        alignment = _divide(products.target, target_norm * sample_norm if cosine else target_norm)
        pairs = products.samples
        if whitening == "variant_ii":
            pairs = _divide(pairs, sample_norm[..., None] * sample_norm[..., None, :])
    alignment = 2.0 * alignment
    diversity = 2.0 * (pairs.sum(dim=-1) - _diagonal(pairs)) / max(n - 1, 1)
    return Rewards(alignment - alpha * diversity, alignment, diversity)


def inner_products(phi: Tensor, psi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`K_ij = phi_i . phi_j` [..., n, n], `k_i = phi_i . psi` [..., n] and `|psi|` [...], in float64.

    A few contexts are widened at a time: a float64 copy of all features would cost memory traffic only.
    """
    n, d = phi.shape[-2:]
    concurrency = max(1, NUMBERS_AT_ONCE[phi.device.type] // ((n + 1) * d))
    samples, truth = phi.reshape(-1, n, d), psi.reshape(-1, d)
    joint = torch.empty(len(truth), n + 1, n + 1, dtype=torch.float64, device=phi.device)
    buffer = torch.empty(min(concurrency, len(truth)), n + 1, d, dtype=torch.float64, device=phi.device)
    for first in range(0, len(truth), concurrency):
        part = slice(first, first + concurrency)
        vectors = buffer[: len(truth[part])]
        vectors[:, :n], vectors[:, n] = samples[part], truth[part]
        torch.bmm(vectors, vectors.transpose(-1, -2), out=joint[part])
    joint = joint.view(*phi.shape[:-2], n + 1, n + 1)
    return joint[..., :-1, :-1], joint[..., :-1, -1], joint[..., -1, -1].sqrt()


def _diagonal(pairs: Tensor) -> Tensor:
    return pairs.diagonal(dim1=-2, dim2=-1).clamp(min=0.0)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where the denominator vanishes."""
    positive = denominator > 1e-12
    return torch.where(positive, numerator / torch.where(positive, denominator, 1.0), 0.0)
