"""One optimizer update, and the run that it advances.

rows of the step -> this worker's share -> micro-batches -> gradients, added up over workers -> AdamW
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ebft_study.algorithm.anchors import Anchors
from ebft_study.algorithm.sampling import uniforms
from ebft_study.config import OptimizerConfig, RunConfig
from ebft_study.data import Batch, batch_indices
from ebft_study.errors import ConfigError, NonFiniteError
from ebft_study.methods import LossDenominators, Method, MetricAccumulator, Observations, SamplesAhead, off_policy
from ebft_study.methods.ebft import Ebft
from ebft_study.networks.loading import trained_parameters
from ebft_study.networks.sharding import is_sharded, unsharded
from ebft_study.rollouts import ROLLOUT_STREAM, anchors_of, answer_anchors
from ebft_study.training import vanishing
from ebft_study.training.distributed import full_tensor, max_over_workers, scoring, sum_gradients, sum_over_workers
from ebft_study.training.memory import MemoryPlan, smaller
from ebft_study.training.optimizer import ROUNDING_STREAM, new_optimizer
from ebft_study.training.setup import autocast, build_parts
from ebft_study.training.spent import CostMeter, Spent

if TYPE_CHECKING:
    from ebft_study.training.recorded import Services


class Run:
    """A run in memory: its components (`parts`), its optimizer, and its progress."""

    def __init__(
        self, config: RunConfig, *, rank: int = 0, world_size: int = 1, services: Services | None = None
    ) -> None:
        if config.training.batch_size < world_size:
            raise ConfigError(
                f"training.batch_size={config.training.batch_size}: {world_size} workers need at least one sequence "
                "each. Use a larger batch_size or fewer workers_per_trial"
            )
        self.config, self.rank, self.world_size = config, rank, world_size
        self.parts = build_parts(config, rank=rank, world_size=world_size, services=services)
        self.device, self.model = self.parts.device, self.parts.base.model
        self.step, self.tokens_seen = 0, 0
        self.accumulator, self.accumulated_steps = MetricAccumulator(), 0
        self.latest = dict[str, float]()
        self.has_warned = False
        self.notices = list[str]()
        """What the user should know of the last update."""
        self.rounding = Observations()
        """Differences of log-probabilities between two of the trainer's own passes: with an engine, in bfloat16."""
        self.spent = Spent()
        self.meter = CostMeter(config, self.parts.memory_plan, self.device, world_size=world_size)
        self.parameters = self.meter.parameters(self.model)
        self.average = WeightAverage(self.model, config.optimizer.ema_decay)
        self.optimizer = self._new_optimizer()

    @property
    def warming_up(self) -> bool:
        return self.step < self.config.training.warm_start_steps

    @property
    def method(self) -> Method:
        return self.parts.warm_start if self.warming_up else self.parts.method

    @property
    def metrics(self) -> dict[str, float]:
        """The latest metrics, with cost and size."""
        return {**self.latest, **self.spent.row(), **self.parameters}

    @property
    def is_logged(self) -> bool:
        """Whether this update ends with a row of training metrics."""
        step = self.step + 1
        return step % self.config.training.log_every_steps == 0 or step == self.config.total_steps

    @property
    def samples(self) -> bool:
        """Whether this step samples completions."""
        return self.config.method != "sft" and not self.warming_up

    @property
    def samples_from_engine(self) -> bool:
        """Whether this step's rollouts come from an engine; a warm start has none."""
        return self.config.uses_engine and not self.warming_up

    @property
    def peak_learning_rate(self) -> float:
        warm = self.config.training.warm_start_learning_rate
        return warm if self.warming_up and warm is not None else self.config.optimizer.learning_rate

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Forward passes inside have the configured precision."""
        return autocast(self.config, self.device)

    def sum_over_workers(self, values: Iterable[float]) -> list[float]:
        return sum_over_workers(values, self.world_size, self.device)

    def update(self) -> None:
        """Make one optimizer update."""
        started = time.perf_counter()
        if self.step == self.config.training.warm_start_steps > 0:
            self.optimizer = self._new_optimizer()
        if self.samples_from_engine:
            # What `batch` sums over all workers makes them wait for the transfer.
            with unsharded(self.model):
                self.parts.rollouts.update_weights(self.model, self.step)
        batch, anchors, noise, denominators = self.batch()
        compared, answers = self._compared(), self.accumulator.of("answer_tokens")
        loss = self._gradients(batch, anchors, noise, denominators)
        with self.accumulator.seconds("optimizer_seconds", self.device):
            sum_gradients(self.model, self.world_size)
        if self.samples_from_engine:
            self._check_parity(compared)
        with self.accumulator.seconds("optimizer_seconds", self.device):
            self._apply_gradients(loss)
        sampled = denominators.contexts * self.config.rollout.n_samples * self.config.rollout.completion_length
        if self.config.samples_answers:
            (sampled,) = self.sum_over_workers([self.accumulator.of("answer_tokens").total - answers.total])
        sampled = sampled if self.samples else 0.0
        cost = self.meter.update(samples=self.samples, sampled_tokens=sampled)
        self.step += 1
        self.tokens_seen += int(self.sum_over_workers([float((batch.document_ids >= 0).sum())])[0])
        for name, (total, count) in self.parts.features.drain_usage().items():
            self.accumulator.add(name, total, count)
        seconds = time.perf_counter() - started
        self.accumulator.add("step_seconds", seconds, 1.0)
        self.spent.add_update(cost, sampled_tokens=sampled, seconds=seconds)
        self.accumulated_steps += 1

    def batch(self) -> tuple[Batch, Anchors, Tensor, LossDenominators]:
        """This worker's rows of the step, with anchors, noise, and the denominators of the losses of all workers.

        Where weights are sharded, all workers must make the same passes: each has as many rows and anchors as any.
        """
        config, data, rollout = self.config, self.parts.data["train"], self.config.rollout
        indices = batch_indices(size=len(data), batch_size=config.training.batch_size, step=self.step, seed=config.seed)
        batch = data.rows(indices[self.rank :: self.world_size]).to(self.device)
        if is_sharded(self.model):
            batch = batch.padded(-(-config.training.batch_size // self.world_size))
        anchors, length = anchors_of(batch, rollout), rollout.completion_length
        if config.samples_answers:  # whose draws follow from step and row alone
            anchors, length = answer_anchors(batch, config.max_answer_tokens), 0
        if is_sharded(self.model):
            (most,) = max_over_workers([anchors.positions.shape[1]], self.world_size, self.device)
            anchors = anchors.padded(int(most))
        noise = uniforms(
            (config.seed, ROLLOUT_STREAM, self.step),
            batch.indices.tolist(),
            n_anchors=anchors.positions.shape[1],
            n_samples=rollout.n_samples,
            length=length,
        )
        counts = float(anchors.valid.sum()), float(batch.ce_mask(config.loss.ce_region).sum())
        contexts, ce_tokens = self.sum_over_workers(counts)
        return batch, anchors, noise, LossDenominators(contexts, max(ce_tokens, 1.0), self.step)

    def _gradients(self, batch: Batch, anchors: Anchors, noise: Tensor, denominators: LossDenominators) -> float:
        """Gradients of this worker's rows, in smaller passes if memory runs out; returns its share of the loss.

        Several workers cannot do so: the others wait in the passes that they share.
        """
        seen = dict(self.accumulator.observed)
        while True:
            try:
                loss, plan = 0.0, self.parts.memory_plan
                parts = list(_micro_batches(batch, anchors, noise, plan.micro_batch_size))
                self._prepare(parts)
                with scoring(self.model):
                    for part in parts:
                        loss += self._backward(*part, denominators)
                return loss
            except torch.OutOfMemoryError:
                less = smaller(self.config, self.device.type, plan) if self.world_size == 1 else None
                if less is None:
                    raise
            # Below the handler, whose traceback holds the tensors of the pass.
            self.notices.append(f"step {self.step + 1} ran out of memory: {plan.describe()}. Now {less.describe()}")
            self._set_plan(less)
            self.accumulator.observed = dict(seen)
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _set_plan(self, plan: MemoryPlan) -> None:
        self.parts.memory_plan = plan
        self.meter.set_passes(plan)
        if isinstance(self.parts.method, Ebft):
            self.parts.method.anchors_at_once = plan.anchors_at_once

    def _prepare(self, parts: list[tuple[Batch, Anchors, Tensor]]) -> None:
        """Sample for all micro-batches, with a method that does so before the first gradient."""
        if isinstance(self.method, SamplesAhead):
            sequences = [(batch, anchors) for batch, anchors, _ in parts]
            with unsharded(self.model), self.autocast():
                self.method.prepare(self.model, sequences, policy_version=self.step, accumulator=self.accumulator)

    def _backward(self, batch: Batch, anchors: Anchors, noise: Tensor, denominators: LossDenominators) -> float:
        """Gradients of a micro-batch; returns its share of the loss."""
        with self.autocast():
            loss = self.method.backward(
                self.model, batch, anchors, noise=noise, denominators=denominators, accumulator=self.accumulator
            )
        self.accumulator.add("loss", loss, float(len(batch.indices)))
        return loss

    def _compared(self) -> list[float]:
        """Sums and numbers of differences so far: of the engine from the trainer, and of the trainer from itself."""
        observed = (self.accumulator.of(name) for name in (off_policy.DIFFERENCE, off_policy.NOISE))
        return [number for each in observed for number in (each.total, each.count)]

    def _check_parity(self, before: list[float]) -> None:
        """Check the engine's differences of this step, before the weights change."""
        since = (now - then for now, then in zip(self._compared(), before, strict=True))
        total, count, noise, probed = self.sum_over_workers(since)
        self.rounding += Observations(probed, noise)
        mean = self.rounding.total / max(self.rounding.count, 1.0)
        off_policy.check_parity(self.config, total, count, version=self.step, noise=mean)

    def _apply_gradients(self, loss: float) -> None:
        config, warm = self.config.optimizer, self.config.training.warm_start_steps
        parameters = trained_parameters(self.model).values()
        limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
        norm = float(full_tensor(torch.nn.utils.clip_grad_norm_(parameters, limit)))
        (total,) = self.sum_over_workers([loss])
        for quantity, value in (("loss", total), ("grad_norm", norm)):
            if not math.isfinite(value):
                raise NonFiniteError(quantity, value, self.step + 1)
        within, length = (self.step, warm) if self.warming_up else (self.step - warm, self.config.training.steps)
        rate = learning_rate_at(config, self.peak_learning_rate, within, length)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        unchanged = vanishing.watch(parameters) if self.is_logged and rate > 0 else None
        self.optimizer.step()
        if unchanged is not None:
            self.accumulator.add(vanishing.METRIC, *unchanged())
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.model)
        if self.rank == 0:
            self.accumulator.add("grad_norm", norm, 1.0)
            self.latest["learning_rate"] = rate

    def _new_optimizer(self) -> torch.optim.AdamW:
        parameters = list(trained_parameters(self.model).values())
        shard = self.rank if is_sharded(self.model) else 0  # workers that all hold a weight must round it alike
        return new_optimizer(
            parameters,
            self.config.optimizer,
            learning_rate=self.peak_learning_rate,
            rounding_key=lambda: (self.config.seed, ROUNDING_STREAM, self.step, shard),
        )


