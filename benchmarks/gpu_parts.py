"""What the check of a GPU measures: parts, each a generator of facts, so that what is known outlives what fails later.

tests             `tests/gpu`: attention and a step on the GPU against the CPU
architectures     block passes on the GPU against plain ones on the CPU, in two types (`tests/architectures.py`)
step              our step at the paper's setting: seconds and memory by phase, against the cost model
checkpointed      the same with activation checkpointing
published         the published way of computing it, some sequences of the same batch
kernels, kernels_checkpointed   kernels of one part of these steps, by phase, and those with the most time
lora_7b, lora_3b  a step of larger models with adapters
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import Naive, Networks, Ours
from benchmarks.measure import matmul_ceiling, seconds
from benchmarks.settings import PAPER, Settings
from benchmarks.workload import compute_dtype, cost_of, memory_of, micro_batch_plan, n_parts, random_inputs, shapes
from ebft_study.cost import step_kernels
from ebft_study.methods import MetricAccumulator

Facts = dict[str, Any]
ROOT = Path(__file__).parents[1]
PHASES = {
    "rollouts": "rollout_seconds",
    "features": "feature_seconds",
    "scoring": "scoring_seconds",
    "optimizer": "optimizer_seconds",
}
LONGEST_KERNELS = 20


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often."""

    step: Settings
    lora_3b: Settings
    lora_7b: Settings
    published_sequences: int
    repeats: int
    architectures: tuple[str, ...]
    jobs: int
    """Architectures, and tests, at a time: most of their time is the compiler's."""
    ceiling_size: int | None = None


_LORA = replace(PAPER, lora_rank=16, activation_checkpointing=True)
FULL = Sizes(
    step=PAPER,
    lora_3b=replace(_LORA, model="3b"),
    lora_7b=replace(_LORA, model="7b"),
    published_sequences=2,
    repeats=3,
    architectures=("qwen2", "llama", "qwen3", "mistral", "gemma2"),
    jobs=5,
)

_TINY_STEP = Settings(
    model="tiny-1m",
    sequence_lengths=(16,),
    n_samples=2,
    completion_length=4,
    stride=4,
    batch_size=2,
    precision="bfloat16",
    anchors_at_once=2,
)
_TINY_LORA = replace(_TINY_STEP, lora_rank=2, activation_checkpointing=True)
TINY = Sizes(
    step=_TINY_STEP,
    lora_3b=_TINY_LORA,
    lora_7b=_TINY_LORA,
    published_sequences=1,
    repeats=1,
    architectures=("qwen2",),
    jobs=1,
    ceiling_size=128,
)
"""The same on a CPU, in seconds: it shows that the check runs, and nothing about speed."""


# --- correctness -----------------------------------------------------------------------------------------------


def tests(sizes: Sizes) -> Iterator[Facts]:
    """Outcomes of `tests/gpu`, without the settings of pytest that need plugins or make warnings errors."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", str(ROOT), "tests/gpu"]
        command += ["-p", "no:cacheprovider", "-W", "ignore", "--tb", "short", f"--junitxml={report}"]
        if sizes.jobs > 1 and importlib.util.find_spec("xdist"):
            command += ["-n", str(sizes.jobs)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(f"pytest ended with {ended.returncode}: {(ended.stdout + ended.stderr)[-1500:]}")
        yield outcomes(report)


def outcomes(report: Path) -> Facts:
    """Number of tests by outcome, and the failures with the end of what they say, of a report in JUnit's format."""
    counts: Counter[str] = Counter()
    failures = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kind = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        counts[kind] += 1
        if kind in ("failure", "error"):
            failures[str(case.get("name"))] = (case.findtext(kind) or "")[-800:]
    return {"outcomes": dict(counts), "failures": failures, "wrong": len(failures)}


