"""Check that both contenders compute the same, in float32, on the first of the sequences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Naive, Networks, Ours
from benchmarks.naive import naive_log_probs, naive_logits
from benchmarks.rows import Row, judged
from benchmarks.settings import Settings
from benchmarks.workload import random_inputs
from ebft_study.methods import MetricAccumulator
from ebft_study.rollouts import Rollouts
from ebft_study.rollouts.strided import StridedRollouts

TOLERANCE = 1e-5
"""Largest difference of log-probabilities, features, and positions in a cumulative distribution."""
GRADIENT_TOLERANCE = 1e-4
"""Relative to the largest entry of a parameter's gradient."""


class _Recorder(StridedRollouts):
    """Strided rollouts that record their samples, some anchors at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.sampled: list[Rollouts] = []

    def sample(self, *args: Any, **kwargs: Any) -> Rollouts:
        self.sampled.append(super().sample(*args, **kwargs))
        return self.sampled[-1]


def agreement(settings: Settings) -> list[Row]:
    """Differences of the contenders on the completions that ours draws, and whether naive sampling draws the same."""
    alone = replace(settings.at(settings.sequence_length), batch_size=1, precision="float32", micro_batch_size=None)
    networks, inputs = Networks.from_settings(alone), random_inputs(alone)
    return compare(Ours(alone, networks, inputs), Naive(alone, networks, inputs))


def compare(ours: Ours, naive: Naive) -> list[Row]:
    """The rows of `agreement`; both contenders have the same inputs in one micro-batch."""
    inputs, valid, sampler = ours.inputs, ours.inputs.anchors.valid, _Recorder()
    ours.backward(MetricAccumulator(), sampler)
    gradients = _take_gradients(ours.networks)
    completions = torch.cat([part.completions for part in sampler.sampled], dim=1)
    log_probs = torch.cat([part.log_probs.detach() for part in sampler.sampled], dim=1)
    naive.backward(completions)
    expected_gradients = _take_gradients(naive.networks)
    with torch.no_grad():
        expected, _ = naive_log_probs(
            naive.networks.generator, inputs.batch, inputs.anchors, completions, naive.config.rollout.temperature
        )
    same = (naive.rollouts() == completions).all(dim=-1)[valid]
    features = zip(ours.features(completions), naive.features(completions), strict=True)
    gradient_errors = [
        _difference(gradient, other) / max(float(other.abs().max()), torch.finfo(torch.float32).tiny)
        for gradient, other in zip(gradients, expected_gradients, strict=True)
    ]
    return [
        Row("agreement/identical_completions", float(same.double().mean())),
        judged("agreement/contradicted_draws", _contradicted(naive, completions), 0.0),
        judged("agreement/log_probs", _difference(log_probs[valid], expected[valid]), TOLERANCE),
        judged("agreement/features", largest([_difference(a[valid], b[valid]) for a, b in features]), TOLERANCE),
        judged("agreement/gradients", largest(gradient_errors), GRADIENT_TOLERANCE),
    ]


def largest(differences: list[float]) -> float:
    """The maximum; unlike Python's, it keeps NaN."""
    return float(torch.tensor(differences).max())


def _take_gradients(networks: Networks) -> list[Tensor]:
    """Gradients of all parameters, which are left without."""
    gradients = [p.grad.cpu() for p in networks.parameters if p.grad is not None]
    for parameter in networks.parameters:
        parameter.grad = None
    return gradients


def _difference(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).abs().max()) if first.numel() else 0.0


@torch.no_grad()
def _contradicted(naive: Naive, completions: Tensor) -> float:
    """Tokens that the naive distributions would not have drawn with this noise, wherever it falls within rounding.

    Two correct ways may draw different tokens where the noise is on the border between them, and a completion goes
    another way from there. So whole completions are counted as identical or not, and every single draw is judged.
    """
    inputs, temperature = naive.inputs, naive.config.rollout.temperature
    logits, _ = naive_logits(naive.networks.generator, inputs.batch, inputs.anchors, completions)
    probabilities = (logits / temperature).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    upper, slices = (values.gather(-1, completions[..., None])[..., 0] for values in (cumulative, probabilities))
    drawn_at = inputs.noise.to(upper) * cumulative[..., -1]
    wrong = (drawn_at < upper - slices - TOLERANCE) | (drawn_at > upper + TOLERANCE)
    return float(wrong[inputs.anchors.valid].sum())
