"""Sections of the benchmark of one step: settings in, rows out. Targets are stated next to their measurements."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import torch
import transformers
from torch.profiler import ProfilerActivity

from benchmarks.agreement import agreement
from benchmarks.contenders import Naive, Networks, Ours
from benchmarks.launches import count as count_launches
from benchmarks.measure import in_fresh_process, in_turn, matmul_ceiling, peak_bytes, seconds
from benchmarks.naive import naive_rewards
from benchmarks.rows import Row, Titled, compared, failure, judged, measured
from benchmarks.settings import PAPER, SMALL, Section, Settings, ladder
from benchmarks.workload import compute_dtype, cost_of, model_config, n_parts, prepare, setting_rows, shapes
from ebft_study.algorithm.rewards import feature_matching_rewards
from ebft_study.cost import largest_plan, step_cost, step_kernels, step_seconds
from ebft_study.errors import ConfigError, EbftError
from ebft_study.training.memory import LARGE_GPU_BYTES, USABLE

EPOCH = 100_000
"""Sequences."""
FEW_TOKENS = 128
"""Tokens of a decoding pass where memory matters more: a tenth slower on two threads, no slower on one."""
OPERATIONS = 15


def run(settings: Settings, sections: Sequence[str]) -> Iterator[Titled]:
    """Measure sections, in the order of `Section`; the first table is `setting`.

    A section that cannot be run has one row `<section>/failed`, and the others are measured all the same.

    Raises:
        ConfigError: settings that cannot be measured at all.
    """
    prepare(settings)
    cuda = settings.device_type == "cuda"
    names = ("precision", "model", "n_samples", "completion_length", "stride", "batch_size", "naive_attention")
    facts = {
        "device": torch.cuda.get_device_name(settings.device) if cuda else settings.device,
        "transformers": transformers.__version__,
        "sequence_lengths": " ".join(map(str, settings.sequence_lengths)),
        "repeats": settings.repeats,
    }
    yield "setting", setting_rows(settings, *names, **facts)
    for name in (section for section in Section if section in sections):
        try:
            yield name, RUN[name](settings)
        except (EbftError, BrokenProcessPool, MemoryError, torch.OutOfMemoryError) as error:
            yield name, [failure(name, error)]
        # The next section, and its processes, find the machine as the first one did.
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


def _small(settings: Settings, targets: dict[int, float]) -> float | None:
    """The target for the settings' sequence length, where they are those that targets are stated for."""
    return targets.get(settings.sequence_length) if settings.same_work(SMALL) else None


def _time(settings: Settings, ours: Callable[[], object], naive: Callable[[], object]) -> dict[str, list[float]]:
    return in_turn({"ours": ours, "naive": naive}, repeats=settings.repeats, device=settings.device)


# --- parts of a step -------------------------------------------------------------------------------------------


def rollouts(settings: Settings) -> list[Row]:
    """Sampling alone."""
    networks = Networks.from_settings(settings)
    times = _time(settings, Ours(settings, networks).rollouts, Naive(settings, networks).rollouts)
    return compared("rollouts", times, target=_small(settings, {512: 10.0}))


def features(settings: Settings) -> list[Row]:
    """Features of random completions."""
    networks = Networks.from_settings(settings)
    ours, naive = Ours(settings, networks), Naive(settings, networks)
    completions = (ours.inputs.noise * model_config(settings.model).vocab_size).long()
    times = _time(settings, lambda: ours.features(completions), lambda: naive.features(completions))
    return compared("features", times, target=_small(settings, {512: 4.0}))


def whitening(settings: Settings) -> list[Row]:
    """Whitened rewards of random features, from Gram matrices and from a batched SVD."""
    generator = torch.Generator(settings.device).manual_seed(0)
    shape = (settings.contexts, settings.n_samples + 1, settings.feature_size)
    vectors = torch.randn(shape, generator=generator, device=settings.device)
    phi, psi = vectors[:, :-1].contiguous(), vectors[:, -1].contiguous()

    def ours() -> torch.Tensor:
        return feature_matching_rewards(phi, psi, alpha=1.0, whitening="variant_i").reward

    def naive() -> torch.Tensor:
        alignment, diversity = naive_rewards(phi, psi)
        return alignment - diversity

    stated = settings.device == "cpu" and shape == (2048, 5, 4608)
    rows = compared("whitening", _time(settings, ours, naive), target=20.0 if stated else None)
    return [*rows, judged("agreement/whitened_rewards", float((ours() - naive()).abs().max()), 1e-4)]


# --- the whole step --------------------------------------------------------------------------------------------


