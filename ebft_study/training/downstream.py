"""Benchmarks of a run: the scores of its model on them, as rows. Every worker takes part and gets all rows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

from ebft_study.evaluation import base
from ebft_study.evaluation.base import Rows
from ebft_study.evaluation.downstream import BenchmarkEvaluator, Result
from ebft_study.evaluation.downstream.benchmarks import Benchmark
from ebft_study.evaluation.downstream.contamination import overlap
from ebft_study.evaluation.downstream.protocol import Protocol, judges_of
from ebft_study.networks.loading import LoadedModel
from ebft_study.networks.sharding import unsharded
from ebft_study.rollouts.answers import AnswerSampler
from ebft_study.training import Recorder
from ebft_study.training.update import Run

SCORE = "benchmark_score"


def is_due(run: Run) -> bool:
    """Whether benchmarks are evaluated after the present step, which is not the last one."""
    every = run.config.evaluation.benchmark_every_steps
    return bool(every and run.step % every == 0)


def measure(run: Run) -> Rows:
    """Scores of the current model, with averaged weights if there is an average."""
    return _rows([_measure(run, benchmark) for benchmark in run.parts.benchmarks])


def measure_shared(run: Run, model: LoadedModel | None) -> Rows:
    """Scores of a model that trials share (`validation.shared_model`), measured once per machine.

    With those of the base model, the overlap of each benchmark with the training data.
    """
    rows = _rows([])
    for benchmark in run.parts.benchmarks:
        key = base.benchmark_key(run.config, model, benchmark, engine=run.parts.rollouts.engine) if model else None
        parts = [_shared(run, key, functools.partial(_measure, run, benchmark))]
        if run.step == 0:
            key = base.overlap_key(benchmark, run.parts.text) if model else None
            parts.append(_shared(run, key, functools.partial(_overlap, run, benchmark)))
        for part in parts:
            for table, of_table in part.items():
                rows[table] += of_table
    return rows


def _shared(run: Run, key: str | None, measure: Callable[[], Result]) -> Rows:
    """Rows of what was measured before under this key; else of what is measured now, which the first worker stores."""
    rows = base.get_rows(key) if key and run.world_size == 1 else None
    if rows is None:
        rows = _rows([measure()])
        if key:
            base.put_rows(key, rows)
    return rows


def _overlap(run: Run, benchmark: Benchmark) -> Result:
    return Result(benchmark.name, {("contaminated_fraction", None): overlap(benchmark, run.parts.text)}, torch.zeros(3))


def record(run: Run, recorder: Recorder | None, rows: Rows) -> dict[str, float]:
    """Write rows, if there are any; returns what the row of metrics has of them, which is also what trials report."""
    if recorder and rows["evaluations"]:
        recorder.evaluations(run.step, rows["evaluations"])
        recorder.scores(run.step, rows["scores"])
        recorder.samples(run.step, rows["samples"])
    row = _score(run, rows)
    run.latest |= row
    return row


def _score(run: Run, rows: Rows) -> dict[str, float]:
    first = run.parts.benchmarks[0].name if run.parts.benchmarks else None
    for row in rows["evaluations"]:
        if (row["benchmark"], row["position"]) == (first, 1) and row["metric"] in ("pass_at_k", "best_of_k_bleu"):
            return {SCORE: row["value"]}
    return {}


def _rows(results: list[Result]) -> Rows:
    return {
        "evaluations": [row for result in results for row in result.evaluations()],
        "scores": [row for result in results for row in result.scores()],
        "samples": [row for result in results for row in result.samples],
    }


@contextlib.contextmanager
def _sampler(run: Run) -> Iterator[AnswerSampler]:
    """Samples from the weights of the moment, by the engine of a run that has one."""
    with run.parts.rollouts.answers_of(run.model) as sampler:
        run.sum_over_workers([0.0])  # no worker asks before the first one has sent the weights,
        yield sampler
        run.sum_over_workers([0.0])  # or after the engine has forgotten them


def _measure(run: Run, benchmark: Benchmark) -> Result:
    protocol = Protocol.from_config(run.config.evaluation)
    judges = judges_of(benchmark, run.config.verifier, protocol)
    try:
        with run.average.applied(run.model), unsharded(run.model), _sampler(run) as sampler, run.autocast():
            evaluator = BenchmarkEvaluator(benchmark, judges, protocol, sampler, run.parts.base.tokenizer)
            result = evaluator.measure(run.model, rank=run.rank, world_size=run.world_size)
    finally:
        judges.close()
    tensors = result.tensors()
    sums = iter(run.sum_over_workers(number for tensor in tensors for number in tensor.flatten().tolist()))
    for tensor in tensors:
        tensor.copy_(torch.tensor([next(sums) for _ in range(tensor.numel())]).view_as(tensor))
    run.spent.evaluation_flops += run.meter.answers(*result.work.tolist())
    return result
