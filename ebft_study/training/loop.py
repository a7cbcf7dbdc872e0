"""The training loop of one run. Ray is not needed; under Ray Train every worker runs exactly this.

    step 0: evaluate the base model
    warm_start_steps updates by SFT, then `steps` updates by the method:
        rows of this step -> this worker's share -> micro-batches -> gradients, added up over workers -> AdamW
    every log_every_steps a row of metrics, every eval_every_steps validation, every checkpoint_every_steps a checkpoint
    at the end: held-out evaluation

Everything random is a function of (seed, step, row): a resumed run continues bit for bit (with a feature service, to
rounding), and the number of workers changes nothing but rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ebft_study import evaluation
from ebft_study.algorithm.anchors import Anchors
from ebft_study.algorithm.sampling import uniforms
from ebft_study.config import RunConfig
from ebft_study.data import Batch, batch_indices
from ebft_study.errors import CheckpointError, ConfigError, NonFiniteError, ParityError
from ebft_study.evaluation import base as base_evaluation
from ebft_study.methods import LossDenominators, MetricAccumulator, off_policy
from ebft_study.methods.sft import ce_mask
from ebft_study.networks.loading import trained_parameters
from ebft_study.rollouts import anchors_of
from ebft_study.training import checkpoint, state
from ebft_study.training.averaging import WeightAverage
from ebft_study.training.distributed import sum_accumulator, sum_gradients, sum_measured, sum_over_workers
from ebft_study.training.metrics import TALLIED, row_of
from ebft_study.training.run_result import RunResult
from ebft_study.training.samples import sample_rows
from ebft_study.training.services import Services
from ebft_study.training.setup import build_optimizer, build_parts, learning_rate_at, scale_out
from ebft_study.training.sharding import full_tensor, is_sharded, unsharded

Report = Callable[[dict[str, float], Path | None], None]
ROLLOUT_STREAM = 1
"""Keeps the noise of training rollouts apart from that of evaluations."""


class Recorder(Protocol):
    """Where a run's numbers go (`results.writer.TrialRecorder`)."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def evaluations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def event(self, kind: str, message: str, **details: Any) -> None: ...


def train(
    config: RunConfig,
    *,
    recorder: Recorder | None,
    on_report: Report,
    start_from: Path | None = None,
    rank: int = 0,
    world_size: int = 1,
    services: Services | None = None,
) -> RunResult:
    """Run `config` from the beginning or from a checkpoint folder to its last step.

    Args:
        recorder: where rows go; None on workers other than the first.
        on_report: called on every worker at every evaluation and checkpoint step with the latest metrics and, on the
            first worker, the folder of a new checkpoint, which is deleted after the call.
        start_from: a checkpoint folder to continue from.
        services: the processes beside this one that the run may use; None: everything is done in process.

    Returns:
        The outcome. A non-finite loss, or an engine that disagrees with the trainer, ends the run with status
        `stopped`; it does not raise.
    """
    run = Run(config, recorder, on_report, rank, world_size, services)
    try:
        run.start(start_from)
        while run.step < config.total_steps:
            run.update()
            run.observe()
        run.finish()
    except (NonFiniteError, ParityError) as error:
        return run.stop(str(error))
    finally:
        run.parts.rollouts.close()
    return run.outcome("finished", "")


