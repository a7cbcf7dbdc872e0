"""The actors that trials of a study share: feature services and rollout engines. They end with the driver."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ebft_study.config import RunConfig
from ebft_study.study.resolving.service_plan import network_options
from ebft_study.study.spec.study_spec import ResourcesSpec

_CLOSE_SECONDS = 30.0


class StudyServices:
    """Starts a service before the first trial that needs it, once for all that share it."""

    def __init__(self, resources: ResourcesSpec) -> None:
        self._resources = resources
        # An actor lives as long as its handle.
        self._features: dict[str, Any] = {}
        self._engines: dict[str, Any] = {}

    def start(self, run: RunConfig) -> None:
        """Start the actors that a run looks up by name, unless another trial has; they may still be loading.

        Args:
            run: with every choice made (`ServicePlan.settled`).
        """
        if run.features.backend == "service":
            from ebft_study.features.service import start_service

            options = network_options(run, self._resources)
            if options.service_name not in self._features:
                started = start_service(options, gpus=self._resources.feature_gpus)
                self._features[options.service_name] = started
        if run.uses_engine and run.vllm.engine_scope == "study":
            from ebft_study.networks.loading import source_of
            from ebft_study.rollouts import vllm

            device = torch.device(self._resources.device_of(run))
            engine = vllm.options_of(run, source=source_of(run.model), device=device)
            name = vllm.shared_name(engine)
            if name not in self._engines:
                self._engines[name] = vllm.start_engine(engine, name, restarts=True)

    def released(self, owner: str) -> None:
        """An attempt has ended, for any reason: engines need not keep its weights."""
        for engine in self._engines.values():
            engine.evict_weights.remote(owner)

    def problems(self) -> list[str]:
        """Problems with caches since the last call; results are not affected."""
        import ray

        problems: list[str] = []
        for service in self._features.values():
            with contextlib.suppress(ray.exceptions.RayError):
                problems += ray.get(service.problems.remote(), timeout=_CLOSE_SECONDS)
        return problems


def needs_ray(run: RunConfig) -> bool:
    """Whether a single run needs other processes."""
    return run.features.backend == "service" or run.uses_engine