def step(settings: Settings) -> list[Row]:
    """Gradient and update at every sequence length, phase by phase, and their share of the machine's ceiling."""
    ceiling = matmul_ceiling(settings.device, compute_dtype(settings))
    rows = [Row("step/matmul_ceiling", ceiling, "FLOP/s")]
    networks = Networks.from_settings(settings)
    for length in settings.sequence_lengths:
        at = settings.at(length)
        ours, naive = Ours(at, networks), Naive(at, networks)
        rows += _step_rows(f"step/T={length}", ours, _time(at, ours.step, naive.step), ceiling)
    return rows


def _step_rows(name: str, ours: Ours, times: Mapping[str, list[float]], ceiling: float) -> list[Row]:
    settings, taken = ours.settings, times["ours"]
    n_tokens = settings.batch_size * settings.sequence_length
    flops = cost_of(settings, counting="needed").total.flops
    paper = settings.same_work(PAPER) and (settings.sequence_length, settings.batch_size) == (1024, 16)
    our_seconds, *others = compared(name, times, target=_small(settings, {512: 5.0, 1024: 8.0}))
    return [
        replace(our_seconds, target=3.5 if paper else None, at_most=True),
        *others,
        Row(f"{name}/micro_batch_size", ours.plan.micro_batch_size),
        Row(f"{name}/anchors_at_once", ours.plan.anchors_at_once),
        measured(f"{name}/tokens_per_second", [n_tokens / s for s in taken], "tokens/s"),
        measured(f"{name}/hours_per_{EPOCH}_sequences", [s * EPOCH / settings.batch_size / 3600 for s in taken], "h"),
        measured(f"{name}/utilisation", [flops / s / ceiling for s in taken]),
        *_phase_rows(name, ours, ceiling),
    ]


def _phase_rows(name: str, ours: Ours, ceiling: float) -> Iterator[Row]:
    """Scoring is the forward pass of the sequences, and the backward pass of everything; the optimizer has no FLOPs."""
    cost, shape = cost_of(ours.settings, counting="needed"), ours.settings.shape
    phases = {
        "rollouts": ("rollout_seconds", cost.rollouts.token_forwards, cost.rollouts.flops),
        "features": ("feature_seconds", cost.features.token_forwards, cost.features.flops),
        "scoring": (
            "scoring_seconds",
            shape.batch_size * (shape.sequence_length + shape.block_tokens),
            cost.scoring.flops,
        ),
        "optimizer": ("optimizer_seconds", 0, 0),
    }
    for phase, (metric, n_tokens, flops) in phases.items():
        taken = [accumulator.of(metric).total for accumulator in ours.accumulators[-ours.settings.repeats :]]
        at = f"{name}/{phase}"
        yield measured(f"{at}/seconds", taken, "s", cell=True)
        if flops:
            yield measured(f"{at}/tokens_per_second", [n_tokens / s for s in taken], "tokens/s", cell=True)
            yield Row(f"{at}/flops", flops, "FLOP", cell=True)
            yield measured(f"{at}/flops_per_second", [flops / s for s in taken], "FLOP/s", cell=True)
            yield measured(f"{at}/utilisation", [flops / s / ceiling for s in taken], cell=True)


# --- memory ----------------------------------------------------------------------------------------------------


