"""The work of benchmarks before a run: how often they are evaluated, how many answers they take, and what these cost.

Nobody knows how long answers will be. Assumed are

    prompts       a token for every BYTES_PER_TOKEN bytes
    programs      `benchmark_max_tokens` tokens: only an end token ends them, which few base models draw
    translations  as many tokens as their reference, counted like those of prompts
    judging       PROGRAM_SECONDS of one core for each program; nothing for translations

Compilers, COMET and programs that run until their limit take longer.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from ebft_study.config import RunConfig
from ebft_study.cost import answers_flops
from ebft_study.training.memory import shapes

BYTES_PER_TOKEN = 4
PROGRAM_SECONDS = 0.008
"""Processor time of a program with its tests: `python -m ebft_study.sandbox --measure 1000` (docs/sandbox.md)."""


@dataclass(frozen=True)
class BenchmarkWork:
    """One evaluation of one model on all benchmarks of a run."""

    problems: int = 0
    answers: int = 0
    """To all problems."""
    flops: float = 0.0
    judging_seconds: float = 0.0
    """On one core."""


def benchmark_work(run: RunConfig) -> BenchmarkWork:
    """The work of one evaluation.

    Raises:
        EbftError: a benchmark cannot be read.
    """
    if not run.evaluation.benchmarks:
        return BenchmarkWork()
    from ebft_study.evaluation.downstream import answer_work  # loads transformers

    settings = run.evaluation
    problems = _problems(settings.benchmarks, settings.benchmark_problems)
    limit, n_answers = settings.benchmark_max_tokens, 1 + settings.benchmark_samples
    prompts = [prompt for prompt, _ in problems]
    lengths = torch.tensor([limit if longest is None else min(longest, limit) for _, longest in problems])[:, None]
    # Greedy answers and samples are two calls, each of which runs the prompts.
    work = answer_work(prompts, lengths) + answer_work(prompts, lengths.expand(-1, n_answers - 1))
    programs = n_answers * sum(longest is None for _, longest in problems)
    return BenchmarkWork(
        len(problems),
        n_answers * len(problems),
        answers_flops(shapes(run)[0], *work.tolist()),
        programs * PROGRAM_SECONDS,
    )


@functools.cache
def _problems(benchmarks: tuple[str, ...], limit: int | None) -> tuple[tuple[int, int | None], ...]:
    """Tokens of each problem's prompt and of its translation; None: its answer is a program."""
    from ebft_study.evaluation.downstream.benchmarks import load_benchmarks

    return tuple(
        (_tokens(item.problem.prompt), _tokens(item.problem.reference) if each.kind == "translation" else None)
        for each in load_benchmarks(benchmarks, problems=limit)[0]
        for item in each.items
    )


def _tokens(text: str) -> int:
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


def benchmark_evaluations(run: RunConfig) -> int:
    """Evaluations of trained models: where a warm start ends, every `benchmark_every_steps`, and at the end."""
    if not run.evaluation.benchmarks:
        return 0
    total, every = run.total_steps, run.evaluation.benchmark_every_steps
    regular = range(every, total, every) if every else range(0)
    return len({*regular, run.training.warm_start_steps, total} - {0})


def benchmark_settings(run: RunConfig) -> tuple[Any, ...]:
    """All settings that one evaluation depends on."""
    return (run.evaluation.benchmarks, *run.evaluation.of_benchmarks.values())
