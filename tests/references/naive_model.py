"""Rollouts, log-probabilities and features one context and one sample at a time, through plain forward passes.

The model runs with its own `eager` attention.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn


def forward(model: nn.Module, tokens: Tensor, **options: Any) -> Any:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return model(tokens, use_cache=False, **options)
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def sample(model: nn.Module, context: Tensor, noise: Tensor, temperature: float) -> tuple[list[int], list[float]]:
    """One completion of `context` [c]: the whole sequence is run again for every token."""
    tokens, log_probs = context.tolist(), []
    for u in noise.tolist():
        log_p = (forward(model, torch.tensor([tokens])).logits[0, -1].float() / temperature).log_softmax(-1)
        cumulative = list(itertools.accumulate(log_p.exp().double().tolist()))
        token = next(token for token, reached in enumerate(cumulative) if reached > u * cumulative[-1])
        tokens.append(token)
        log_probs.append(float(log_p[token]))
    return tokens[len(context) :], log_probs


def completion_log_probs(model: nn.Module, context: Tensor, completion: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [G] of a completion, with gradient."""
    logits = forward(model, torch.cat([context, completion])[None]).logits[0, len(context) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(-1, completion[:, None])[:, 0]


@torch.no_grad()
def features(
    model: nn.Module, context: Tensor, completion: Tensor, layers: list[int], pooling: str, normalize: str
) -> Tensor:
    """phi(c : y) from all hidden states of the whole network."""
    states = forward(model, torch.cat([context, completion])[None], output_hidden_states=True).hidden_states
    parts = []
    for layer in layers:
        own = states[layer][0, len(context) :].float()
        if normalize.startswith("token"):
            each = [layer] if normalize == "token_per_layer" else layers
            squares = sum(states[k][0, len(context) :].float().square().sum(dim=1) for k in each)
            own = torch.stack([row / square**0.5 for row, square in zip(own, squares, strict=True)])
        vector = {"last_token": own[-1], "mean": own.mean(0), "concat": own.flatten()}[pooling]
        parts.append(vector / vector.norm() if normalize == "per_layer" else vector)
    joined = torch.cat(parts)
    return joined / joined.norm() if normalize == "joint" else joined
