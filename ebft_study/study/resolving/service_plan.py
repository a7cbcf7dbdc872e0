"""The services that trials share: where trials embed that leave it open (`features.backend: auto`), and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ebft_study import text
from ebft_study.config import RunConfig
from ebft_study.cost import StepShape, step_cost
from ebft_study.features import NetworkOptions
from ebft_study.study.cluster.own import object_store_bytes
from ebft_study.study.spec.study_spec import ResourcesSpec
from ebft_study.training.engine_memory import check_room, engine_memory
from ebft_study.training.memory import shapes

SERVICE_PROCESS_BYTES = 700 * 2**20
"""Memory of a service's process besides its network and cache (measured: `ebft-study bench features`)."""
_MOST_RUNS = 32  # configurations of a large study that are looked at
_GIB = 2**30


@dataclass(frozen=True)
class ServicePlan:
    """The services that trials share, and the choices that a study file leaves open."""

    backend: str
    """Backend of trials with `features.backend: auto`: `local` or `service`."""
    reason: str
    travelling_bytes: float = 0.0
    """Size of the requests to feature services, and of their replies, that are sent at a time."""
    longest_request_tokens: int | None = None
    """Longest prompt with completion that an engine shared by trials gets."""

    def settled(self, run: RunConfig) -> RunConfig:
        """The run with every open choice made."""
        changes: dict[str, Any] = {}
        if run.features.backend == "auto":
            backend = "local" if shares_generator(run) else self.backend
            changes["features"] = run.features.model_copy(update={"backend": backend})
        if run.vllm.engine_scope == "study" and run.vllm.longest_request_tokens is None:
            longest = {"longest_request_tokens": self.longest_request_tokens}
            changes["vllm"] = run.vllm.model_copy(update=longest)
        return run.model_copy(update=changes)


def plan_services(runs: Sequence[RunConfig], resources: ResourcesSpec, *, concurrency: int) -> ServicePlan:
    """One feature service for all trials where that takes less memory than a network in each of the concurrent ones.

    A service works as fast as a worker does. Where features are a share f of a step's FLOPs, it can serve 1 / f workers
    without making them wait; with more than that, features stay in the trials.

    Args:
        runs: the configurations of the study, or a sample of them.
        concurrency: trials that run at a time.
    """
    longest = max((run.longest_request for run in runs), default=None)
    sample = [run for run in runs[:: max(1, len(runs) // _MOST_RUNS)] if may_need_service(run)]
    backend, reason = _choose([run for run in sample if run.features.backend == "auto"], resources, concurrency)
    served = [run for run in sample if "service" in (backend, run.features.backend)]
    return ServicePlan(backend, reason, concurrency * max(map(_reply_bytes, served), default=0.0), longest)


def _choose(runs: Sequence[RunConfig], resources: ResourcesSpec, concurrency: int) -> tuple[str, str]:
    """Backend of runs that leave it open, and why; no reason where there is nothing to choose."""
    if not runs or concurrency == 1:
        return "local", ""
    if resources.gpus_per_worker and not resources.feature_gpus:
        return "local", "feature networks are in the trials; a service would need a GPU (resources.feature_gpus)"
    workers = concurrency * resources.processes
    networks = {network_options(run, resources).service_name: _network_bytes(run, whole=True) for run in runs}
    largest = max(map(_network_bytes, runs))
    in_services = sum(networks.values()) + len(networks) * (SERVICE_PROCESS_BYTES + _cache_bytes(runs))
    share = max(map(_feature_share, runs))
    busy = share * workers / len(networks)
    compared = (
        f"{workers} networks of {text.size(largest)} in trials, or {len(networks)} in "
        f"services with {text.size(in_services)} in all; {100 * share:.0f} % of a step's FLOPs are theirs"
    )
    if in_services >= workers * largest:
        return "local", f"feature networks are in the trials, which takes less memory ({compared})"
    if busy > 1:
        return (
            "local",
            f"feature networks are in the trials; a service would have {busy:.1f} times its share of work ({compared})",
        )
    return "service", f"one feature service for all trials saves memory ({compared})"


def check_cache(runs: Sequence[RunConfig], plan: ServicePlan, resources: ResourcesSpec) -> None:
    """Find out, before anything starts, whether services can write their cache.

    Raises:
        ConfigError: the cache's folder cannot be written.
    """
    backends = {run.features.backend: run for run in runs if may_need_service(run)}
    wanted = backends.get("service") or (backends.get("auto") if plan.backend == "service" else None)
    if wanted is not None:
        from ebft_study.features.cache import open_cache

        open_cache(network_options(wanted, resources), lambda _problem: None)


def check_shared_memory(
    runs: Sequence[RunConfig], plan: ServicePlan, resources: ResourcesSpec, *, concurrency: int
) -> None:
    """Refuse, before anything starts, engines whose weights this machine's shared memory cannot hold.

    Raises:
        ConfigError: less is free in /dev/shm.
    """
    served = [run for run in runs if run.uses_engine]
    if served:
        largest = max(engine_memory(run, resources.device_of(run), shapes(run)[0]).segment_bytes for run in served)
        objects = object_store_bytes(plan.travelling_bytes)
        check_room(concurrency * largest + objects, policies=concurrency)


def may_need_service(run: RunConfig) -> bool:
    """Whether its features may come from a service."""
    return run.features.backend != "local" and not shares_generator(run)


def shares_generator(run: RunConfig) -> bool:
    """Whether the generator's own weights are the feature network, as they are with adapters."""
    return run.lora.lora_rank > 0 and run.features.is_base


def network_options(run: RunConfig, resources: ResourcesSpec) -> NetworkOptions:
    """The feature network of a run, as its service is started with it."""
    return NetworkOptions.from_config(
        run, device=torch.device(resources.device_of(run)), threads=resources.cpus_per_worker
    )


def _cache_bytes(runs: Sequence[RunConfig]) -> float:
    return max(run.features.cache_memory_gib for run in runs) * _GIB


def _network_bytes(run: RunConfig, *, whole: bool = False) -> float:
    """Size of the network's weights up to the deepest layer that is read; a service keeps the `whole` model."""
    _, network = shapes(run)
    width = 4 if run.training.precision == "float32" else 2
    return float(width * (network.n_parameters if whole else network.cut(run.features.depths).body_parameters))


def _reply_bytes(run: RunConfig) -> float:
    _, network = shapes(run)
    d = network.hidden_size * len(run.features.depths)
    contexts = run.training.batch_size * max(run.data.sequence_length // run.rollout.stride, 1)
    pooled = run.rollout.completion_length if run.features.pooling == "concat" else 1
    # Request, reply and a copy of it; an evaluation requests all lengths of its profile.
    return 4.0 * 3 * contexts * (run.rollout.n_samples + 1) * d * pooled * len(run.evaluation.profile_lengths)


def _feature_share(run: RunConfig) -> float:
    """Fraction of a step's FLOPs that a feature service takes; 0 for SFT and RLVR, which embed in evaluations only.

    It embeds no whole answers.
    """
    if run.method != "ebft" or run.samples_answers:
        return 0.0
    model, network = shapes(run)
    cost = step_cost(model, network, StepShape.from_config(run))
    return cost.features.flops / cost.total.flops
