"""Chunked log-probabilities against a plain log-softmax over all logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ebft_study.algorithm.log_probs import sample_tokens, token_log_probs
from ebft_study.algorithm.sampling import draw

M, H, V = 11, 6, 9


def inputs(*, bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(M, H), (V, H), (V,)]
    states, weight, offset = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    )
    return states, weight, offset if bias else None


def plain(states: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float) -> Tensor:
    logits = states @ weight.T + (0 if bias is None else bias)
    return (logits / temperature).log_softmax(dim=-1).gather(-1, tokens)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("per_state", [1, 3])
@pytest.mark.parametrize("logits_at_once", [1, 4 * V, 10**6])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_values_and_gradients_equal_a_plain_log_softmax_whatever_the_chunk(
    bias: bool, per_state: int, logits_at_once: int, temperature: float
) -> None:
    states, weight, offset = inputs(bias=bias)
    tokens = torch.randint(0, V, (M, per_state), generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(M, per_state, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours = token_log_probs(states, weight, tokens, temperature=temperature, logits_at_once=logits_at_once, bias=offset)
    expected = plain(states, weight, offset, tokens, temperature)
    torch.testing.assert_close(ours, expected)
    leaves = [tensor for tensor in (states, weight, offset) if tensor is not None]
    both = (torch.autograd.grad(output, leaves, upstream) for output in (ours, expected))
    for gradient, reference in zip(*both, strict=True):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("logits_at_once", [1, 4 * V, 10**6])
def test_drawn_tokens_follow_the_noise_and_carry_the_gradient_of_their_log_probs(logits_at_once: int) -> None:
    states, weight, _ = inputs(bias=False)
    noise = torch.rand(M, 4, generator=torch.Generator().manual_seed(3))
    tokens, log_probs = sample_tokens(states, weight, noise, temperature=0.7, logits_at_once=logits_at_once)
    assert torch.equal(tokens, draw((states @ weight.T / 0.7).softmax(dim=-1), noise))
    expected = plain(states, weight, None, tokens, 0.7)
    torch.testing.assert_close(log_probs, expected)
    both = (torch.autograd.grad(output.square().sum(), [states, weight]) for output in (log_probs, expected))
    for gradient, reference in zip(*both, strict=True):
        torch.testing.assert_close(gradient, reference)


def test_a_frozen_head_gets_no_gradient_and_the_states_do() -> None:
    states, weight, _ = inputs(bias=False)
    tokens = torch.zeros(M, 1, dtype=torch.long)
    frozen = weight.detach()
    token_log_probs(states, frozen, tokens, temperature=1.0, logits_at_once=V).sum().backward()
    assert frozen.grad is None
    (expected,) = torch.autograd.grad(plain(states, frozen, None, tokens, 1.0).sum(), states)
    torch.testing.assert_close(states.grad, expected)


def test_no_states_give_no_log_probs() -> None:
    _, weight, _ = inputs(bias=False)
    tokens = torch.zeros(0, 1, dtype=torch.long)
    empty = torch.zeros(0, H, dtype=torch.float64, requires_grad=True)
    log_probs = token_log_probs(empty, weight, tokens, temperature=1.0, logits_at_once=V)
    assert log_probs.shape == (0, 1)
    log_probs.sum().backward()
    assert float(weight.grad.abs().max()) == 0.0


def test_under_autocast_products_are_bfloat16_and_log_probs_and_gradients_float32() -> None:
    states, weight, _ = inputs(bias=False)
    low = [tensor.detach().float().requires_grad_() for tensor in (states, weight)]
    tokens = torch.randint(0, V, (M, 1), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = token_log_probs(low[0], low[1], tokens, temperature=0.7, logits_at_once=10**6)
    assert ours.dtype == torch.float32
    ours.sum().backward()
    plain(states, weight, None, tokens, 0.7).sum().backward()
    for found, wanted in zip(low, (states, weight), strict=True):
        assert found.grad.dtype == torch.float32
        torch.testing.assert_close(found.grad, wanted.grad.float(), atol=0.1, rtol=0.05)
