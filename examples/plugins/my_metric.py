"""Metrics: how many different tokens the completions of a context have, and the worst surprise in a text."""

import torch
from torch import Tensor

from ebft_study.evaluation.extra_metrics import Evaluated, metric
from ebft_study.results.metrics import TEXT


@metric(direction="max", description="different tokens over tokens in the completions of a context")
def distinct_tokens(evaluated: Evaluated) -> Tensor:
    """A value of each context, [S, B]."""
    tokens = evaluated.completions.flatten(2).sort(dim=2).values
    different = 1 + (tokens[..., 1:] != tokens[..., :-1]).sum(dim=2)
    return different / tokens.shape[2]


@metric(direction="min", unit="nats", description="surprise of the least expected token", comparable_within=TEXT)
def worst_surprise(evaluated: Evaluated) -> Tensor:
    """A value of each sequence, [S]: it depends on no completion, so configurations compare if they share the text."""
    counts = evaluated.batch.ce_mask("all")
    return torch.where(counts, -evaluated.log_probs, 0.0).amax(dim=1)
