"""What trials take of a cluster, and how many of them run at the same time. Imports neither Ray nor torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ebft_study.config import RunConfig
from ebft_study.study.cluster.capacity import ClusterCapacity, this_machine
from ebft_study.study.spec.study_spec import ResourcesSpec, StudySpec


@dataclass(frozen=True)
class ResourceRequest:
    """What a trial of one kind takes: its processes, CPUs and GPUs of each, and GPUs of an engine of its own."""

    processes: int
    cpus: float
    gpus: float = 0.0
    engine_gpus: float = 0.0

    @property
    def all_gpus(self) -> float:
        return self.processes * self.gpus + self.engine_gpus

    def fit(self, capacity: ClusterCapacity) -> int:
        """Trials of this kind side by side; 0 where not even one fits. Its processes may be on several machines."""
        fits = sum(node.workers(self.cpus, self.gpus) for node in capacity.nodes) // self.processes
        if not self.engine_gpus:
            return fits
        return min(fits, int(capacity.gpus / self.all_gpus + 1e-9))

    def share(self, capacity: ClusterCapacity) -> Fraction:
        """The part of the machines that one such trial takes; at most all of it."""
        return Fraction(1, max(1, self.fit(capacity)))


def most(resource_requests: Iterable[ResourceRequest], capacity: ClusterCapacity) -> int:
    """Trials at a time if all are of the smallest kind; at least one."""
    return max([1, *(need.fit(capacity) for need in resource_requests)])


def resource_requests(resources: ResourcesSpec, runs: Sequence[RunConfig]) -> dict[ResourceRequest, RunConfig | None]:
    """What trials take, by kind, each with a run that takes so much; that of no particular run where there is none."""
    if not runs:
        return {_need(resources, None): None}
    found: dict[ResourceRequest, RunConfig | None] = {}
    for run in runs:
        found.setdefault(request_of(resources, run), run)
    return found


def request_of(resources: ResourcesSpec, run: RunConfig) -> ResourceRequest:
    """What a trial with these settings takes, with an engine of its own."""
    return _need(resources.for_run(run), run)


def _need(own: ResourcesSpec, run: RunConfig | None) -> ResourceRequest:
    engine = 0
    if run and own.gpus_per_worker and _is_apart(run) and run.vllm.engine_scope == "trial":
        engine = run.vllm.tensor_parallel_size
    return ResourceRequest(own.processes, own.cpus_per_worker, own.gpus_per_worker, engine)


def wants_gpus(resources: ResourcesSpec) -> bool:
    """Whether any trial may be on a GPU."""
    overrides = (own for of in resources.by.values() for own in of.values())
    return bool(resources.gpus_per_worker) or any(own.gpus_per_worker for own in overrides)


def shared_gpus(resources: ResourcesSpec, runs: Sequence[RunConfig]) -> float:
    """GPUs of what all trials share."""
    on_gpus = [run for run in runs if resources.for_run(run).gpus_per_worker]
    if not on_gpus and not resources.gpus_per_worker:
        return 0.0
    shared = [run for run in on_gpus if _is_apart(run) and run.vllm.engine_scope == "study"]
    of_study = {_engine_of(run): run.vllm.tensor_parallel_size for run in shared}
    return sum(of_study.values()) + resources.feature_gpus


def _is_apart(run: RunConfig) -> bool:
    """Whether an engine has GPUs that no trial has."""
    return run.uses_engine and run.vllm.placement == "own"


def _engine_of(run: RunConfig) -> tuple[Any, ...]:
    """What must be equal for two trials to share an engine; its longest request is that of all of them."""
    vllm = run.vllm.model_dump(exclude={"engine_timeout_seconds", "longest_request_tokens"})
    return (run.model, run.model_revision, run.training.precision, *vllm.values())


def concurrent_trials(spec: StudySpec, runs: Sequence[RunConfig], capacity: ClusterCapacity | None = None) -> int:
    """As many as fit on the machines, if all are of the smallest kind, and as the budget allows.

    Engines and services take no CPU cores of their own: a trial waits while they work for it.
    """
    capacity = capacity or this_machine(gpus=wants_gpus(spec.resources))
    fits = most(resource_requests(spec.resources, runs), capacity.without_gpus(shared_gpus(spec.resources, runs)))
    return min(fits, spec.budget.max_concurrent_trials or fits)
