"""Rollouts from vLLM, whose weights are updated through shared memory.

    trainer, first worker     update_weights(): weights -> segment   sample(): request ---->  engine: requested version?
    trainer, other workers    (wait for the next collective)         sample(): request ---->    no: read the segment,
                                                                     <---- tokens, log-probs       empty prefix cache
                                                                                                generate

The engine is a Ray actor on the trainer's machine. A trial's engine belongs to its first worker and ends with it; a
study's engine belongs to the driver. A request names policy and version, so the engine never samples from stale
weights. Its calls run one after another, so trials that share it take turns.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor, nn

from ebft_study import actors
from ebft_study.algorithm.anchors import Anchors, contexts_of
from ebft_study.config import RunConfig
from ebft_study.data import Batch
from ebft_study.errors import ServiceError
from ebft_study.networks.blocks import Prefix
from ebft_study.networks.loading import read_config
from ebft_study.rollouts import Rollouts
from ebft_study.rollouts.answers import Answers, Sampling, no_answers
from ebft_study.rollouts.vllm.engine import (
    CPU_ENVIRONMENT,
    ENVIRONMENT,
    Engine,
    EngineOptions,
    SampleReply,
    SampleRequest,
)
from ebft_study.rollouts.vllm.weights import SharedWeights, Weight, policy_weights

_START_SECONDS = 600.0
_STOP_SECONDS = 10.0
_SMALLEST_NUCLEUS = 1e-6
"""Holds the most probable token alone; vLLM's own greedy sampling gives it log-probability 0."""
_WHO = "the rollout engine"


