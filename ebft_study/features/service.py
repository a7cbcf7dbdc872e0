"""One feature network for all trials of a study, in an actor that any of them finds by name.

    trial  embed() --request-->  queue (bounded)  --all that wait-->  CachedFeatures, in a thread  --reply--> trial
                                                                        memory, disk, one pass for the rest

Whatever waits while a pass runs is embedded together in the next one. A full queue makes trials wait in `embed`. Ray
starts the actor again when its process dies, and sends it the calls that were on their way once more; what it had
written to disk is still known. It ends with the driver, which owns it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
import torch
from torch import Tensor

from ebft_study import actors
from ebft_study.algorithm.anchors import Anchors
from ebft_study.block_model import Backend
from ebft_study.config import RunConfig
from ebft_study.data import Batch
from ebft_study.errors import ServiceError
from ebft_study.features import Features
from ebft_study.features.cache import Cache, DiskCache, MemoryCache, TieredCache
from ebft_study.features.cached import CachedFeatures, FeatureReply, FeatureRequest
from ebft_study.features.keys import FeatureSpec
from ebft_study.paths import cache_folder

MOST_WAITING = 64
"""Requests in the queue; trials with further ones wait until there is room."""
MOST_TOGETHER = 16
"""Requests in one pass, which bounds its memory."""
FLUSH_SECONDS = 60.0
"""What was embedded before the last such moment survives the service's death."""
_WHO = "the feature service"
_SETTING = "features.service_timeout_seconds"


@dataclass(frozen=True)
class NetworkOptions:
    """Which network a service holds, and where it keeps features; plain values."""

    name: str
    revision: str | None
    random_weights: bool
    precision: str
    device: str
    attention: Backend
    memory_bytes: int
    disk_bytes: int
    threads: int = 1

    @staticmethod
    def of(config: RunConfig, *, device: torch.device, threads: int = 1) -> NetworkOptions:
        """The network of a run's features, whatever its depths, pooling and normalisation."""
        features, same = config.features, config.features.feature_network == "base"
        return NetworkOptions(
            name=config.model if same else features.feature_network,
            revision=config.model_revision if same else None,
            random_weights=features.random_weights,
            precision=config.training.precision,
            device=device.type,
            attention=config.training.attention,
            memory_bytes=int(features.cache_memory_gib * 2**30),
            disk_bytes=int(features.cache_disk_gib * 2**30),
            threads=threads,
        )

    @property
    def service_name(self) -> str:
        """The same for all runs that can share a service."""
        identity = {key: value for key, value in dataclasses.asdict(self).items() if key != "threads"}
        return f"features-{hashlib.blake2b(json.dumps(identity).encode(), digest_size=6).hexdigest()}"


class FeatureService:
    """Lives in an actor of its own."""

    def __init__(self, options: NetworkOptions) -> None:
        # Models import features.
        from ebft_study.models import load_model

        torch.set_num_threads(options.threads)
        loaded = load_model(
            options.name,
            revision=options.revision,
            random_weights=options.random_weights,
            device=options.device,
            dtype=getattr(torch, options.precision),
            attention=options.attention,
        )
        self._problems: list[str] = []
        self._cached = CachedFeatures(
            loaded.model, self._cache(options), fingerprint=loaded.fingerprint, backend=options.attention
        )
        self._queue: asyncio.Queue[tuple[FeatureRequest, float, asyncio.Future[FeatureReply]]] | None = None
        # Torch and the cache are used from this one thread.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="features")
        self._worker: asyncio.Task[None] | None = None

    async def describe(self, spec: FeatureSpec) -> tuple[str, list[int]]:
        """The network's fingerprint, and the layers that the depths of `spec` stand for."""
        return self._cached.fingerprint, await self._in_thread(self._cached.indices, spec)

    async def embed(self, request: FeatureRequest, timeout_seconds: float) -> FeatureReply:
        """Features of one request, in a pass that others may share.

        Raises:
            ServiceError: it waited longer than `timeout_seconds`.
        """
        self._start()
        assert self._queue is not None
        future: asyncio.Future[FeatureReply] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._queue.put((request, time.monotonic(), future))
                return await future
        except TimeoutError:
            # A cancelled future's request is skipped when its turn comes.
            future.cancel()
            raise ServiceError(f"{_WHO} had no answer within {timeout_seconds:.0f} seconds ({_SETTING})") from None

    async def problems(self) -> list[str]:
        """What went wrong with the cache, in sentences; each is told once."""
        told, self._problems = self._problems, []
        return told

    async def process_id(self) -> int:
        return os.getpid()

    async def close(self) -> None:
        """Write to disk what is only in memory."""
        await self._in_thread(self._cached.cache.flush)

    def _start(self) -> None:
        if self._worker is None:
            self._queue = asyncio.Queue(maxsize=MOST_WAITING)
            self._worker = asyncio.get_running_loop().create_task(self._serve(self._queue))

    async def _serve(self, queue: asyncio.Queue[Any]) -> None:
        """Take all that waits, embed it together, reply; for ever."""
        flushed = time.monotonic()
        while True:
            waiting = [await queue.get()]
            while len(waiting) < MOST_TOGETHER and not queue.empty():
                waiting.append(queue.get_nowait())
            waiting = [entry for entry in waiting if not entry[2].done()]
            if not waiting:
                continue
            started = time.monotonic()
            try:
                replies = await self._in_thread(self._cached.embed, [request for request, _, _ in waiting])
            except Exception as error:
                for _, _, future in waiting:
                    _settle(future, error=error)
                continue
            for (_, since, future), reply in zip(waiting, replies, strict=True):
                own = dataclasses.replace(reply, queue_seconds=started - since, batch_requests=len(waiting))
                _settle(future, reply=own)
            if time.monotonic() - flushed > FLUSH_SECONDS:
                await self._in_thread(self._cached.cache.flush)
                flushed = time.monotonic()

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _cache(self, options: NetworkOptions) -> TieredCache:
        disk: Cache | None = None
        if options.disk_bytes:
            disk = DiskCache(cache_folder() / "features", options.disk_bytes, on_problem=self._problems.append)
        return TieredCache(MemoryCache(options.memory_bytes), disk)


