"""Measure how much signal one gradient has: the same update under different rewards and numbers of samples.

The gradient of one step is a noisy estimate of its expectation over batches and rollouts. From M independent steps at
unchanged weights follow, without bias, the squared length of that expectation (signal), the variance around it
(noise), and the angle to another setting's expectation.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ebft_study.config import RunConfig, build_run, merge
from ebft_study.methods import MetricAccumulator
from ebft_study.progress import Progress
from ebft_study.training.update import Run


def gradient_noise(
    config: RunConfig, *, whitenings: Sequence[str], n_samples: Sequence[int], draws: int
) -> list[dict[str, Any]]:
    """One row per setting; the first one is the reference that `cosine` refers to.

    Returns:
        Rows of whitening, n_samples, `signal_to_noise` (squared expectation over variance, of one step's gradient;
        a mean over k steps has k times as much) and `cosine` of the expected gradient with the reference's.
    """
    settings = list(itertools.product(whitenings, n_samples))
    with Progress("gradients", len(settings) * draws) as progress:
        gradients = [_gradients(config, whitening, n, draws, progress) for whitening, n in settings]
    rows = []
    for (whitening, n), drawn in zip(settings, gradients, strict=True):
        signal, noise = signal_and_noise(drawn)
        rows.append(
            {
                "whitening": whitening,
                "n_samples": n,
                "signal_to_noise": signal / noise,
                "cosine": cosine(drawn, gradients[0]),
            }
        )
    return rows


def signal_and_noise(gradients: Tensor) -> tuple[float, float]:
    """Unbiased `|E g|^2` and `E |g - E g|^2` from independent gradients [M, P]."""
    signal = _cross(gradients, gradients)
    return signal, float(gradients.double().square().sum(dim=1).mean()) - signal


def cosine(first: Tensor, second: Tensor) -> float:
    """Cosine between the expectations of two settings, [M, P] each, row m of both from the same batch.

    Pairs of equal m are left out, so that shared batch noise does not pass for agreement. NaN without signal.
    """
    lengths = _cross(first, first) * _cross(second, second)
    return _cross(first, second) / lengths**0.5 if lengths > 0 else float("nan")


def _cross(first: Tensor, second: Tensor) -> float:
    first, second = first.double(), second.double()
    M = len(first)
    return float(first.sum(dim=0) @ second.sum(dim=0) - (first * second).sum()) / (M * (M - 1))


def _gradients(config: RunConfig, whitening: str, n: int, draws: int, progress: Progress) -> Tensor:
    changes = {"reward": {"whitening": whitening}, "rollout": {"n_samples": n}}
    varied = build_run(merge(config.model_dump(), changes), source="gradient-noise")
    run = Run(varied)
    rows = []
    for draw in range(draws):
        run.step = draw
        batch, anchors, noise, denominators = run.batch()
        run.parts.method.backward(
            run.model, batch, anchors, noise=noise, denominators=denominators, accumulator=MetricAccumulator()
        )
        rows.append(torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]))
        run.model.zero_grad(set_to_none=True)
        progress.advance(f"whitening={whitening} n_samples={n}")
    return torch.stack(rows)