class VllmRollouts:
    """Samples from the newest weights that `update_weights` has sent to the engine."""

    def __init__(
        self,
        options: EngineOptions,
        *,
        policy: str,
        engine_name: str,
        shared: bool = False,
        sync_every_steps: int = 1,
        timeout_seconds: float = 600.0,
        rank: int = 0,
    ) -> None:
        """Prepare the backend; its engine starts at the first `update_weights`.

        Args:
            policy: identifies the weights among those of all users of the engine.
            engine_name: the actor's name in the study's namespace.
            shared: the driver has started the engine; otherwise the first worker does, and stops it.
            sync_every_steps: versions between two transfers.
        """
        self.options, self.policy, self.engine_name, self.shared = options, policy, engine_name, shared
        self.every, self.timeout_seconds, self.rank = sync_every_steps, timeout_seconds, rank
        self.version: int | None = None
        self._sync_seconds = 0.0
        self._engine: Any = None
        self._weights: SharedWeights | None = None

    def update_weights(self, model: nn.Module, version: int) -> None:
        """See `RolloutBackend.update_weights`. All workers call it; a collective must follow before they sample."""
        if self.version is not None and version % self.every and version > self.version:
            return
        if self.rank == 0:
            self._start_engine()
            before = time.perf_counter()
            weights = policy_weights(model)
            self._weights = self._weights or self._share(weights)
            self._weights.write(weights)
            self._sync_seconds = time.perf_counter() - before
        self.version = version

    def sample(
        self,
        model: nn.Module,
        batch: Batch,
        anchors: Anchors,
        *,
        noise: Tensor,
        temperature: float,
        prefix: Prefix | None = None,
    ) -> Rollouts:
        """See `RolloutBackend.sample`. `noise` seeds the engine's own draws; `model` is not read."""
        if self.version is None:
            raise ServiceError("the engine has no weights yet: call update_weights() first")
        device, valid = batch.tokens.device, anchors.valid.cpu()
        completions = torch.zeros(noise.shape, dtype=torch.int64)
        log_probs = torch.zeros(noise.shape)
        request = self._request(batch, anchors, noise, temperature)
        if request.prompts:
            reply = self._ask(request)
            assert reply.version == self.version
            self._sync_seconds += reply.load_seconds
            completions[valid] = torch.tensor(reply.tokens)
            log_probs[valid] = torch.tensor(reply.log_probs)
        sync_seconds, self._sync_seconds = self._sync_seconds, 0.0
        return Rollouts(completions.to(device), log_probs.to(device), self.version, sync_seconds)

    def sample_answers(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        key: Sequence[int],
        ids: Sequence[int],
        device: torch.device,
    ) -> Answers:
        """See `AnswerSampler.sample`."""
        if self.version is None:
            raise ServiceError("the engine has no weights yet: call update_weights() first")
        if not prompts:
            return no_answers(sampling.n_samples, device)
        request = SampleRequest(
            self.policy,
            self.version,
            [list(prompt) for prompt in prompts],
            [_seed(np.array([*key, row], dtype=np.int64)) for row in ids],
            n_samples=sampling.n_samples,
            completion_length=sampling.max_tokens,
            temperature=1.0 if sampling.is_greedy else sampling.temperature,
            end_tokens=tuple(sorted(sampling.end_tokens)),
            top_p=_SMALLEST_NUCLEUS if sampling.is_greedy else sampling.top_p,
        )
        reply = self._ask(request)
        tokens, log_probs, lengths = (
            torch.tensor(each, device=device) for each in (reply.tokens, reply.log_probs, reply.lengths)
        )
        if request.top_p < 1.0:  # the engine's are those within the nucleus
            log_probs = torch.full_like(log_probs, torch.nan)
        last = tokens.gather(-1, lengths[..., None] - 1)[..., 0]
        ended = torch.isin(last, torch.tensor(request.end_tokens, device=device))
        sync_seconds, self._sync_seconds = self._sync_seconds + reply.load_seconds, 0.0
        return Answers(tokens, log_probs, lengths, ended, self.version, sync_seconds)

    @property
    def engine(self) -> str:
        """See `RolloutBackend.engine`."""
        return f"vLLM {_vllm_version()}, tensor_parallel_size={self.options.tensor_parallel_size}"

    @contextlib.contextmanager
    def answers_of(self, model: nn.Module) -> Iterator[VllmAnswers]:
        """See `RolloutBackend.answers_of`. The engine gets a second policy, and forgets it at the end."""
        if self.rank == 0:
            self._start_engine()
        copy = VllmRollouts(
            self.options,
            policy=f"{self.policy}/answers",
            engine_name=self.engine_name,
            shared=True,  # the engine stays when the copy is closed
            timeout_seconds=self.timeout_seconds,
            rank=self.rank,
        )
        try:
            copy.update_weights(model, 0)
            yield VllmAnswers(copy)
        finally:
            copy.close()

    def close(self) -> None:
        """Stop the trial's own engine, or free the policy's weights in a shared one. A dead engine is no error."""
        engine, self._engine = self._engine, None
        if engine is None or self.rank > 0:
            return
        with contextlib.suppress(Exception):  # an earlier error is the one to report
            if self.shared:
                engine.evict_weights.remote(self.policy)
            else:
                ray.get(engine.stop.remote(), timeout=_STOP_SECONDS)
        if not self.shared:
            ray.kill(engine)

    def _request(self, batch: Batch, anchors: Anchors, noise: Tensor, temperature: float) -> SampleRequest:
        assert self.version is not None
        tokens, valid = batch.tokens.cpu(), anchors.valid.cpu()
        contexts = [bound.cpu() for bound in contexts_of(batch.document_ids, anchors)]
        anchor_indices = valid.nonzero().tolist()
        prompts = [tokens[s, contexts[0][s, b] : contexts[1][s, b]].tolist() for s, b in anchor_indices]
        uniforms = noise.cpu().numpy()
        return SampleRequest(
            self.policy,
            self.version,
            prompts,
            [_seed(uniforms[s, b]) for s, b in anchor_indices],
            n_samples=noise.shape[2],
            completion_length=noise.shape[3],
            temperature=temperature,
        )

    def _ask(self, request: SampleRequest) -> SampleReply:
        if self._engine is None:
            self._engine = actors.find(self.engine_name, seconds=_START_SECONDS)
        reply: SampleReply = actors.answer(
            self._engine.sample.remote(request),
            who=_WHO,
            seconds=self.timeout_seconds,
            setting="vllm.engine_timeout_seconds",
        )
        return reply

    def _start_engine(self) -> None:
        if self._engine is not None:
            return
        if self.shared:
            self._engine = actors.find(self.engine_name, seconds=_START_SECONDS)
            actors.wait_for(self._engine, who=_WHO, seconds=_START_SECONDS)
        else:
            self._engine = start_engine(self.options, self.engine_name)
        actors.answer(self._engine.start.remote(self.options), who=_WHO, seconds=_START_SECONDS)

    def _share(self, weights: dict[str, Weight]) -> SharedWeights:
        """Create a segment, have the engine map it, and remove its name."""
        # The engine would round the weights to its own type anyway.
        segment = SharedWeights(weights, dtype=getattr(torch, self.options.dtype))
        try:
            mapped = self._engine.map_weights.remote(self.policy, segment.path, segment.layout)
            actors.answer(mapped, who=_WHO, seconds=_START_SECONDS)
        finally:
            segment.unlink()
        return segment


