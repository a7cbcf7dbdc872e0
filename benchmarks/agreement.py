"""Whether both sides compute the same, in float32, on the first of the sequences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.naive import naive_log_probs, naive_logits
from benchmarks.rows import Row, judged
from benchmarks.settings import Settings
from benchmarks.shapes import Inputs, random_inputs
from benchmarks.sides import Naive, Networks, Ours
from ebft_study.methods import MetricAccumulator
from ebft_study.rollouts import Rollouts
from ebft_study.rollouts.strided import StridedRollouts

TOLERANCE = 1e-5
"""Of log-probabilities, features, and places in a cumulative distribution."""
GRADIENT_TOLERANCE = 1e-4
"""Relative to the largest entry of a parameter's gradient."""


class _Remembering(StridedRollouts):
    """Keeps what was sampled, for some anchors after others."""

    def __init__(self) -> None:
        self.sampled: list[Rollouts] = []

    def sample(self, *args: Any, **kwargs: Any) -> Rollouts:
        self.sampled.append(super().sample(*args, **kwargs))
        return self.sampled[-1]

    def joined(self) -> tuple[Tensor, Tensor]:
        """Completions and log-probabilities of all anchors, [S, B, n, G] both."""
        completions = torch.cat([part.completions for part in self.sampled], dim=1)
        return completions, torch.cat([part.log_probs.detach() for part in self.sampled], dim=1)


def agreement(settings: Settings) -> list[Row]:
    """Differences of the two sides on the completions that ours drew, and whether naive sampling draws the same."""
    alone = replace(settings.at(settings.sequence_length), batch_size=1, precision="float32", micro_batch_size=None)
    networks, inputs = Networks.from_settings(alone), random_inputs(alone)
    return compare(Ours(alone, networks, inputs), Naive(alone, networks, inputs))


def compare(ours: Ours, naive: Naive) -> list[Row]:
    """See `agreement`; both sides hold the same inputs in one micro-batch."""
    inputs, valid = ours.inputs, ours.inputs.anchors.valid
    sampler = _Remembering()
    ours.backward(MetricAccumulator(), sampler)
    gradients = _take_gradients(ours.networks)
    completions, log_probs = sampler.joined()
    naive.backward(completions)
    with torch.no_grad():
        expected, _ = naive_log_probs(
            naive.networks.generator, inputs.batch, inputs.anchors, completions, naive.config.rollout.temperature
        )
    same = (naive.rollouts() == completions).all(dim=-1)[valid]
    features = zip(ours.features(completions), naive.features(completions), strict=True)
    return [
        Row("agreement/identical_completions", float(same.double().mean())),
        judged("agreement/contradicted_draws", _contradicted(naive, inputs, completions), 0.0),
        judged("agreement/log_probs", _difference(log_probs[valid], expected[valid]), TOLERANCE),
        judged("agreement/features", _worst([_difference(a[valid], b[valid]) for a, b in features]), TOLERANCE),
        judged("agreement/gradients", _relative(gradients, _take_gradients(naive.networks)), GRADIENT_TOLERANCE),
    ]


def _take_gradients(networks: Networks) -> list[Tensor]:
    """Gradients of all parameters, which are left without."""
    taken = [p.grad.cpu() for p in networks.parameters if p.grad is not None]
    for parameter in networks.parameters:
        parameter.grad = None
    return taken


def _difference(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).abs().max()) if first.numel() else 0.0


def _worst(differences: list[float]) -> float:
    return float(torch.tensor(differences).max())  # unlike Python's, it keeps NaN


def _relative(gradients: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of any parameter, relative to its largest entry."""
    smallest = torch.finfo(torch.float32).tiny
    pairs = zip(gradients, expected, strict=True)
    return _worst([_difference(own, other) / max(float(other.abs().max()), smallest) for own, other in pairs])


@torch.no_grad()
def _contradicted(naive: Naive, inputs: Inputs, completions: Tensor) -> float:
    """Tokens that the naive distributions would not have drawn with this noise, wherever it falls within rounding.

    Two correct ways may draw different tokens where the noise lies on the border between them, and a completion goes
    another way from there. So whole completions are counted as identical or not, and every single draw is judged.
    """
    anchors, tau = inputs.anchors, naive.config.rollout.temperature
    logits, _ = naive_logits(naive.networks.generator, inputs.batch, anchors, completions)
    probabilities = (logits / tau).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    upper, slices = (values.gather(-1, completions[..., None])[..., 0] for values in (cumulative, probabilities))
    drawn_at = inputs.noise.to(upper) * cumulative[..., -1]
    wrong = (drawn_at < upper - slices - TOLERANCE) | (drawn_at > upper + TOLERANCE)
    return float(wrong[anchors.valid].sum())
