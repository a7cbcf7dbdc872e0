"""The contenders: our step and the naive one, each with rollouts, features, and the whole step.

    Ours    a sequence runs once, blocks against it, as `workload.micro_batch_plan` cuts them
    Naive   the published way (`naive.py`), one sequence with its n copies at a time, which fills a machine already

Both start from the same weights and the same noise, and both end a step with the same clipping and AdamW.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.naive import attending, naive_features, naive_log_probs, naive_rewards, naive_rollouts
from benchmarks.settings import DEPTHS, Settings
from benchmarks.workload import Inputs, autocast, compute_dtype, micro_batch_plan, random_inputs, random_model
from ebft_study.algorithm.advantages import feature_matching_advantages
from ebft_study.algorithm.losses import cross_entropy_loss, next_token_mask, policy_gradient_loss
from ebft_study.cost import MicroBatchPlan
from ebft_study.features.local import LocalFeatures
from ebft_study.methods import MetricAccumulator, differentiate
from ebft_study.methods.ebft import Ebft
from ebft_study.rollouts.strided import StridedRollouts

if TYPE_CHECKING:
    from ebft_study.config import RunConfig


class Networks:
    """A generator, its optimizer, and the feature network with the same weights: whole, and as we use it."""

    def __init__(self, generator: PreTrainedModel, *, frozen_dtype: torch.dtype = torch.float32) -> None:
        self.generator, self.frozen_dtype = generator, frozen_dtype
        self.parameters = [parameter for parameter in generator.parameters() if parameter.requires_grad]
        self.has_adapters = len(self.parameters) < len(list(generator.parameters()))

    @staticmethod
    def from_settings(settings: Settings) -> Networks:
        """Random networks. Frozen weights have the type that passes compute in, as in training."""
        return Networks(random_model(settings), frozen_dtype=compute_dtype(settings))

    @cached_property
    def whole(self) -> PreTrainedModel:
        return self._frozen()

    @cached_property
    def features(self) -> LocalFeatures:
        network: nn.Module = self.generator if self.has_adapters else self._frozen()
        shared = self.has_adapters
        return LocalFeatures(network, depths=DEPTHS, pooling="last_token", normalize="per_layer", shared=shared)

    def _frozen(self) -> PreTrainedModel:
        network = copy.deepcopy(self.generator).eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter.data = parameter.data.to(self.frozen_dtype)
        return network

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        # At a learning rate of zero all is computed, and the next step is the same as this one.
        return torch.optim.AdamW(self.parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def update(self) -> None:
        """Clip the gradients, take the optimizer's step, and drop the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class _Contender:
    """A way of computing a step, on networks and inputs."""

    def __init__(self, settings: Settings, networks: Networks, inputs: Inputs | None = None) -> None:
        self.settings, self.networks, self.config = settings, networks, settings.config
        self.inputs = inputs or random_inputs(settings)
        self.denominators = self.inputs.denominators


class Ours(_Contender):
    """The package's way."""

    @cached_property
    def plan(self) -> MicroBatchPlan:
        return micro_batch_plan(self.settings)

    @cached_property
    def accumulators(self) -> list[MetricAccumulator]:
        """Seconds by phase of every step so far."""
        return []

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
        """Add the gradient of all sequences to the parameters."""
        method = Ebft(
            cast("RunConfig", self.config),
            rollouts=sampler or StridedRollouts(),
            features=self.networks.features,
            base=None,
            anchors_at_once=self.plan.anchors_at_once,
        )
        for part in self.inputs.parts(self.plan.micro_batch_size):
            with autocast(self.settings):
                method.backward(
                    self.networks.generator,
                    part.batch,
                    part.anchors,
                    noise=part.noise,
                    denominators=self.denominators,
                    accumulator=accumulator,
                )

    def step(self, accumulator: MetricAccumulator | None = None) -> None:
        """Compute the gradient, and update; an `accumulator` of one's own observes the phases."""
        accumulator = accumulator or MetricAccumulator()
        self.backward(accumulator)
        with accumulator.seconds("optimizer_seconds", self.inputs.noise.device):
            self.networks.update()
        self.accumulators.append(accumulator)


class Naive(_Contender):
    """The published way, one sequence at a time; methods as those of `Ours`."""

    @contextmanager
    def _passes(self) -> Iterator[None]:
        models = self.networks.generator, self.networks.whole
        with autocast(self.settings), attending(self.settings.naive_attention, *models):
            yield

    def rollouts(self) -> Tensor:
        with self._passes():
            return torch.cat([self._sample(part) for part in self.inputs.parts(1)])

    def features(self, completions: Tensor) -> tuple[Tensor, Tensor]:
        with self._passes():
            parts = [
                self._embed(part, own) for part, own in zip(self.inputs.parts(1), completions.split(1), strict=True)
            ]
        phi, psi = zip(*parts, strict=True)
        return torch.cat(phi), torch.cat(psi)

    def backward(self, completions: Tensor | None = None) -> None:
        """`completions` [S, B, n, G] are scored instead of drawn ones."""
        given = [None] * len(self.inputs) if completions is None else completions.split(1)
        for part, own in zip(self.inputs.parts(1), given, strict=True):
            with self._passes():
                differentiate(self._loss(part, self._sample(part) if own is None else own))

    def step(self) -> None:
        self.backward()
        self.networks.update()

    def _sample(self, part: Inputs) -> Tensor:
        model, temperature = self.networks.generator, self.config.rollout.temperature
        return naive_rollouts(model, part.batch, part.anchors, part.noise, temperature)

    def _embed(self, part: Inputs, completions: Tensor) -> tuple[Tensor, Tensor]:
        depths = self.config.features.depths
        return naive_features(self.networks.whole, part.batch, part.anchors, completions, depths)

    def _loss(self, part: Inputs, completions: Tensor) -> Tensor:
        """Share of these sequences in the loss."""
        config, temperature = self.config, self.config.rollout.temperature
        phi, psi = self._embed(part, completions)
        with torch.autocast(phi.device.type, enabled=False):
            rewards = naive_rewards(phi, psi)
        advantages = feature_matching_advantages(*rewards, alpha=config.reward.alpha, baseline=config.reward.baseline)
        sampled, truth = naive_log_probs(self.networks.generator, part.batch, part.anchors, completions, temperature)
        policy = policy_gradient_loss(
            sampled,
            advantages,
            part.anchors.valid,
            aggregation=config.loss.aggregation,
            denominator=self.denominators.contexts * advantages.shape[-1],
        )
        mask = next_token_mask(part.batch.document_ids)
        cross_entropy = cross_entropy_loss(truth, mask, denominator=self.denominators.ce_tokens)
        return policy + config.loss.gamma * cross_entropy
