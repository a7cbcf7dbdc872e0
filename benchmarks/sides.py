"""The two sides of every comparison, with the same three pieces of work: rollouts, features, and a whole step.

    Ours    sequences run once, blocks against them, in the parts that `shapes.split_of` chooses
    Naive   the published way (`naive.py`), one sequence with its n copies at a time, which fills a machine already

Both start from the same weights and the same noise, and both end a step with the same clipping and AdamW.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from functools import cached_property

import torch
from torch import Tensor, nn

from benchmarks.naive import attending, naive_backward, naive_features, naive_rollouts
from benchmarks.settings import DEPTHS, Settings
from benchmarks.shapes import Inputs, autocast, compute_dtype, random_inputs, random_model, split_of
from ebft_study.cost import MicroBatchPlan
from ebft_study.features.local import LocalFeatures
from ebft_study.methods import MetricAccumulator
from ebft_study.methods.ebft import Ebft
from ebft_study.rollouts.strided import StridedRollouts


class Networks:
    """A generator, its optimizer, and the feature network with the same weights: whole, and as we use it."""

    def __init__(self, generator: nn.Module, *, frozen_dtype: torch.dtype = torch.float32) -> None:
        self.generator, self.frozen_dtype = generator, frozen_dtype
        self.parameters = list(generator.parameters())

    @staticmethod
    def from_settings(settings: Settings) -> Networks:
        """Random ones. Frozen weights have the type that passes compute in, as in training."""
        return Networks(random_model(settings), frozen_dtype=compute_dtype(settings))

    @cached_property
    def whole(self) -> nn.Module:
        return self._frozen()

    @cached_property
    def features(self) -> LocalFeatures:
        return LocalFeatures(self._frozen(), depths=DEPTHS, pooling="last_token", normalize="per_layer")

    def _frozen(self) -> nn.Module:
        network = copy.deepcopy(self.generator).eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter.data = parameter.data.to(self.frozen_dtype)
        return network

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        # At a learning rate of zero all is computed, and the next step is the same as this one.
        return torch.optim.AdamW(self.parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def update(self) -> None:
        """What follows the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Ours:
    """The package's way."""

    def __init__(self, settings: Settings, networks: Networks, inputs: Inputs | None = None) -> None:
        self.settings, self.networks, self.config = settings, networks, settings.run()
        self.inputs = inputs or random_inputs(settings)
        self.denominators = self.inputs.denominators
        self.tallies: list[MetricAccumulator] = []
        """Seconds by phase of every step so far."""

    @cached_property
    def split(self) -> MicroBatchPlan:
        """How a step is cut."""
        return split_of(self.settings)

    @torch.no_grad()
    def rollouts(self) -> Tensor:
        """Completions [S, B, n, G]."""
        model, temperature = self.networks.generator, self.config.rollout.temperature
        (fresh,) = self.inputs.parts(len(self.inputs))
        with autocast(self.settings):
            rollouts = StridedRollouts().sample(
                model, fresh.batch, fresh.anchors, noise=fresh.noise, temperature=temperature
            )
        return rollouts.completions

    def features(self, completions: Tensor) -> tuple[Tensor, Tensor]:
        """phi [S, B, n, d] and psi [S, B, d]."""
        (fresh,) = self.inputs.parts(len(self.inputs))
        with autocast(self.settings):
            embedded = self.networks.features.embed(fresh.batch, fresh.anchors, completions)[0]
        return embedded.phi, embedded.psi

    def backward(self, accumulator: MetricAccumulator, sampler: StridedRollouts | None = None) -> None:
        """The gradient of all sequences."""
        method = Ebft(
            self.config,
            rollouts=sampler or StridedRollouts(),
            features=self.networks.features,
            base=None,
            anchors_at_once=self.split.anchors_at_once,
        )
        for part in self.inputs.parts(self.split.micro_batch_size):
            with autocast(self.settings):
                method.backward(
                    self.networks.generator,
                    part.batch,
                    part.anchors,
                    noise=part.noise,
                    denominators=self.denominators,
                    accumulator=accumulator,
                )

    def step(self) -> None:
        """Gradient and update."""
        accumulator = MetricAccumulator()
        self.backward(accumulator)
        with accumulator.seconds("optimizer_seconds", self.inputs.noise.device):
            self.networks.update()
        self.tallies.append(accumulator)


class Naive:
    """The published way."""

    def __init__(self, settings: Settings, networks: Networks, inputs: Inputs | None = None) -> None:
        self.settings, self.networks, self.config = settings, networks, settings.run()
        self.inputs = inputs or random_inputs(settings)
        self.denominators = self.inputs.denominators

    def _attention(self) -> AbstractContextManager[None]:
        return attending(self.settings.naive_attention, self.networks.generator, self.networks.whole)

    def rollouts(self) -> Tensor:
        """See `Ours`."""
        model, temperature = self.networks.generator, self.config.rollout.temperature
        with autocast(self.settings), self._attention():
            parts = [
                naive_rollouts(model, part.batch, part.anchors, part.noise, temperature)
                for part in self.inputs.parts(1)
            ]
        return torch.cat(parts)

    def features(self, completions: Tensor) -> tuple[Tensor, Tensor]:
        """See `Ours`."""
        network, depths = self.networks.whole, self.config.features.depths
        with autocast(self.settings), self._attention():
            parts = [
                naive_features(network, part.batch, part.anchors, own, depths)
                for part, own in zip(self.inputs.parts(1), completions.split(1), strict=True)
            ]
        phi, psi = zip(*parts, strict=True)
        return torch.cat(phi), torch.cat(psi)

    def backward(self, completions: Tensor | None = None) -> None:
        """See `Ours`; `completions` [S, B, n, G] are scored instead of drawn ones."""
        chosen = [None] * len(self.inputs) if completions is None else completions.split(1)
        for part, own in zip(self.inputs.parts(1), chosen, strict=True):
            with autocast(self.settings), self._attention():
                naive_backward(
                    self.networks.generator,
                    self.networks.whole,
                    part.batch,
                    part.anchors,
                    noise=part.noise,
                    denominators=self.denominators,
                    config=self.config,
                    completions=own,
                )

    def step(self) -> None:
        """See `Ours`."""
        self.backward()
        self.networks.update()