def _settle(future: asyncio.Future[FeatureReply], *, reply: Any = None, error: Exception | None = None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(reply)


def start_service(options: NetworkOptions, *, gpus: float = 0.0) -> Any:
    """The study's service for one network, a new one unless there is one. It lives as long as the handle."""
    # Blocks of OpenMP threads that wait spinning would starve the trials.
    environment = {"OMP_NUM_THREADS": str(options.threads), "GOMP_SPINCOUNT": "10000"}
    return (
        ray.remote(FeatureService)
        .options(
            name=options.service_name,
            get_if_exists=True,
            num_cpus=0,
            num_gpus=gpus,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=1000,
            runtime_env={"env_vars": environment},
        )
        .remote(options)
    )


def request_of(
    spec: FeatureSpec, batch: Batch, anchors: Anchors, completions: Tensor, lengths: Sequence[int] | None
) -> FeatureRequest:
    """The arguments of `FeatureBackend.embed` as plain arrays."""
    return FeatureRequest(
        spec,
        tokens=batch.tokens.cpu().numpy(),
        document_ids=batch.document_ids.cpu().numpy(),
        positions=anchors.positions.cpu().numpy(),
        valid=anchors.valid.cpu().numpy(),
        completions=completions.cpu().numpy(),
        lengths=tuple(lengths or [completions.shape[-1]]),
    )


class ServiceFeatures:
    """A trial's end of the service; a `FeatureBackend`."""

    def __init__(self, options: NetworkOptions, spec: FeatureSpec, *, timeout_seconds: float) -> None:
        """
        Raises:
            ServiceError: no such service, or none that answers in time.
        """
        self.spec, self.timeout_seconds = spec, timeout_seconds
        self._service = actors.find(options.service_name, seconds=timeout_seconds)
        self.fingerprint, self.indices = self._answer(self._service.describe.remote(spec))
        self.pooling, self.normalize = spec.pooling, spec.normalize
        self._usage: dict[str, tuple[float, float]] = {}

    def embed(
        self, batch: Batch, anchors: Anchors, completions: Tensor, *, lengths: Sequence[int] | None = None
    ) -> list[Features]:
        """See `FeatureBackend.embed`.

        Raises:
            ServiceError: the service is gone for good, or silent for too long.
        """
        request = request_of(self.spec, batch, anchors, completions, lengths)
        reply: FeatureReply = self._answer(self._service.embed.remote(request, self.timeout_seconds))
        self._count(reply)
        device = completions.device
        pairs = zip(reply.phi, reply.psi, strict=True)
        return [Features(torch.tensor(phi, device=device), torch.tensor(psi, device=device)) for phi, psi in pairs]

    def drain_usage(self) -> dict[str, tuple[float, float]]:
        """See `FeatureBackend.drain_usage`."""
        drained, self._usage = self._usage, {}
        return drained

    def _answer(self, reference: Any) -> Any:
        # The service keeps the limit itself; what comes on top is for starting it again.
        return actors.answer(reference, who=_WHO, seconds=2 * self.timeout_seconds, setting=_SETTING)

    def _count(self, reply: FeatureReply) -> None:
        usage = reply.usage
        asked = float(usage.samples + usage.truths)
        counted = {
            "feature_hit_rate_memory": (usage.found_in_memory, asked),
            "feature_hit_rate_disk": (usage.found_on_disk, asked),
            "sample_hit_rate": (usage.samples_found, usage.samples),
            "ground_truth_hit_rate": (usage.truths_found, usage.truths),
            "feature_queue_seconds": (reply.queue_seconds, 1.0),
            "feature_batch_requests": (reply.batch_requests, 1.0),
            "feature_tokens_embedded": (usage.tokens_embedded, 0.0),
            "feature_tokens_saved": (usage.tokens_saved, 0.0),
            "feature_cache_bytes": (reply.cache_bytes, 1.0),
        }
        for name, (total, count) in counted.items():
            before = self._usage.get(name, (0.0, 0.0))
            self._usage[name] = (before[0] + total, before[1] + count)