def _micro_batches(batch: Batch, anchors: Anchors, noise: Tensor, size: int) -> Iterator[tuple[Batch, Anchors, Tensor]]:
    for rows in torch.arange(len(batch.indices)).split(size):
        on_device = rows.to(batch.indices.device)
        yield batch.select(on_device), Anchors(*(tensor[on_device] for tensor in anchors)), noise[rows]


def learning_rate_at(config: OptimizerConfig, peak: float, step: int, steps: int) -> float:
    """Learning rate of update `step` (0-based) of `steps`: linear warm-up, then constant or cosine."""
    warmup = math.ceil(config.warmup_fraction * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant":
        return peak
    done = (step - warmup) / max(steps - warmup, 1)
    floor = config.final_learning_rate_fraction
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


class WeightAverage:
    """Exponential moving average (EMA) of the weights: `average <- decay * average + (1 - decay) * weights`.

    It holds the trained weights alone, in float32: in fewer digits the small steps of an average would be lost. With
    `decay` None there is no average.
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {}
        if decay is not None:
            self.weights = {name: p.detach().float().clone() for name, p in trained_parameters(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the current weights."""
        if self.decay is not None:
            for name, weight in trained_parameters(model).items():
                self.weights[name].lerp_(weight.float(), 1.0 - self.decay)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Context in which the model has the averaged weights; its own are restored afterwards."""
        own = self._exchange(model, self.weights)
        try:
            yield
        finally:
            self._exchange(model, own)

    @torch.no_grad()
    def _exchange(self, model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy weights into the model; returns copies of its former weights."""
        if self.decay is None:
            return {}
        parameters = trained_parameters(model)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
        return before