def architectures(sizes: Sizes) -> Iterator[Facts]:
    """Architectures against their own code on the CPU, in float32 and bfloat16."""
    from tests.architectures import examine

    examined = functools.partial(examine, device=sizes.step.device_type)
    done: Facts = {}
    with _map(sizes.jobs) as mapping:
        for name, by_dtype in zip(sizes.architectures, mapping(examined, sizes.architectures), strict=True):
            done[name] = {dtype: f"{outcome.kind} {outcome.detail}" for dtype, outcome in by_dtype.items()}
            wrong = sum(not text.startswith("equal") for each in done.values() for text in each.values())
            yield {"outcomes": done, "wrong": wrong}


@contextmanager
def _map(jobs: int) -> Iterator[Callable[..., Any]]:
    if jobs == 1:
        yield map
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool.map


# --- a step ----------------------------------------------------------------------------------------------------


@dataclass
class PhasePeaks(MetricAccumulator):
    """Records the most memory that was allocated during each phase."""

    peaks: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def seconds(self, name: str, device: torch.device) -> Iterator[None]:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with super().seconds(name, device):
            yield
        if device.type == "cuda":
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated(device))


def measured_step(settings: Settings, sizes: Sizes, *, repeats: int) -> Iterator[Facts]:
    """Predictions first, then a first step, memory by phase, and seconds by phase.

    Raises:
        ConfigError: by the cost model no micro-batch plan fits.
    """
    ceiling = matmul_ceiling(settings.device, compute_dtype(settings), size=sizes.ceiling_size)
    yield {"settings": asdict(settings), "ceiling_flops_per_second": ceiling}
    flops, memory = cost_of(settings, counting="needed"), memory_of(settings)
    by_phase = {name: getattr(flops, name).flops for name in ("rollouts", "features", "scoring")}
    yield {
        "flops": {**by_phase, "total": flops.total.flops},
        "predicted_bytes": {**memory.phases_bytes, "peak": memory.peak_bytes},
    }
    ours = Ours(settings, Networks.from_settings(settings))
    yield {"plan": asdict(ours.plan), "parts": n_parts(settings, ours.plan)}
    # The first step compiles kernels and makes the optimizer's states.
    yield {"first_step_seconds": seconds(ours.step, settings.device)}
    peaks = PhasePeaks()
    ours.step(peaks)
    measured = {phase: peaks.peaks.get(metric, 0) for phase, metric in PHASES.items()}
    if peaks.peaks:
        reserved = torch.cuda.max_memory_reserved(settings.device)
        yield {"measured_bytes": {**measured, "peak": max(peaks.peaks.values()), "reserved": reserved}}
    before, times = len(ours.accumulators), list[float]()
    for _ in range(repeats):
        times.append(seconds(ours.step, settings.device))
        spent = ours.accumulators[before:]
        phases = {phase: statistics.median(a.of(metric).total for a in spent) for phase, metric in PHASES.items()}
        median = statistics.median(times)
        yield {
            "all_seconds": times,
            "seconds": {**phases, "step": median},
            "utilisation": {
                **{phase: by_phase[phase] / phases[phase] / ceiling for phase in by_phase},
                "step": flops.total.flops / median / ceiling,
            },
        }


def step(sizes: Sizes) -> Iterator[Facts]:
    return measured_step(sizes.step, sizes, repeats=sizes.repeats)


def checkpointed(sizes: Sizes) -> Iterator[Facts]:
    return measured_step(replace(sizes.step, activation_checkpointing=True), sizes, repeats=sizes.repeats)


def lora_3b(sizes: Sizes) -> Iterator[Facts]:
    return measured_step(sizes.lora_3b, sizes, repeats=1)


def lora_7b(sizes: Sizes) -> Iterator[Facts]:
    return measured_step(sizes.lora_7b, sizes, repeats=1)


