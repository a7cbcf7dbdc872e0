"""Drawing tokens by inverting the cumulative distribution, so that the noise is an argument.

With the uniforms fixed, a sample is a deterministic function of the model: the same whatever the micro-batch or
the number of workers, and comparable across models (common random numbers).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def uniforms(key: Sequence[int], sequence_ids: Sequence[int], *, n_anchors: int, n_samples: int, length: int) -> Tensor:
    """Noise in [0, 1) for a batch, [S, B, n, G] float32, one independent stream per sequence.

    The stream of a sequence depends on `key` (seed, step, ...) and its id alone. Anchor b, sample j, token t reads a
    fixed place in it, so neither the batch's composition nor its padding changes any draw.
    """
    streams = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence([*key, int(identity)]))).random(
            (n_anchors, n_samples, length), dtype=np.float32
        )
        for identity in sequence_ids
    ]
    return torch.from_numpy(np.stack(streams)) if streams else torch.empty(0, n_anchors, n_samples, length)


def draw(logits: Tensor, noise: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens from `softmax(logits / temperature)` by inverse-CDF sampling, and their log-probabilities.

    Token k is drawn when `noise` falls into its slice of the cumulative distribution; tokens of zero probability
    are never drawn.

    Args:
        logits: [..., V].
        noise: [..., m] in [0, 1): m independent draws from each distribution.
        temperature: tau > 0.

    Returns:
        tokens [..., m] int64 and log-probabilities [..., m] (of the tempered policy, float32).
    """
    log_probs = (logits.float() / temperature).log_softmax(dim=-1)
    cumulative = log_probs.exp().cumsum(dim=-1)
    # Scaling by the last entry, not by 1, keeps the target below it whatever the rounding of the sum.
    target = (noise.to(cumulative) * cumulative[..., -1:]).contiguous()
    tokens = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens, log_probs.gather(-1, tokens)
