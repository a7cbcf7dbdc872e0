"""The cost of a study before anything starts: trials, workers, memory per worker, disk, work, and hours.

Work comes from the cost model; the throughput of this machine, and the cost of evaluations and starts, from the trials
that finished in earlier studies of the same storage folder.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ebft_study import text
from ebft_study.errors import ConfigError
from ebft_study.storage import Location, storage_path
from ebft_study.study.forecast.benchmarks import benchmark_evaluations, benchmark_work
from ebft_study.study.forecast.disk import CheckpointDisk, study_disk
from ebft_study.study.forecast.evidence import detectable_differences
from ebft_study.study.forecast.prediction import Prediction, predict
from ebft_study.study.forecast.trial_groups import TrialGroup, trial_groups
from ebft_study.study.resolving.resolved import ResolvedStudy
from ebft_study.study.resolving.service_plan import check_shared_memory
from ebft_study.study.spec import promotion
from ebft_study.study.spec.study_spec import ResourcesSpec
from ebft_study.training.engine_memory import EngineMemory, engine_memory
from ebft_study.training.memory import LARGE_GPU_BYTES, USABLE, plan_for, shapes, total_memory

_GIB = 2**30
_MOST_PER_GPU = 8


@dataclass(frozen=True)
class PlannedGroup:
    """Trials that cost the same, and whether one of them fits."""

    group: TrialGroup
    memory_gib: float
    """Per worker, at the peak; NaN where not even the smallest micro-batches fit."""
    problem: str
    """Reason why it does not fit."""
    engine: EngineMemory
    """Memory of its engine on a CPU, besides that of its workers."""
    trials_per_gpu: tuple[int, int]
    """How many such trials of one worker fit one GPU, and how many of them without smaller passes; 0 elsewhere."""

    @property
    def fits(self) -> bool:
        return math.isfinite(self.memory_gib)

    @property
    def tokens(self) -> float:
        """Ground-truth tokens that one trial trains on."""
        run = self.group.example.run
        return float(run.total_steps * run.training.batch_size * run.data.sequence_length)


@dataclass(frozen=True)
class StudyPlan:
    """The plan of a study, as `ebft-study plan` shows it."""

    study: ResolvedStudy
    groups: Sequence[PlannedGroup]
    prediction: Prediction | None
    """None where nothing was measured on this machine yet."""
    disk: CheckpointDisk
    disk_shortages: Sequence[str]
    evidence: Sequence[str] = ()
    """The differences that it will be able to tell apart, in sentences."""

    @property
    def n_trials(self) -> int:
        return self.study.n_trials

    @property
    def concurrency(self) -> int:
        return min(self.study.concurrency, self.n_trials)

    @property
    def fits(self) -> bool:
        return all(row.fits for row in self.groups)

    @property
    def hours(self) -> float | None:
        """Wall-clock hours to the end of the last trial, benchmarks of base models included.

        None where nothing was measured on this machine yet, or no trial of one of the models.
        """
        if self.prediction is None or self.prediction.unknown_models:
            return None
        return (self.prediction.seconds + self.prediction.base_seconds) / 3600

    @property
    def gpu_hours(self) -> float:
        """GPU hours of all trials; 0 without GPUs, and where nothing was measured yet."""
        rows = self.prediction.groups if self.prediction else ()
        return sum(row.group.number * row.seconds * row.group.example.resources.gpus for row in rows) / 3600


def plan(study: ResolvedStudy, *, storage: Location, memory_gib: float | None = None) -> StudyPlan:
    """The plan of a study.

    Args:
        storage: the folder of earlier studies, whose trials show the throughput of this machine.
        memory_gib: of a GPU, or of the machine's memory for one worker; default: 79 ("80 GB") on a GPU, else what the
            machine has, of which each concurrent worker must leave the others theirs.
    """
    prediction = predict(study, storage=storage)
    groups = [row.group for row in prediction.groups] if prediction else trial_groups(study)
    planned = [
        PlannedGroup(group, *_memory(study, group, memory_gib), _engine(group), _trials_per_gpu(group, memory_gib))
        for group in groups
    ]
    disk = study_disk(study)
    shortages = disk.shortages(storage_path(storage) / study.name, are_here=not study.capacity.is_existing)
    return StudyPlan(study, planned, prediction, disk, shortages, detectable_differences(study, storage=storage))


def _memory(study: ResolvedStudy, group: TrialGroup, memory_gib: float | None) -> tuple[float, str]:
    """GiB per worker at the peak, as its run will plan it, or NaN and why it does not fit."""
    run, resources = group.example.run, group.example.resources
    device, processes = resources.device_of(run), resources.processes
    default = LARGE_GPU_BYTES if device == "cuda" else total_memory(torch.device("cpu"))
    total = default if memory_gib is None else memory_gib * _GIB
    try:
        planned = plan_for(run, device, total_bytes=total, world_size=processes, gpu_fraction=resources.gpu_fraction)
    except ConfigError as error:
        return math.nan, str(error)
    workers = math.ceil(study.concurrency * processes / len(study.capacity.nodes))
    needed, engine = planned.peak_bytes / _GIB, _engine(group)
    engines = 1 if run.vllm.engine_scope == "study" else study.concurrency
    beside = study.concurrency * engine.segment_bytes + engines * engine.process_bytes
    if device == "cpu" and memory_gib is None and workers * planned.peak_bytes + beside > USABLE * total:
        and_engines = f", and their engines {beside / _GIB:.3g} GiB" if beside else ""
        return math.nan, (
            f"memory={total / _GIB:.3g} GiB: {workers} workers at a time need {needed:.3g} GiB each{and_engines}. "
            "Use a smaller budget.max_concurrent_trials or training.memory_budget_gib"
        )
    try:
        if run.uses_engine and device == "cpu" and memory_gib is None:
            check_shared_memory([run], study.service_plan, study.spec.resources, concurrency=study.concurrency)
    except ConfigError as error:
        return math.nan, str(error)
    return needed, ""


def _engine(group: TrialGroup) -> EngineMemory:
    run, resources = group.example.run, group.example.resources
    if not run.uses_engine or resources.device_of(run) != "cpu":
        return EngineMemory()
    return engine_memory(run, "cpu", shapes(run)[0])


def _trials_per_gpu(group: TrialGroup, memory_gib: float | None) -> tuple[int, int]:
    """See `PlannedGroup.trials_per_gpu`; at most eight are tried."""
    run, resources = group.example.run, group.example.resources
    if resources.device_of(run) == "cpu" or resources.processes > 1 or run.training.memory_budget_gib is not None:
        return 0, 0
    total = LARGE_GPU_BYTES if memory_gib is None else memory_gib * _GIB
    fitting = dict[int, tuple[int, int, bool]]()
    for number in range(1, _MOST_PER_GPU + 1):
        with contextlib.suppress(ConfigError):
            made = plan_for(run, "cuda", total_bytes=total, world_size=1, gpu_fraction=1 / number)
            fitting[number] = made.micro_batch_size, made.anchors_at_once, made.activation_checkpointing
    as_alone = (number for number, passes in fitting.items() if passes == fitting.get(1))
    return max(fitting, default=0), max(as_alone, default=0)


# --- for people ------------------------------------------------------------------------------------------------


def show(planned: StudyPlan, console: Console) -> None:
    """Print the table of trial groups, and the sum in a sentence."""
    spec = planned.study.spec
    table = Table(title=f"{spec.study}: {' '.join(spec.question.split())}", title_justify="left", box=box.SIMPLE_HEAD)
    for header in ("trials like", "number", "steps", "tokens", "TFLOP", "GiB/worker", "time"):
        table.add_column(header, justify="left" if header == "trials like" else "right")
    rows = planned.prediction.groups if planned.prediction else [None] * len(planned.groups)
    for row, predicted in zip(planned.groups, rows, strict=True):
        duration = "unknown" if predicted is None or predicted.throughput.others else text.duration(predicted.seconds)
        group, steps = row.group, row.group.example.run.total_steps
        used = f"{row.memory_gib:.2f}" if row.fits else "too much"
        numbers = (f"{group.number}", f"{steps}", text.count(row.tokens), f"{group.work.flops / 1e12:.3g}", used)
        table.add_row(group.label, *numbers, duration, style="" if row.fits else "red")
    console.print(table)
    for line in summary(planned):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def summary(planned: StudyPlan) -> list[str]:
    """The number of trials, their workers, and the hours."""
    workers = dict.fromkeys(_workers(row.group.example.resources) for row in planned.groups)
    lines = [f"{planned.n_trials} trials, {planned.concurrency} at a time, {' or '.join(workers)} each"]
    lines += [_levels(planned.study)] if planned.study.spec.seeds.promotes else []
    lines += [f"{row.group.label}: {row.problem}" for row in planned.groups if not row.fits]
    lines += dict.fromkeys(_engines(row) for row in planned.groups if row.engine.total_bytes)
    lines += [_sharing(row) for row in planned.groups if row.trials_per_gpu[0]]
    lines += [planned.disk.describe(), *planned.disk_shortages]
    lines += dict.fromkeys(_benchmarks(row.group) for row in planned.groups if row.group.work.has_benchmarks)
    if planned.prediction is None:
        lines += ["no time predicted: no trial has finished here yet to measure this machine by"]
        return [*lines, *planned.evidence]
    if planned.hours is None:
        models = text.listed(planned.prediction.unknown_models)
        time = f"unknown: no trial of {models} has finished here; at the speeds of other models"
        return [*lines, f"{time} {planned.prediction.between}", *planned.evidence]
    gpu_hours = f", {planned.gpu_hours:.3g} GPU hours" if planned.gpu_hours else ""
    basis = _basis(planned.prediction)
    return [*lines, f"about {text.duration(3600 * planned.hours)}{gpu_hours}, by {basis}", *planned.evidence]


def _levels(study: ResolvedStudy) -> str:
    """`9 configurations x 1 seed, 3 x 3, 2 x 5: 19 of 45 trials on the axes; 2 seeds score claims`."""
    seeds = study.spec.seeds
    sizes = [promotion.numbers(len(group), seeds) for group in study.rivals]
    levels = [f"{sum(size)} x {after}" for size, after in zip(zip(*sizes, strict=True), seeds.levels, strict=True)]
    n, start = sum(size[0] for size in sizes), seeds.levels[0]
    levels[0] = f"{n} configurations x {start} seed{'s' * (start > 1)}"
    n_run = study.n_trials - len(study.spec.baselines) * len(seeds.all)
    scoring = study.n_scoring_seeds
    scores = f"{scoring} seeds score claims" if scoring > 1 else f"{scoring} seed scores claims"
    return f"{', '.join(levels)}: {n_run} of {n * len(seeds.all)} trials on the axes; {scores}"


def _benchmarks(group: TrialGroup) -> str:
    """`benchmarks of tiny-1m: 2 per trial and one of the base model, each 164 problems, 2788 answers ...`."""
    run = group.example.run
    work, longest = benchmark_work(run), run.evaluation.benchmark_max_tokens
    judging = f", {text.duration(work.judging_seconds)} of tests" if work.judging_seconds else ""
    return (
        f"benchmarks of {run.model}: {benchmark_evaluations(run)} per trial and one of the base model, each "
        f"{work.problems} problems, {work.answers} answers of up to {longest} tokens, "
        f"{work.flops / 1e12:.3g} TFLOP{judging}"
    )


def _engines(row: PlannedGroup) -> str:
    """`engine of tiny-1m: 1.74 GiB besides the workers, and 0.01 GiB of weights in /dev/shm for each trial`."""
    process, segment = row.engine.process_bytes / _GIB, row.engine.segment_bytes / _GIB
    run = row.group.example.run
    number = "for all trials" if run.vllm.engine_scope == "study" else "for each trial"
    return (
        f"engine of {run.model}: {process:.2f} GiB besides the workers {number}, and {segment:.2f} GiB of weights in "
        "/dev/shm for each trial"
    )


def _sharing(row: PlannedGroup) -> str:
    """`n=4: by memory 4 trials fit one GPU (gpus_per_worker: 0.25), 2 without smaller passes; 1 allows 1`."""
    most, as_alone = row.trials_per_gpu
    given = row.group.example.resources.gpus_per_worker
    smaller = f", {as_alone} without smaller passes" if as_alone < most else ""
    more = " or more" if most == _MOST_PER_GPU else ""
    allowed = max(int(1 / given + 1e-9), 1)
    part = math.floor(1000 / most) / 1000
    return (
        f"{row.group.label}: by memory {most}{more} trial{'s' * (most > 1)} fit{'s' * (most == 1)} one GPU "
        f"(gpus_per_worker: {part:g}){smaller}; the study's {given:g} allows {allowed}"
    )


def _workers(resources: ResourcesSpec) -> str:
    """`4 workers of 2 CPU and 1 GPU`."""
    workers = f"{resources.processes} worker{'s' * (resources.processes > 1)} of {resources.cpus_per_worker} CPU"
    return workers + (f" and {resources.gpus_per_worker:g} GPU" if resources.gpus_per_worker else "")


def _basis(prediction: Prediction) -> str:
    measured = [row.throughput for row in prediction.groups]
    rates = sorted({f"{throughput.flops_per_second / 1e9:.4g}" for throughput in measured}, key=float)
    spread = rates[0] if len(rates) == 1 else f"{rates[0]} to {rates[-1]}"
    n_trials = max(throughput.trials for throughput in measured)
    return f"{spread} GFLOP/s of the {n_trials} finished trials here that are most alike"
