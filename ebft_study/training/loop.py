"""The training loop of one run. Ray is not needed; under Ray Train every worker runs exactly this.

    step 0: evaluate the base model
    warm_start_steps updates by SFT, then `steps` updates by the method (`update.Run.update`)
    every log_every_steps a row of metrics, every eval_every_steps validation, every checkpoint_every_steps a checkpoint
    every benchmark_every_steps benchmarks
    at the end of the warm start, and at the end: held-out evaluation, benchmarks

All noise is a function of (seed, step, row): a resumed run continues bit for bit. Another number of workers, other
micro-batches or a feature service change a step by rounding only. Sooner or later rounding also changes a drawn token
(`algorithm.sampling`); from there on they are different runs.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ebft_study import evaluation
from ebft_study.config import RunConfig
from ebft_study.errors import NonFiniteError, ParityError
from ebft_study.evaluation import Measured
from ebft_study.training import Recorder, Report, RunResult, downstream, state, validation
from ebft_study.training.memory import shortage
from ebft_study.training.setup import planned
from ebft_study.training.update import Run

if TYPE_CHECKING:
    from ebft_study.training.recorded import Services


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
        start_from: a checkpoint folder to resume from.
        services: the shared actors that the run may use; None: everything is done in process.

    Returns:
        The result. A non-finite loss, or an engine that disagrees with the trainer, ends the run with status
        `stopped`; it does not raise.
    """
    started, startup_seconds = time.perf_counter(), math.nan
    status: Literal["finished", "stopped"] = "finished"
    reason = ""
    if recorder and (problem := shortage(*planned(config, world_size=world_size, services=services))):
        recorder.event("memory", problem)  # now: what runs out of memory has no time to say so
    run = Run(config, rank=rank, world_size=world_size, services=services)
    try:
        start(run, recorder, on_report, start_from)
        if run.step < config.total_steps:
            startup_seconds = time.perf_counter() - started
        while run.step < config.total_steps:
            run.update()
            if recorder:
                for notice in run.notices:
                    recorder.event("memory", notice, step=run.step)
            run.notices.clear()
            observe(run, recorder, on_report)
        finish(run, recorder)
    except (NonFiniteError, ParityError) as error:
        status, reason = "stopped", str(error)
        if recorder:
            recorder.event("stopped", reason, step=run.step)
        _report(run, on_report)
    finally:
        run.parts.close()
    return RunResult(status, reason, run.step, run.metrics, startup_seconds)


def start(run: Run, recorder: Recorder | None, on_report: Report, start_from: Path | None = None) -> None:
    """Resume from a checkpoint, or evaluate the base model."""
    if start_from is not None:
        state.restore(run, start_from)
        if recorder:
            recorder.event("resumed", f"from the checkpoint of step {run.step}", step=run.step)
    else:
        if recorder:
            recorder.event("started", "; ".join([f"{run.config.method} on {run.config.model}", *run.parts.remarks]))
        shared = validation.shared_model(run)
        row, validated, heldout = validation.evaluate_shared(run, shared)
        row |= downstream.record(run, recorder, downstream.measure_shared(run, shared))
        row |= validation.cost(run)
        if recorder:
            recorder.metrics(0, row)
            recorder.scores(0, evaluation.score_rows(validated, "validation"))
        _record_heldout(recorder, 0, heldout)
        samples = validation.sample_rows(run)
        if recorder:
            recorder.samples(0, samples)
    _report(run, on_report)


def observe(run: Run, recorder: Recorder | None, on_report: Report) -> None:
    """Run everything that is due after a step: metrics, validation, samples, checkpoint."""
    config, last = run.config, run.step == run.config.total_steps
    method_begins = run.step == config.training.warm_start_steps and not last
    evaluate = last or method_begins or run.step % config.evaluation.eval_every_steps == 0
    row: dict[str, float] = {}
    shared = validation.shared_model(run) if method_begins else None
    if method_begins:
        row |= downstream.record(run, recorder, downstream.measure_shared(run, shared))
    elif last or downstream.is_due(run):
        row |= downstream.record(run, recorder, downstream.measure(run))
    elif evaluate:
        run.latest.pop(downstream.SCORE, None)
    if last or run.step % config.training.log_every_steps == 0:
        row |= validation.training_metrics(run)
        if recorder and (problem := validation.vanishing_updates(run, row)):
            recorder.event("vanishing", problem, step=run.step)
    if evaluate:
        heldout: Measured | None = None
        if method_begins:
            losses, validated, heldout = validation.evaluate_shared(run, shared)
        else:
            losses, validated = validation.validate(run)
        row |= losses
        if recorder:
            recorder.scores(run.step, evaluation.score_rows(validated, "validation"))
        if heldout is not None:
            _record_heldout(recorder, run.step, heldout)
    if row:
        row |= validation.cost(run)
        if recorder:
            recorder.metrics(run.step, row)
    if last or run.step % config.training.sample_every_steps == 0:
        samples = validation.sample_rows(run)
        if recorder:
            recorder.samples(run.step, samples)
    if last or run.step % config.checkpoint.checkpoint_every_steps == 0:
        timed = run.accumulator.seconds("checkpoint_seconds", run.device)
        with timed, tempfile.TemporaryDirectory(prefix="ebft-checkpoint-") as folder:
            state.save(run, Path(folder))
            _report(run, on_report, Path(folder))
    elif evaluate:
        _report(run, on_report)


def finish(run: Run, recorder: Recorder | None) -> None:
    """Evaluate the final model on held-out data, unless it is the base model."""
    if run.step > 0:
        _record_heldout(recorder, run.step, validation.measure_heldout(run))
        row = validation.cost(run)
        if recorder:
            recorder.metrics(run.step, row)
            recorder.event("finished", f"{run.step} steps")


def _record_heldout(recorder: Recorder | None, step: int, measured: Measured) -> None:
    if recorder:
        recorder.evaluations(step, evaluation.rows_of(measured, "heldout"))
        recorder.scores(step, evaluation.score_rows(measured, "heldout"))


def _report(run: Run, on_report: Report, folder: Path | None = None) -> None:
    on_report({**run.metrics, "step": float(run.step)}, folder if run.rank == 0 else None)