def memory(settings: Settings) -> list[Row]:
    """Memory of a step on one sequence of the last length, on top of what lasts from step to step."""
    anchors_at_once = settings.anchors_at_once or max(FEW_TOKENS // settings.n_samples, 1)
    alone = replace(
        settings.at(settings.sequence_lengths[-1]), batch_size=1, micro_batch_size=1, anchors_at_once=anchors_at_once
    )
    # On a CPU a process can read its own peak only.
    measure_peak = step_peak if settings.device_type == "cuda" else _step_peak_in_fresh_process
    ours, naive = measure_peak("ours", alone), measure_peak("naive", alone)
    name = f"memory/T={alone.sequence_length}"
    return [
        Row(f"{name}/ours", ours, "B"),
        Row(f"{name}/naive", naive, "B"),
        Row(f"{name}/ratio", ours / max(naive, 1), target=_small(alone, {1024: 0.25}), at_most=True),
        Row(f"{name}/anchors_at_once", anchors_at_once),
    ]


def _step_peak_in_fresh_process(contender: str, settings: Settings) -> int:
    return in_fresh_process(step_peak, contender, settings)


def step_peak(contender: str, settings: Settings) -> int:
    """Bytes by which memory rises during one step of `ours` or `naive`."""
    prepare(settings)
    networks = Networks.from_settings(settings)
    contenders: dict[str, type[Ours] | type[Naive]] = {"ours": Ours, "naive": Naive}
    # The shortest sequence that has an anchor loads libraries and makes the optimizer's states.
    contenders[contender](settings.at(settings.stride + settings.completion_length), networks).step()
    return peak_bytes(contenders[contender](settings, networks).step, settings.device)


# --- growth ----------------------------------------------------------------------------------------------------


def growth(settings: Settings) -> list[Row]:
    """Seconds of our step around the settings, one quantity at a time, and the seconds that the cost model predicts.

    The model's FLOPs become seconds by the measured speed of the settings themselves.
    """
    center, points = settings.at(settings.sequence_length), _points(settings)
    networks = {
        name: Networks.from_settings(replace(settings, model=name)) for name in {p.model for p in points.values()}
    }
    steps = {point: Ours(point, networks[point.model]).step for point in points.values()}
    times = in_turn(steps, repeats=settings.repeats, device=settings.device)
    seconds_per_flop = statistics.median(times[center]) / cost_of(center, counting="executed").total.flops
    rows = []
    for name, point in points.items():
        predicted = seconds_per_flop * cost_of(point, counting="executed").total.flops
        rows += [
            measured(f"growth/{name}/seconds", times[point], "s", cell=True),
            Row(f"growth/{name}/predicted", predicted, "s", cell=True),
        ]
    n = settings.n_samples
    ratios = [more / less for more, less in zip(times[points[f"n={2 * n}"]], times[center], strict=True)]
    target = _small(settings, {512: 1.9})
    return [*rows, measured(f"growth/n={n}->{2 * n}", ratios, "x", target=target, at_most=True)]


def _points(settings: Settings) -> dict[str, Settings]:
    """Settings by what sets them apart; the benchmark's own are in every series."""
    center, n, G = settings.at(settings.sequence_length), settings.n_samples, settings.completion_length
    T, least = settings.sequence_length, settings.stride + settings.completion_length
    lengths = sorted({max(length, least) for length in (T // 4, T // 2, T, 2 * T)})
    return {
        **{f"T={length}": center.at(length) for length in lengths},
        **{f"n={m}": replace(center, n_samples=m) for m in sorted({max(n // 2, 2), n, 2 * n})},
        **{f"G={g}": replace(center, completion_length=g) for g in sorted({max(G // 2, 1), G, 2 * G})},
        **{f"model={name}": replace(center, model=name) for name in (*ladder(), settings.model)},
    }


# --- profile ---------------------------------------------------------------------------------------------------


def profile(settings: Settings) -> list[Row]:
    """The operations of one of our steps with the most time of their own, without the operations that they call."""
    ours, cuda = Ours(settings, Networks.from_settings(settings)), settings.device_type == "cuda"
    ours.step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        total = seconds(ours.step, settings.device)
    self_seconds = {
        event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        for event in profiler.key_averages()
    }
    longest = sorted(self_seconds.items(), key=lambda item: -item[1])[:OPERATIONS]
    return [Row("profile/step", total, "s"), *(Row(f"profile/{name}", taken, "s") for name, taken in longest)]


# --- launches --------------------------------------------------------------------------------------------------


def launches(settings: Settings) -> list[Row]:
    """Kernels of our step on a GPU, with and without activation checkpointing, and which plan is chosen there.

    Counted on any machine; the plans are those of a GPU of 80 GB, as in training.
    """
    rows, times = list[Row](), dict[str, float]()
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        chosen = replace(settings, device="cuda", activation_checkpointing=checkpointing)
        step, budget = chosen.shape, USABLE * LARGE_GPU_BYTES
        try:
            plan = largest_plan(*shapes(chosen), step, budget_bytes=budget)
        except ConfigError as error:
            rows.append(failure(f"launches/{name}", error))
            continue
        counted = count_launches(chosen, plan).total
        times[name] = step_seconds(*shapes(chosen), step, plan)
        at = f"launches/{name}"
        rows += [
            Row(f"{at}/micro_batch_size", plan.micro_batch_size),
            Row(f"{at}/anchors_at_once", plan.anchors_at_once),
            Row(f"{at}/parts", n_parts(chosen, plan)),
            *(Row(f"{at}/{kind}", counted[kind]) for kind in ("kernels", "views", "synchronisations")),
            Row(f"{at}/predicted_kernels", step_kernels(*shapes(chosen), step, plan)),
            Row(f"{at}/flops", step_cost(*shapes(chosen), step, plan=plan).total.flops, "FLOP"),
            Row(f"{at}/predicted_seconds", times[name], "s"),
        ]
    return [*rows, Row("launches/chosen", min(times, key=lambda name: times[name]))] if times else rows


RUN: dict[Section, Callable[[Settings], list[Row]]] = {
    Section.agreement: agreement,
    Section.rollouts: rollouts,
    Section.features: features,
    Section.step: step,
    Section.whitening: whitening,
    Section.memory: memory,
    Section.growth: growth,
    Section.profile: profile,
    Section.launches: launches,
}
