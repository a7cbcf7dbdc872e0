"""A trial's end of the feature service."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ebft_study import actors
from ebft_study.algorithm.anchors import Anchors
from ebft_study.data import Batch
from ebft_study.features import Features
from ebft_study.features.cached import FeatureReply, FeatureRequest
from ebft_study.features.keys import FeatureSpec
from ebft_study.features.service import TIMEOUT_SETTING, WHO, NetworkOptions


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
        return actors.answer(reference, who=WHO, seconds=2 * self.timeout_seconds, setting=TIMEOUT_SETTING)

    def _count(self, reply: FeatureReply) -> None:
        usage = reply.usage
        asked = float(usage.asked)
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
