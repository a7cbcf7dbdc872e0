"""What trials of a study share: feature services and rollout engines. The driver owns them, and they end with it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from ebft_study import config
from ebft_study.config import RunConfig
from ebft_study.study.resolving.feature_plan import FeaturePlan, network_options, shares_generator
from ebft_study.study.spec.study_spec import ResourcesSpec

_CLOSE_SECONDS = 30.0


class StudyServices:
    """Starts what a trial needs before it does, once for all that share it."""

    def __init__(self, resources: ResourcesSpec, plan: FeaturePlan, runs: Sequence[RunConfig] = ()) -> None:
        """`runs`: those that may share an engine."""
        self._resources, self.plan = resources, plan
        self._longest = max((run.longest_request for run in runs), default=None)
        # An actor lives as long as its handle.
        self._features: dict[str, Any] = {}
        self._engines: dict[str, Any] = {}

    def settle(self, run: RunConfig) -> RunConfig:
        """The run with every open choice made."""
        chosen: dict[str, Any] = {}
        if run.features.backend == "auto":
            chosen["features"] = {"backend": "local" if shares_generator(run) else self.plan.backend}
        if run.vllm.engine_scope == "study" and run.vllm.longest_request_tokens is None:
            chosen["vllm"] = {"longest_request_tokens": self._longest}
        return config.build_run(config.merge(run.model_dump(), chosen), source=run.name)

    def provide(self, run: RunConfig) -> None:
        """Have the actors started that a settled run asks for by name; they may still be loading."""
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
        """An attempt has ended, in whatever way: engines need not keep its weights."""
        for engine in self._engines.values():
            engine.evict_weights.remote(owner)

    def problems(self) -> list[str]:
        """What went wrong with caches since the last call; results are not affected."""
        import ray

        found: list[str] = []
        for service in self._features.values():
            with contextlib.suppress(ray.exceptions.RayError):
                found += ray.get(service.problems.remote(), timeout=_CLOSE_SECONDS)
        return found


def needs_ray(run: RunConfig) -> bool:
    """Whether a single run has need of other processes."""
    return run.features.backend == "service" or run.uses_engine
