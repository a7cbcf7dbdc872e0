"""One feature network for all trials of a study, in an actor that any of them finds by name.

    trial  embed() --request-->  queue (bounded)  --all that wait-->  CachedFeatures, in a thread  --reply--> trial
                                                                        memory, disk, one pass for the rest

Whatever waits while a pass runs is embedded together in the next one. A full queue makes trials wait in `embed`. Ray
starts the actor again when its process dies, and sends it the calls that were on their way once more; what it had
written to disk is still known. It ends with the driver, which owns it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
import torch

from ebft_study.config import RunConfig
from ebft_study.errors import ServiceError
from ebft_study.features.cache import Cache, DiskCache, MemoryCache, TieredCache
from ebft_study.features.cached import CachedFeatures, FeatureReply, FeatureRequest
from ebft_study.features.keys import FeatureSpec
from ebft_study.networks.blocks import Backend
from ebft_study.paths import cache_folder

MOST_WAITING = 64
"""Requests in the queue; trials with further ones wait until there is room."""
MOST_TOGETHER = 16
"""Requests in one pass, which bounds its memory."""
FLUSH_SECONDS = 60.0
"""What was embedded before the last such moment survives the service's death."""
WHO = "the feature service"
TIMEOUT_SETTING = "features.service_timeout_seconds"


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
    def from_config(config: RunConfig, *, device: torch.device, threads: int = 1) -> NetworkOptions:
        """The network of a run's features, whatever its depths, pooling and normalisation."""
        features, (name, revision) = config.features, config.feature_model
        return NetworkOptions(
            name=name,
            revision=revision,
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


@dataclass(frozen=True)
class _Waiting:
    """A request in the queue, since when, and where its reply goes."""

    request: FeatureRequest
    since: float
    future: asyncio.Future[FeatureReply]


class FeatureService:
    """Lives in an actor of its own."""

    def __init__(self, options: NetworkOptions) -> None:
        # What cannot be loaded is told to those who ask; an exception here would only end the actor.
        self._options = options
        self._cached: CachedFeatures | None = None
        self._problems: list[str] = []
        self._queue: asyncio.Queue[_Waiting] | None = None
        # Torch and the cache are used from this one thread.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="features")
        self._worker: asyncio.Task[None] | None = None

    async def describe(self, spec: FeatureSpec) -> tuple[str, list[int]]:
        """The network's fingerprint, and the layers that the depths of `spec` stand for.

        Raises:
            EbftError: a network that cannot be loaded, or a cache folder that cannot be written.
        """
        described: tuple[str, list[int]] = await self._in_thread(self._describe, spec)
        return described

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
                await self._queue.put(_Waiting(request, time.monotonic(), future))
                return await future
        except TimeoutError:
            # A cancelled future's request is skipped when its turn comes.
            future.cancel()
            raise ServiceError(
                f"{WHO} had no answer within {timeout_seconds:.0f} seconds ({TIMEOUT_SETTING})"
            ) from None

    async def problems(self) -> list[str]:
        """What went wrong with the cache, in sentences; each is told once."""
        told, self._problems = self._problems, []
        return told

    async def process_id(self) -> int:
        return os.getpid()

    async def close(self) -> None:
        """Write to disk what is only in memory."""
        await self._in_thread(self._flush)

    def _start(self) -> None:
        if self._worker is None:
            self._queue = asyncio.Queue(maxsize=MOST_WAITING)
            self._worker = asyncio.get_running_loop().create_task(self._serve(self._queue))

    async def _serve(self, queue: asyncio.Queue[_Waiting]) -> None:
        """Take all that waits, embed it together, reply; for ever."""
        flushed = time.monotonic()
        while True:
            waiting = [await queue.get()]
            while len(waiting) < MOST_TOGETHER and not queue.empty():
                waiting.append(queue.get_nowait())
            waiting = [entry for entry in waiting if not entry.future.done()]
            if not await self._reply(waiting) and len(waiting) > 1:
                # One of them may be at fault, or all together too large.
                for entry in waiting:
                    await self._reply([entry])
            if time.monotonic() - flushed > FLUSH_SECONDS:
                flushed = time.monotonic()
                with contextlib.suppress(Exception):  # a cache that fails costs time only
                    await self._in_thread(self._flush)

    async def _reply(self, waiting: list[_Waiting]) -> bool:
        """Embed some requests in one pass; False if that failed. A single one learns why."""
        if not waiting:
            return True
        started = time.monotonic()
        try:
            replies = await self._in_thread(self._embed, [entry.request for entry in waiting])
        except Exception as error:
            if len(waiting) == 1 and not waiting[0].future.done():
                waiting[0].future.set_exception(error)
            return False
        for entry, reply in zip(waiting, replies, strict=True):
            if not entry.future.done():
                waited = started - entry.since
                own = dataclasses.replace(reply, queue_seconds=waited, batch_requests=len(waiting))
                entry.future.set_result(own)
        return True

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    # --- in the thread -----------------------------------------------------------------------------------------

    def _describe(self, spec: FeatureSpec) -> tuple[str, list[int]]:
        cached = self._ready()
        return cached.fingerprint, cached.indices(spec)

    def _embed(self, requests: list[FeatureRequest]) -> list[FeatureReply]:
        return self._ready().embed(requests)

    def _flush(self) -> None:
        if self._cached is not None:
            self._cached.cache.flush()

    def _ready(self) -> CachedFeatures:
        """Network and cache, loaded by the first who asks."""
        if self._cached is None:
            # Models import features.
            from ebft_study.networks.loading import load_model

            options = self._options
            torch.set_num_threads(options.threads)
            cache = open_cache(options, self._problems.append)
            loaded = load_model(
                options.name,
                revision=options.revision,
                random_weights=options.random_weights,
                device=options.device,
                dtype=getattr(torch, options.precision),
                attention=options.attention,
            )
            self._cached = CachedFeatures(
                loaded.model, cache, fingerprint=loaded.fingerprint, backend=options.attention
            )
        return self._cached


def open_cache(options: NetworkOptions, on_problem: Callable[[str], None]) -> TieredCache:
    """The two tiers of a service.

    Raises:
        ConfigError: a folder that cannot be written.
    """
    disk: Cache | None = None
    if options.disk_bytes:
        disk = DiskCache(cache_folder() / "features", options.disk_bytes, on_problem=on_problem)
    return TieredCache(MemoryCache(options.memory_bytes), disk)


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