def published(sizes: Sizes) -> Iterator[Facts]:
    """Seconds of a sequence's gradient in the published way, which runs one at a time; first with fused attention."""
    settings = replace(sizes.step, batch_size=sizes.published_sequences)
    networks, inputs, found = Networks.from_settings(settings), random_inputs(settings), dict[str, float]()
    for attention in ("sdpa", "eager"):
        naive = Naive(replace(settings, naive_attention=attention), networks, inputs)  # type: ignore[arg-type]
        one = Naive(replace(naive.settings, batch_size=1), networks, next(iter(inputs.parts(1))))
        one.backward()  # libraries are loaded
        found[attention] = seconds(naive.backward, settings.device) / settings.batch_size
        yield {"seconds_per_sequence": found, "sequences": settings.batch_size}
    if settings.device_type == "cuda":
        yield {"peak_bytes": torch.cuda.max_memory_allocated(settings.device)}


# --- kernels ---------------------------------------------------------------------------------------------------


@dataclass
class PhaseKernels(MetricAccumulator):
    """Profiles every phase by itself: a trace of a whole step would take longer to read than the step to run."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    nanoseconds: Counter[str] = field(default_factory=Counter)
    """Time of every kernel."""
    calls: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def seconds(self, name: str, device: torch.device) -> Iterator[None]:
        cuda = device.type == "cuda"
        activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
        with profile(activities=[activity], acc_events=True) as profiler, super().seconds(name, device):
            yield
        counts = self.counts.setdefault(name, Counter())
        for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
            called = event.name()
            if event.device_type().name == ("CUDA" if cuda else "CPU"):
                counts["copies" if called.startswith(("Memcpy", "Memset")) else "kernels"] += 1
                counts["device_nanoseconds"] += event.duration_ns()
                self.nanoseconds[called] += event.duration_ns()
                self.calls[called] += 1
            elif "Launch" in called:
                counts["launches"] += 1
            elif "Synchronize" in called:
                counts["synchronisations"] += 1


def profiled_part(whole: Settings) -> Iterator[Facts]:
    """Kernels of one part with about as many blocks as a part of the step has; on a CPU, operations.

    Fewer sequences with all their anchors launch as many kernels as more sequences with some.
    """
    plan, n_anchors = micro_batch_plan(whole), len(whole.shape.anchors)
    size = max(1, plan.micro_batch_size * plan.anchors_at_once // n_anchors)
    settings = replace(whole, batch_size=size, micro_batch_size=size, anchors_at_once=n_anchors)
    ours, observed = Ours(settings, Networks.from_settings(settings)), PhaseKernels()
    ours.step()
    taken = seconds(ours.step, settings.device)
    predicted = step_kernels(*shapes(settings), settings.shape, ours.plan)
    about = {"sequences": size, "parts_of_a_step": n_parts(whole, plan), "predicted_kernels": predicted}
    yield {**about, "seconds": taken}
    ours.step(observed)
    phases = {phase: dict(observed.counts.get(metric, {})) for phase, metric in PHASES.items()}
    longest = [
        {"name": name[:160], "seconds": taken / 1e9, "calls": observed.calls[name]}
        for name, taken in observed.nanoseconds.most_common(LONGEST_KERNELS)
    ]
    total = sum(counts.get("kernels", 0) for counts in phases.values())
    busy = sum(counts.get("device_nanoseconds", 0) for counts in phases.values()) / 1e9
    yield {"phases": phases, "kernels": total, "device_seconds": busy, "longest": longest}


def kernels(sizes: Sizes) -> Iterator[Facts]:
    return profiled_part(sizes.step)


def kernels_checkpointed(sizes: Sizes) -> Iterator[Facts]:
    return profiled_part(replace(sizes.step, activation_checkpointing=True))


@dataclass(frozen=True)
class Part:
    """A part of the check, and the seconds that it may take."""

    measure: Callable[[Sizes], Iterator[Facts]]
    limit_seconds: float


PARTS = {
    "tests": Part(tests, 160),
    "step": Part(step, 120),
    "checkpointed": Part(checkpointed, 75),
    "published": Part(published, 75),
    "kernels": Part(kernels, 90),
    "lora_7b": Part(lora_7b, 100),
    "lora_3b": Part(lora_3b, 60),
    "architectures": Part(architectures, 120),
    "kernels_checkpointed": Part(kernels_checkpointed, 90),
}
"""In the order in which they run; together they may take less (`gpu.LIMIT_SECONDS`)."""
