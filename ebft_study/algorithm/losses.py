"""Losses as sums over the batch of this process, divided by denominators that the caller counts globally.

A mean over the local batch would bias the gradient as soon as workers have different numbers of contexts;
with global denominators the gradients of all workers simply add up.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sum"]
KlEstimator = Literal["k1", "k2", "k3"]


def policy_gradient_loss(
    log_probs: Tensor, advantages: Tensor, valid: Tensor, *, aggregation: Aggregation, denominator: float
) -> Tensor:
    """REINFORCE surrogate of (7), (92): `- sum A_j agg_t log p_tau(token_t) / denominator`.

    `sum` over the G tokens is the log-probability of the completion, as (7) is printed; `token_mean` divides it by
    G, as the authors' code does.

    Args:
        log_probs: [S, B, n, G], with gradient, of the tempered policy that sampled the tokens.
        advantages: [S, B, n]; no gradient flows through them.
        valid: [S, B] bool, False for padded anchors.
        denominator: number of (context, sample) pairs over all workers.
    """
    score = log_probs.mean(dim=-1) if aggregation == "token_mean" else log_probs.sum(dim=-1)
    weighted = advantages.detach().to(score.dtype) * score
    return -torch.where(valid[..., None], weighted, 0.0).sum() / denominator


def importance_weights(log_probs: Tensor, sampled_log_probs: Tensor, *, clip: float) -> tuple[Tensor, Tensor]:
    """Weights that correct for completions drawn from another policy than the one being trained.

    `rho = exp(sum_t log p_tau(token_t) - log q_tau(token_t))`, one per completion, and `w = min(rho, clip)`: the
    expectation of `rho f(y)` under q is that of `f(y)` under p, and the truncation bounds the variance (at the price of
    a bias towards completions that q prefers). Equal policies give 1 everywhere.

    Args:
        log_probs: [..., G] of the trained policy p; no gradient flows through the weights.
        sampled_log_probs: [..., G] of the policy q that drew the tokens.
        clip: largest weight, at least 1.

    Returns:
        Weights w and raw ratios rho, both [...] float32. A ratio beyond float32 is infinite, its weight is `clip`.
    """
    ratios = (log_probs.detach().float() - sampled_log_probs.detach().float()).sum(dim=-1).exp()
    return ratios.clamp(max=clip), ratios


def cross_entropy_loss(log_probs: Tensor, mask: Tensor, *, denominator: float) -> Tensor:
    """Next-token cross-entropy (4) at temperature 1: `- sum log p(x_t | x_<t) / denominator`.

    Args:
        log_probs: [S, T-1] of tokens x_1 .. x_{T-1}. mask: [S, T-1] bool, the tokens that count.
        denominator: number of counted tokens over all workers.
    """
    return -torch.where(mask, log_probs, 0.0).sum() / denominator


def next_token_mask(document_ids: Tensor, answer_mask: Tensor | None = None) -> Tensor:
    """Tokens that cross-entropy counts, [S, T-1]: real, not the first of their document, and in `answer_mask`."""
    mask = (document_ids[:, 1:] >= 0) & (document_ids[:, 1:] == document_ids[:, :-1])
    return mask if answer_mask is None else mask & answer_mask[:, 1:]


def kl_penalty(log_probs: Tensor, base_log_probs: Tensor, valid: Tensor, *, estimator: KlEstimator) -> Tensor:
    """Per-token estimates of `KL(p_theta || p_base)` on sampled tokens, [S, B, n, G], 0 where not valid.

    With `u = log p_theta - log p_base`: k1 = `u`, k2 = `u^2 / 2`, k3 = `exp(-u) - 1 + u`. As a loss, k1 itself has a
    gradient of mean zero, so its value is paired with the score-function gradient `u grad log p_theta`, the same that
    k2 gives; k3 is differentiated as written (low variance, the gradient of the forward KL).
    """
    u = log_probs - base_log_probs.detach()
    if estimator == "k1":
        surrogate = u.detach() * log_probs
        penalty = u.detach() + surrogate - surrogate.detach()
    elif estimator == "k2":
        penalty = 0.5 * u.square()
    else:
        penalty = torch.expm1(-u) + u
    return torch.where(valid[..., None, None], penalty, 0.0)
