"""The sections of the benchmark: settings in, rows out. Targets stand beside what they judge."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity

from benchmarks.agreement import agreement
from benchmarks.measure import in_fresh_process, in_turn, matmul_ceiling, peak_bytes, seconds
from benchmarks.naive import naive_rewards
from benchmarks.rows import Row, compared, judged, measured
from benchmarks.settings import PAPER, SMALL, Settings, ladder
from benchmarks.shapes import FEW_TOKENS, compute_dtype, cost_of, device_type, model_config
from benchmarks.sides import Naive, Networks, Ours
from ebft_study.algorithm.rewards import feature_matching_rewards
from ebft_study.cost import StepShape

PHASES = {
    "rollouts": "rollout_seconds",
    "features": "feature_seconds",
    "scoring": "scoring_seconds",
    "optimizer": "optimizer_seconds",
}
"""Phase of the cost model -> what a step calls its time. Scoring: the sequences forward, and everything backward."""
EPOCH = 100_000
"""Sequences."""
OPERATIONS = 15


def _small(settings: Settings, targets: dict[int, float]) -> float | None:
    """The target for the settings' sequence length, where they are those that targets are stated for."""
    return targets.get(settings.sequence_length) if settings.is_like(SMALL) else None


# --- parts of a step -------------------------------------------------------------------------------------------


def rollouts(settings: Settings) -> list[Row]:
    """Sampling alone."""
    networks = Networks.from_settings(settings)
    sides = {"ours": Ours(settings, networks).rollouts, "naive": Naive(settings, networks).rollouts}
    times = in_turn(sides, repeats=settings.repeats, device=settings.device)
    return compared("rollouts", times, target=_small(settings, {512: 10.0}))


def features(settings: Settings) -> list[Row]:
    """Features of random completions."""
    networks = Networks.from_settings(settings)
    ours, naive = Ours(settings, networks), Naive(settings, networks)
    vocabulary = model_config(settings.model).vocab_size
    completions = (ours.inputs.noise * vocabulary).long()
    sides = {"ours": lambda: ours.features(completions), "naive": lambda: naive.features(completions)}
    times = in_turn(sides, repeats=settings.repeats, device=settings.device)
    return compared("features", times, target=_small(settings, {512: 4.0}))


def whitening(settings: Settings) -> list[Row]:
    """Whitened rewards, from Gram matrices and from a batched SVD, of random features."""
    generator = torch.Generator(settings.device).manual_seed(0)
    shape = (settings.contexts, settings.n_samples + 1, settings.feature_size)
    vectors = torch.randn(shape, generator=generator, device=settings.device)
    phi, psi = vectors[:, :-1].contiguous(), vectors[:, -1].contiguous()

    def ours() -> torch.Tensor:
        return feature_matching_rewards(phi, psi, alpha=1.0, whitening="variant_i").reward

    def naive() -> torch.Tensor:
        alignment, diversity = naive_rewards(phi, psi)
        return alignment - diversity

    times = in_turn({"ours": ours, "naive": naive}, repeats=settings.repeats, device=settings.device)
    stated = settings.device == "cpu" and shape == (2048, 5, 4608)
    difference = float((ours() - naive()).abs().max())
    return [
        *compared("whitening", times, target=20.0 if stated else None),
        judged("agreement/whitened_rewards", difference, 1e-4),
    ]


# --- the whole step --------------------------------------------------------------------------------------------


def step(settings: Settings) -> list[Row]:
    """Gradient and update at every sequence length, phase by phase, and how far from the machine's ceiling."""
    ceiling = matmul_ceiling(settings.device, compute_dtype(settings))
    rows = [Row("step/matmul_ceiling", ceiling, "FLOP/s")]
    networks = Networks.from_settings(settings)
    for length in settings.sequence_lengths:
        at = settings.at(length)
        ours, naive = Ours(at, networks), Naive(at, networks)
        times = in_turn({"ours": ours.step, "naive": naive.step}, repeats=at.repeats, device=at.device)
        rows += _step_rows(f"step/T={length}", ours, times, ceiling)
    return rows


def _step_rows(name: str, ours: Ours, times: Mapping[str, list[float]], ceiling: float) -> list[Row]:
    settings, taken = ours.settings, times["ours"]
    n_tokens = settings.batch_size * settings.sequence_length
    flops = cost_of(settings, counting="needed").total.flops
    paper = settings.is_like(PAPER) and (settings.sequence_length, settings.batch_size) == (1024, 16)
    mine, other, speedup = compared(name, times, target=_small(settings, {512: 5.0, 1024: 8.0}))
    return [
        replace(mine, target=3.5 if paper else None, at_most=True),
        other,
        speedup,
        Row(f"{name}/micro_batch_size", ours.split.micro_batch_size),
        Row(f"{name}/anchors_at_once", ours.split.anchors_at_once),
        measured(f"{name}/tokens_per_second", [n_tokens / s for s in taken], "tokens/s"),
        measured(f"{name}/hours_per_{EPOCH}_sequences", [s * EPOCH / settings.batch_size / 3600 for s in taken], "h"),
        measured(f"{name}/utilisation", [flops / s / ceiling for s in taken]),
        *_phase_rows(name, ours, ceiling),
    ]


