"""Resources that trials request of a cluster. Imports neither Ray nor torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ebft_study.config import RunConfig
from ebft_study.study.cluster.capacity import ClusterCapacity
from ebft_study.study.spec.study_spec import ResourcesSpec
from ebft_study.study.spec.trials import Trial


@dataclass(frozen=True)
class ResourceRequest:
    """The processes of one trial, CPUs and GPUs of each, and GPUs of an engine of its own."""

    processes: int
    cpus: float
    gpus: float = 0.0
    engine_gpus: float = 0.0

    @classmethod
    def for_trial(cls, trial: Trial) -> ResourceRequest:
        run, resources, engine_gpus = trial.run, trial.resources, 0
        if resources.gpus_per_worker and _engine_has_gpus(run) and run.vllm.engine_scope == "trial":
            engine_gpus = run.vllm.tensor_parallel_size
        return cls(resources.processes, resources.cpus_per_worker, resources.gpus_per_worker, engine_gpus)

    @property
    def all_gpus(self) -> float:
        return self.processes * self.gpus + self.engine_gpus

    def fit(self, capacity: ClusterCapacity) -> int:
        """Number of such trials that run concurrently; 0 where not even one fits. Its processes may span machines."""
        fits = sum(node.workers(self.cpus, self.gpus) for node in capacity.nodes) // self.processes
        if not self.engine_gpus:
            return fits
        return min(fits, int(capacity.gpus / self.all_gpus + 1e-9))

    def share(self, capacity: ClusterCapacity) -> Fraction:
        """The part of the machines that one such trial takes; at most all of it."""
        return Fraction(1, max(1, self.fit(capacity)))


def wants_gpus(resources: ResourcesSpec) -> bool:
    """Whether any trial may be on a GPU."""
    overrides = (override for values in resources.by.values() for override in values.values())
    return bool(resources.gpus_per_worker) or any(override.gpus_per_worker for override in overrides)


def shared_gpus(resources: ResourcesSpec, trials: Sequence[Trial]) -> float:
    """GPUs of the services that all trials share: the feature service, and engines of `engine_scope: study`."""
    on_gpus = [trial.run for trial in trials if trial.resources.gpus_per_worker]
    if not on_gpus and not resources.gpus_per_worker:
        return 0.0
    shared = [run for run in on_gpus if _engine_has_gpus(run) and run.vllm.engine_scope == "study"]
    engines = {_engine_key(run): run.vllm.tensor_parallel_size for run in shared}
    return sum(engines.values()) + resources.feature_gpus


def _engine_has_gpus(run: RunConfig) -> bool:
    """Whether an engine has GPUs that no trial has."""
    return run.uses_engine and run.vllm.placement == "own"


def _engine_key(run: RunConfig) -> tuple[Any, ...]:
    """Key that is equal for trials that share an engine; the engine's longest request is that of all of them."""
    vllm = run.vllm.model_dump(exclude={"engine_timeout_seconds", "longest_request_tokens"})
    return (run.model, run.model_revision, run.training.precision, *vllm.values())