class Run:
    """The state of a run between steps."""

    def __init__(
        self,
        config: RunConfig,
        recorder: Recorder | None,
        on_report: Report,
        rank: int,
        world_size: int,
        services: Services | None = None,
    ) -> None:
        if config.training.batch_size < world_size:
            raise ConfigError(
                f"training.batch_size={config.training.batch_size}: {world_size} workers need at least one sequence "
                "each. Use a larger batch_size or fewer workers_per_trial"
            )
        self.started = time.perf_counter()
        self.config, self.recorder, self.on_report = config, recorder, on_report
        self.rank, self.world_size = rank, world_size
        self.parts = build_parts(config, world_size=world_size, services=services)
        self.device, self.model = self.parts.device, self.parts.base.model
        self.remarks = [*scale_out(config, self.model, world_size=world_size), self.parts.memory_plan.describe()]
        self.model.train()
        self.step, self.tokens_seen = 0, 0
        self.accumulator, self.tally_steps, self.latest = MetricAccumulator(), 0, dict[str, float]()
        self.average = WeightAverage(self.model, config.optimizer.ema_decay)
        self.optimizer = self._new_optimizer()
        self.startup_seconds = float("nan")

    # --- phases ------------------------------------------------------------------------------------------------

    @property
    def warming_up(self) -> bool:
        return self.step < self.config.training.warm_start_steps

    @property
    def samples_from_engine(self) -> bool:
        """Whether this step's rollouts do; a warm start has none."""
        return self.config.uses_engine and not self.warming_up

    @property
    def method(self) -> Any:
        return self.parts.warm_start if self.warming_up else self.parts.method

    @property
    def peak_learning_rate(self) -> float:
        warm = self.config.training.warm_start_learning_rate
        return warm if self.warming_up and warm is not None else self.config.optimizer.learning_rate

    def _new_optimizer(self) -> torch.optim.AdamW:
        return build_optimizer(self.model, self.config.optimizer, learning_rate=self.peak_learning_rate)

    def start(self, start_from: Path | None) -> None:
        """Continue from a checkpoint, or evaluate the base model."""
        if start_from is not None:
            self._restore(start_from)
            self.on_report({**self.latest, "step": float(self.step)}, None)
            return
        self._record_event("started", "; ".join([f"{self.config.method} on {self.config.model}", *self.remarks]))
        self._evaluate_base()
        self._report(None)

    def update(self) -> None:
        """One optimizer update."""
        if math.isnan(self.startup_seconds):
            self.startup_seconds = time.perf_counter() - self.started
        if self.step == self.config.training.warm_start_steps > 0:
            self.optimizer = self._new_optimizer()
        before = time.perf_counter()
        self._hand_over_weights()
        rows, anchors, noise, denominators = self.batch()
        every = torch.arange(len(rows.indices))
        loss, compared = 0.0, self._compared()
        with unsharded(self.model):
            for part in every.split(self.parts.memory_plan.split.micro_batch_size):
                loss += self._backward(rows, anchors, noise, denominators, part)
            with self.accumulator.seconds("optimizer_seconds", self.device):
                sum_gradients(self.model, self.world_size)
        self._check_parity(compared)
        with self.accumulator.seconds("optimizer_seconds", self.device):
            self._apply_gradients(loss)
        self.step += 1
        real_tokens = float((rows.document_ids >= 0).sum())
        self.tokens_seen += int(sum_over_workers([real_tokens], self.world_size, self.device)[0])
        for name, (total, count) in self.parts.features.drain_usage().items():
            self.accumulator.add(name, total, count)
        self.accumulator.add("step_seconds", time.perf_counter() - before, 0.0)
        self.tally_steps += 1

    def observe(self) -> None:
        """Whatever is due after this step: metrics, samples, validation, checkpoint."""
        training, last = self.config.training, self.step == self.config.total_steps
        phase_ends = last or self.step == training.warm_start_steps
        evaluate = phase_ends or self.step % self.config.evaluation.eval_every_steps == 0
        keep = last or self.step % self.config.checkpoint.checkpoint_every_steps == 0
        row: dict[str, float] = {}
        if last or self.step % training.log_every_steps == 0:
            row |= self._drain_tally()
        if evaluate:
            row |= self._validate()
        if row and self.recorder:
            self.recorder.metrics(self.step, row)
        if last or self.step % training.sample_every_steps == 0:
            self._record_samples()
        if keep:
            with tempfile.TemporaryDirectory(prefix="ebft-checkpoint-") as folder:
                self._report(Path(folder))
        elif evaluate:
            self._report(None)

    def finish(self) -> None:
        """Held-out evaluation of the final model, unless the base model is the final model."""
        if self.step > 0:
            self._evaluate_heldout()
            self._record_event("finished", f"{self.step} steps")

    def stop(self, reason: str) -> RunResult:
        """End early, with the reason on record."""
        self._record_event("stopped", reason, step=self.step)
        self.on_report({**self.latest, "step": float(self.step)}, None)
        return self.outcome("stopped", reason)

    def outcome(self, status: Literal["finished", "stopped"], reason: str) -> RunResult:
        return RunResult(status, reason, self.step, dict(self.latest), self.startup_seconds)

    # --- one update --------------------------------------------------------------------------------------------

    def _hand_over_weights(self) -> None:
        """Let an engine sample by the present weights; what `batch` counts over all workers makes them wait for it."""
        if self.samples_from_engine:
            with unsharded(self.model):
                self.parts.rollouts.update_weights(self.model, self.step)

    def _compared(self) -> tuple[float, float]:
        """Sum and count of differences between engine and trainer, since the last row of metrics."""
        return self.accumulator.sums.get(off_policy.DIFFERENCE, 0.0), self.accumulator.counts.get(
            off_policy.DIFFERENCE, 0.0
        )

    def _check_parity(self, before: tuple[float, float]) -> None:
        """Judge what this step has added, before the weights change."""
        if self.samples_from_engine:
            mine = [now - then for now, then in zip(self._compared(), before, strict=True)]
            total, count = sum_over_workers(mine, self.world_size, self.device)
            off_policy.check_parity(self.config, total, count, version=self.step)

    def batch(self) -> tuple[Batch, Anchors, Tensor, LossDenominators]:
        """This worker's rows of the step, with anchors, noise, and what all workers' losses divide by."""
        config, data = self.config, self.parts.data["train"]
        indices = batch_indices(size=len(data), batch_size=config.training.batch_size, step=self.step, seed=config.seed)
        rows = data.rows(indices[self.rank :: self.world_size]).to(self.device)
        rollout = config.rollout
        anchors = anchors_of(rows, rollout)
        noise = uniforms(
            (config.seed, ROLLOUT_STREAM, self.step),
            rows.indices.tolist(),
            n_anchors=anchors.positions.shape[1],
            n_samples=rollout.n_samples,
            length=rollout.completion_length,
        )
        mine = float(anchors.valid.sum()), float(ce_mask(rows, config.loss.ce_region).sum())
        contexts, ce_tokens = sum_over_workers(mine, self.world_size, self.device)
        return rows, anchors, noise, LossDenominators(contexts, max(ce_tokens, 1.0), self.step)

    def _backward(
        self, rows: Batch, anchors: Anchors, noise: Tensor, denominators: LossDenominators, part: Tensor
    ) -> float:
        on_device = part.to(self.device)
        batch = rows.select(on_device)
        share = Anchors(*(tensor[on_device] for tensor in anchors))
        with self._autocast():
            loss: float = self.method.backward(
                self.model, batch, share, noise=noise[part], denominators=denominators, accumulator=self.accumulator
            )
        self.accumulator.add("loss", loss, 0.0)
        return loss

    def _apply_gradients(self, loss: float) -> None:
        limit = self.config.optimizer.max_grad_norm
        parameters = trained_parameters(self.model).values()
        norm = float(full_tensor(torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)))
        (total,) = sum_over_workers([loss], self.world_size, self.device)
        for quantity, value in (("loss", total), ("grad_norm", norm)):
            if not math.isfinite(value):
                raise NonFiniteError(quantity, value, self.step + 1)
        warm = self.config.training.warm_start_steps
        within, length = (self.step, warm) if self.warming_up else (self.step - warm, self.config.training.steps)
        rate = learning_rate_at(self.config.optimizer, self.peak_learning_rate, within, length)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.model)
        if self.rank == 0:
            self.accumulator.add("grad_norm", norm, 1.0)
            self.latest["learning_rate"] = rate

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.training.precision == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    # --- what is measured --------------------------------------------------------------------------------------

    def _drain_tally(self) -> dict[str, float]:
        """Means over the steps since the last row, over all workers."""
        workers = self.world_size
        total = sum_accumulator(self.accumulator, TALLIED, workers, self.device, peaks=off_policy.PEAKS)
        row = row_of(total, steps=self.tally_steps, workers=workers)
        tokens = self.tokens_seen - self.latest.get("tokens_seen", 0.0)
        row |= {
            "learning_rate": self.latest.get("learning_rate", float("nan")),
            "tokens_per_second": tokens / max(total.sums["step_seconds"] / workers, 1e-9),
            "peak_memory_bytes": float(peak_memory_bytes(self.device)),
            "sequences_seen": float(self.step * self.config.training.batch_size),
            "tokens_seen": float(self.tokens_seen),
        }
        self.latest |= row
        self.accumulator, self.tally_steps = MetricAccumulator(), 0
        return row

    def _measure(
        self, split: str, sequences: int, lengths: Sequence[int], *, with_entropy: bool
    ) -> evaluation.Measured:
        with self.average.applied(self.model), unsharded(self.model), self._autocast():
            mine = self.parts.evaluator.measure(
                self.model,
                self.parts.data[split],
                sequences=sequences,
                lengths=lengths,
                with_entropy=with_entropy,
                rank=self.rank,
                world_size=self.world_size,
            )
        keys: list[tuple[str, int | None]] = [(evaluation.CE, None), (evaluation.CE_ANSWER, None)]
        keys += [(evaluation.CFM, length) for length in lengths]
        keys += [(evaluation.ENTROPY, k + 1) for k in range(max(lengths) if with_entropy else 0)]
        return sum_measured(mine, keys, self.world_size, self.device)

    def _measure_validation(self) -> evaluation.Measured:
        G = self.config.rollout.completion_length
        return self._measure("validation", self.config.evaluation.validation_sequences, [G], with_entropy=False)

    def _measure_heldout(self) -> evaluation.Measured:
        lengths = sorted({*self.config.evaluation.profile_lengths, self.config.rollout.completion_length})
        return self._measure("heldout", self.config.evaluation.heldout_sequences, lengths, with_entropy=True)

    def _validate(self) -> dict[str, float]:
        before = time.perf_counter()
        measured = self._measure_validation()
        row = evaluation.summary(measured, self.config.rollout.completion_length)
        row["evaluation_seconds"] = time.perf_counter() - before
        self._keep(row)
        self.latest["evaluated_step"] = float(self.step)
        return row

    def _keep(self, row: dict[str, float]) -> None:
        for name in (evaluation.CE, evaluation.CFM):
            if name in row and not math.isfinite(row[name]):
                raise NonFiniteError(name, row[name], self.step)
        self.latest |= row

    def _evaluate_base(self) -> None:
        """The base model's numbers; trials of a study share them, so they are measured once per machine."""
        before = time.perf_counter()
        key = base_evaluation.key(self.config, self.parts.base, self.parts.features, self.parts.text, self.parts.data)
        measured = base_evaluation.recall(key) if self.world_size == 1 else None
        if measured is None:
            measured = self._measure_validation(), self._measure_heldout()
            # Sharded weights are gathered in the type of the passes, which may round otherwise than one worker does.
            if self.rank == 0 and not is_sharded(self.model):
                base_evaluation.remember(key, measured)
        row = evaluation.summary(measured[0], self.config.rollout.completion_length)
        row["evaluation_seconds"] = time.perf_counter() - before
        self._keep(row)
        self.latest["evaluated_step"] = 0.0
        if self.recorder:
            self.recorder.metrics(0, row)
            self.recorder.evaluations(0, evaluation.rows_of(measured[1], "heldout"))

    def _evaluate_heldout(self) -> None:
        measured = self._measure_heldout()
        if self.recorder:
            self.recorder.evaluations(self.step, evaluation.rows_of(measured, "heldout"))

    def _record_samples(self) -> None:
        # All workers hand over their parts of the weights; one of them samples.
        with unsharded(self.model), self._autocast():
            if self.recorder:
                self.model.eval()
                self.recorder.samples(self.step, sample_rows(self.config, self.parts, self.model))
                self.model.train()

    def _record_event(self, kind: str, message: str, **details: Any) -> None:
        if self.recorder:
            self.recorder.event(kind, message, **details)

    # --- reports and checkpoints -------------------------------------------------------------------------------

    def _report(self, folder: Path | None) -> None:
        if folder is not None:
            tensors = state.collect(self.model, self.optimizer, self.average, keep=self.rank == 0)
            if self.rank == 0:
                checkpoint.save(folder, self._state() | {"tensors": tensors}, step=self.step, metrics=self.latest)
        metrics = {**self.latest, "step": float(self.step)}
        self.on_report(metrics, folder if self.rank == 0 else None)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "tally": {**dataclasses.asdict(self.accumulator), "steps": self.tally_steps},
            "latest": self.latest,
        }

    def _restore(self, folder: Path) -> None:
        saved = checkpoint.load(folder)
        if "tensors" not in saved:
            raise CheckpointError(f"{folder}: an older version wrote it. Continue with that one, or start from scratch")
        self.step, self.tokens_seen, self.latest = saved["step"], saved["tokens_seen"], saved["latest"]
        # The optimizer's states are those of the phase that the checkpoint was written in; a new phase starts its own.
        state.restore(saved["tensors"], self.model, self.optimizer, self.average)
        accumulator = saved["tally"]
        self.accumulator, self.tally_steps = (
            MetricAccumulator(accumulator["sums"], accumulator["counts"], accumulator.get("peaks", {})),
            accumulator["steps"],
        )
        self._record_event("resumed", f"from the checkpoint of step {self.step}", step=self.step)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: of the device on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