def _phase_rows(name: str, ours: Ours, ceiling: float) -> Iterator[Row]:
    cost, shape = cost_of(ours.settings, counting="needed"), StepShape.from_config(ours.config)
    differentiated = shape.batch_size * (shape.sequence_length + shape.block_tokens)
    n_tokens = {
        "rollouts": cost.rollouts.token_forwards,
        "features": cost.features.token_forwards,
        "scoring": differentiated,
    }
    for phase, timed_as in PHASES.items():
        taken = [accumulator.sums[timed_as] for accumulator in ours.tallies[-ours.settings.repeats :]]
        flops = getattr(cost, phase).flops
        yield measured(f"{name}/{phase}/seconds", taken, "s", cell=True)
        if phase in n_tokens:
            yield from _speed_rows(f"{name}/{phase}", taken, n_tokens[phase], flops, ceiling)


def _speed_rows(name: str, taken: list[float], n_tokens: float, flops: float, ceiling: float) -> Iterator[Row]:
    yield measured(f"{name}/tokens_per_second", [n_tokens / s for s in taken], "tokens/s", cell=True)
    yield Row(f"{name}/flops", flops, "FLOP", cell=True)
    yield measured(f"{name}/flops_per_second", [flops / s for s in taken], "FLOP/s", cell=True)
    yield measured(f"{name}/utilisation", [flops / s / ceiling for s in taken], cell=True)


# --- memory ----------------------------------------------------------------------------------------------------


def memory(settings: Settings) -> list[Row]:
    """What a step on one sequence of the last length needs on top of what lasts from step to step."""
    concurrency = settings.anchors_at_once or max(FEW_TOKENS // settings.n_samples, 1)
    alone = replace(
        settings.at(settings.sequence_lengths[-1]), batch_size=1, micro_batch_size=1, anchors_at_once=concurrency
    )
    # On a CPU a process knows its own peak only.
    ask = step_peak if device_type(settings) == "cuda" else _ask_fresh_process
    ours, naive = ask("ours", alone), ask("naive", alone)
    name = f"memory/T={alone.sequence_length}"
    return [
        Row(f"{name}/ours", ours, "B"),
        Row(f"{name}/naive", naive, "B"),
        Row(f"{name}/ratio", ours / max(naive, 1), target=_small(alone, {1024: 0.25}), at_most=True),
        Row(f"{name}/anchors_at_once", concurrency),
    ]


def _ask_fresh_process(side: str, settings: Settings) -> int:
    return in_fresh_process(step_peak, side, settings)


def step_peak(side: str, settings: Settings) -> int:
    """Bytes by which memory rises during one step of `ours` or `naive`."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    networks = Networks.from_settings(settings)
    sides: dict[str, type[Ours] | type[Naive]] = {"ours": Ours, "naive": Naive}
    # The shortest sequence that has an anchor loads libraries and makes the optimizer's states.
    sides[side](settings.at(settings.stride + settings.completion_length), networks).step()
    return peak_bytes(sides[side](settings, networks).step, settings.device)


# --- growth ----------------------------------------------------------------------------------------------------


def growth(settings: Settings) -> list[Row]:
    """Seconds of our step around the settings, one quantity at a time, and what the cost model expects.

    The model's FLOPs become seconds by the measured speed of the settings themselves.
    """
    points = _points(settings)
    networks = {
        name: Networks.from_settings(replace(settings, model=name)) for name in {p.model for p in points.values()}
    }
    steps = {point: Ours(point, networks[point.model]).step for point in points.values()}
    times = in_turn(steps, repeats=settings.repeats, device=settings.device)
    own = settings.at(settings.sequence_length)
    seconds_per_flop = statistics.median(times[own]) / cost_of(own, counting="executed").total.flops
    rows = []
    for name, point in points.items():
        predicted = seconds_per_flop * cost_of(point, counting="executed").total.flops
        rows += [
            measured(f"growth/{name}/seconds", times[point], "s", cell=True),
            Row(f"growth/{name}/predicted", predicted, "s", cell=True),
        ]
    n = settings.n_samples
    grown = [more / less for more, less in zip(times[points[f"n={2 * n}"]], times[own], strict=True)]
    target = _small(settings, {512: 1.9})
    return [*rows, measured(f"growth/n={n}->{2 * n}", grown, "x", target=target, at_most=True)]


def _points(settings: Settings) -> dict[str, Settings]:
    """Settings by what sets them apart; the benchmark's own are in every series."""
    own, n, G = settings.at(settings.sequence_length), settings.n_samples, settings.completion_length
    T, least = settings.sequence_length, settings.stride + settings.completion_length
    lengths = sorted({max(length, least) for length in (T // 4, T // 2, T, 2 * T)})
    return {
        **{f"T={length}": own.at(length) for length in lengths},
        **{f"n={m}": replace(own, n_samples=m) for m in sorted({max(n // 2, 2), n, 2 * n})},
        **{f"G={g}": replace(own, completion_length=g) for g in sorted({max(G // 2, 1), G, 2 * G})},
        **{f"model={name}": replace(own, model=name) for name in (*ladder(), settings.model)},
    }


# --- profile ---------------------------------------------------------------------------------------------------


def profile(settings: Settings) -> list[Row]:
    """The operations of one of our steps with the most time of their own, without what they call."""
    ours, cuda = Ours(settings, Networks.from_settings(settings)), device_type(settings) == "cuda"
    ours.step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        total = seconds(ours.step, settings.device)
    own = {
        event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        for event in profiler.key_averages()
    }
    longest = sorted(own.items(), key=lambda item: -item[1])[:OPERATIONS]
    return [Row("profile/step", total, "s"), *(Row(f"profile/{name}", taken, "s") for name, taken in longest)]


RUN: dict[str, Callable[[Settings], list[Row]]] = {
    "agreement": agreement,
    "rollouts": rollouts,
    "features": features,
    "step": step,
    "whitening": whitening,
    "memory": memory,
    "growth": growth,
    "profile": profile,
}
