"""One feature network for all trials of a study: a named Ray actor, and the trials' client.

    trial  embed() --request-->  queue (bounded)  --all requests in it-->  Embedder, in a thread  --reply--> trial

Requests that arrive during a pass share the next one. A full queue blocks `embed`. Ray restarts an actor whose process
dies and repeats the calls in flight; features on disk survive. The actor ends with the driver, which owns it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import torch
from torch import Tensor

from ebft_study import actors
from ebft_study.algorithm.anchors import Anchors
from ebft_study.data import Batch
from ebft_study.errors import ServiceError
from ebft_study.features import Features, NetworkOptions
from ebft_study.features.cache import open_cache
from ebft_study.features.embedder import Embedder, FeatureReply, FeatureRequest
from ebft_study.features.keys import FeatureSpec
from ebft_study.networks.loading import load_model

QUEUE_REQUESTS = 64
"""Capacity of the queue; trials with further requests wait."""
PASS_REQUESTS = 16
"""Most requests that are embedded together; `embedder.PASS_BYTES` bounds the memory of each pass."""
_WHO = "the feature service"
_TIMEOUT_SETTING = "features.service_timeout_seconds"
T = TypeVar("T")


@dataclass(frozen=True)
class _QueuedRequest:
    request: FeatureRequest
    since: float
    reply: asyncio.Future[FeatureReply]


class FeatureService:
    """The actor's class."""

    def __init__(self, options: NetworkOptions) -> None:
        # The network is loaded by the first call, which can report an error; one raised here would only end the actor.
        self._options = options
        self._loaded: Embedder | None = None
        self._problems: list[str] = []
        self._queue: asyncio.Queue[_QueuedRequest] = asyncio.Queue(maxsize=QUEUE_REQUESTS)
        # Torch and the cache are used from this one thread.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="features")
        self._worker: asyncio.Task[None] | None = None

    async def describe(self, spec: FeatureSpec) -> tuple[str, list[int]]:
        """Return the network's fingerprint and the layers at the depths of `spec`.

        Raises:
            EbftError: the network cannot be loaded, or the cache folder cannot be written.
        """
        return await self._in_thread(lambda: (self._embedder().fingerprint, self._embedder().indices(spec)))

    async def embed(self, request: FeatureRequest, timeout_seconds: float) -> FeatureReply:
        """Embed one request, in a pass that others may share.

        Raises:
            ServiceError: there is no reply within `timeout_seconds`.
        """
        loop = asyncio.get_running_loop()
        if self._worker is None:
            self._worker = loop.create_task(self._serve())
        reply: asyncio.Future[FeatureReply] = loop.create_future()
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._queue.put(_QueuedRequest(request, time.monotonic(), reply))
                return await reply
        except TimeoutError:
            # The worker skips requests whose reply is cancelled.
            reply.cancel()
            raise ServiceError(
                f"{_WHO} had no answer within {timeout_seconds:.0f} seconds ({_TIMEOUT_SETTING})"
            ) from None

    async def problems(self) -> list[str]:
        """Return the cache's problems since the last call, in sentences."""
        problems, self._problems = self._problems, []
        return problems

    async def process_id(self) -> int:
        return os.getpid()

    async def _serve(self) -> None:
        """Take the queued requests, embed them in one pass, reply; runs until the actor ends."""
        while True:
            queued = [await self._queue.get()]
            while len(queued) < PASS_REQUESTS and not self._queue.empty():
                queued.append(self._queue.get_nowait())
            queued = [entry for entry in queued if not entry.reply.done()]
            if not await self._reply(queued) and len(queued) > 1:
                # One of them may be at fault.
                for entry in queued:
                    await self._reply([entry])

    async def _reply(self, queued: list[_QueuedRequest]) -> bool:
        """Embed requests in one pass; False if it fails. A single request receives the error."""
        if not queued:
            return True
        started = time.monotonic()
        try:
            replies = await self._in_thread(lambda: self._embedder().embed([entry.request for entry in queued]))
        except Exception as error:
            if len(queued) == 1 and not queued[0].reply.done():
                queued[0].reply.set_exception(error)
            return False
        for entry, reply in zip(queued, replies, strict=True):
            if not entry.reply.done():
                waited = started - entry.since
                entry.reply.set_result(dataclasses.replace(reply, queue_seconds=waited, batch_requests=len(queued)))
        return True

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _embedder(self) -> Embedder:
        """Return network and cache, loaded by the first call; runs in the thread."""
        if self._loaded is None:
            options = self._options
            torch.set_num_threads(options.threads)
            cache = open_cache(options, self._problems.append)
            network = load_model(
                options.name,
                revision=options.revision,
                random_weights=options.random_weights,
                device=options.device,
                dtype=getattr(torch, options.precision),
                attention=options.attention,
                needs_head=False,
            )
            self._loaded = Embedder(network.model, cache, fingerprint=network.fingerprint, backend=options.attention)
        return self._loaded


def start_service(options: NetworkOptions, *, gpus: float = 0.0) -> Any:
    """Start the study's service for one network, or return the running one. It lives as long as the handle."""
    # OpenMP threads that wait spinning would starve the trials.
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


class ServiceFeatures:
    """A trial's client of the service; a `FeatureBackend`."""

    def __init__(self, options: NetworkOptions, spec: FeatureSpec, *, timeout_seconds: float) -> None:
        """
        Raises:
            ServiceError: there is no such service, or it does not answer in time.
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
            ServiceError: the service has ended for good, or does not answer in time.
        """
        request = FeatureRequest.from_batch(self.spec, batch, anchors, completions, lengths)
        reply: FeatureReply = self._answer(self._service.embed.remote(request, self.timeout_seconds))
        self._count(reply)
        device = completions.device
        pairs = zip(reply.phi, reply.psi, strict=True)
        return [Features(torch.tensor(phi, device=device), torch.tensor(psi, device=device)) for phi, psi in pairs]

    def free_prefix(self) -> None:
        """Do nothing: the service keeps no batch."""

    def drain_usage(self) -> dict[str, tuple[float, float]]:
        """See `FeatureBackend.drain_usage`."""
        drained, self._usage = self._usage, {}
        return drained

    def _answer(self, reference: Any) -> Any:
        # The service enforces the limit itself; the rest is time for a restart.
        return actors.answer(reference, who=_WHO, seconds=2 * self.timeout_seconds, setting=_TIMEOUT_SETTING)

    def _count(self, reply: FeatureReply) -> None:
        usage = reply.usage
        counted = {
            "feature_hit_rate_memory": (usage.memory_hits, usage.requested),
            "feature_hit_rate_disk": (usage.disk_hits, usage.requested),
            "sample_hit_rate": (usage.sample_hits, usage.samples),
            "ground_truth_hit_rate": (usage.truth_hits, usage.truths),
            "feature_queue_seconds": (reply.queue_seconds, 1),
            "feature_batch_requests": (reply.batch_requests, 1),
            "feature_tokens_embedded": (usage.tokens_embedded, 1),
            "feature_tokens_saved": (usage.tokens_saved, 1),
            "feature_cache_bytes": (reply.cache_bytes, 1),
        }
        for name, (total, count) in counted.items():
            total_before, count_before = self._usage.get(name, (0.0, 0.0))
            self._usage[name] = (total_before + total, count_before + count)