class VllmAnswers:
    """Samples whole answers with the engine of `rollouts`, from the weights that it was sent last."""

    tokens_at_once = 2**18  # the engine schedules them itself; a call must end within its time limit

    def __init__(self, rollouts: VllmRollouts) -> None:
        self.rollouts = rollouts

    def sample(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        key: Sequence[int],
        ids: Sequence[int],
    ) -> Answers:
        """See `AnswerSampler.sample`; `model` says where the answers are put."""
        device = next(model.parameters()).device
        return self.rollouts.sample_answers(prompts, sampling, key=key, ids=ids, device=device)


@functools.cache
def _vllm_version() -> str:
    """Without importing it, which changes a process; its builds for a CPU have another name."""
    return importlib.metadata.version(importlib.metadata.packages_distributions()["vllm"][0])


def _seed(numbers: np.ndarray) -> int:
    """Derive a 56-bit seed from a context's noise: two contexts hardly ever have seeds within n of each other."""
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(numbers).tobytes(), digest_size=7).digest(), "little")


def options_of(config: RunConfig, *, source: str, device: torch.device) -> EngineOptions:
    """Return the options of a run's engine; `source` is the folder or hub id of its model."""
    vllm = config.vllm
    colocated = vllm.placement == "colocated"
    longest = vllm.longest_request_tokens or config.longest_request
    positions = getattr(read_config(config.model, revision=config.model_revision), "max_position_embeddings", None)
    return EngineOptions(
        model=source,
        revision=config.model_revision,
        dtype=config.training.precision,
        device=device.type,
        longest_tokens=min(longest, positions or longest),
        tensor_parallel_size=vllm.tensor_parallel_size,
        gpu_memory_utilization=vllm.gpu_memory_utilization,
        kv_cache_bytes=int(vllm.kv_cache_gib * 2**30),
        colocated_with=os.environ.get("CUDA_VISIBLE_DEVICES", "0") if colocated else None,
    )


def start_engine(options: EngineOptions, name: str, *, restarts: bool = False) -> Any:
    """Start an engine on this machine; it lives as long as the handle and the calling process.

    Args:
        restarts: Ray replaces a killed engine; the next user has to start it and to send weights.
    """
    on_gpu = options.device == "cuda"
    own_gpus = options.tensor_parallel_size if on_gpu and options.colocated_with is None else 0
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return (
        ray.remote(Engine)
        .options(
            name=name,
            num_cpus=0,
            num_gpus=own_gpus,
            max_restarts=-1 if restarts else 0,
            # A trial's own placement group has no room for it.
            scheduling_strategy=here,
            runtime_env={"env_vars": ENVIRONMENT | ({} if on_gpu else CPU_ENVIRONMENT)},
        )
        .remote()
    )


def shared_name(options: EngineOptions) -> str:
    """Name the engine of a study: one for each set of options of its trials."""
    return f"engine-{hashlib.blake2b(repr(options).encode(), digest_size=6).hexdigest()}"
