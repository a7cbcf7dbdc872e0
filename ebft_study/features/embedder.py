"""Embeds many requests in few passes, and each feature once: the work of the feature service, without Ray.

requests -> keys -> cache -> passes for the missing features of all requests -> cache, replies
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ebft_study.algorithm.anchors import Anchors, contexts_of
from ebft_study.cost import ModelShape, embedded_bytes_per_token
from ebft_study.data import PADDING_DOCUMENT, Batch
from ebft_study.features.cache import TieredCache
from ebft_study.features.keys import FeatureSpec, Keys, sequence_keys
from ebft_study.features.local import LocalFeatures, over_same_weights
from ebft_study.networks.blocks import Backend
from ebft_study.networks.verification import verify

PASS_BYTES = {"cpu": 2**30, "cuda": 2**32}
"""Memory of the sequences of one pass. Requests of several trials take several passes where they need more."""


@dataclass(frozen=True)
class FeatureRequest:
    """The arguments of `FeatureBackend.embed` as plain arrays."""

    spec: FeatureSpec
    tokens: np.ndarray
    """[S, T] int64"""
    document_ids: np.ndarray
    """[S, T] int64"""
    positions: np.ndarray
    """[S, B] int64"""
    valid: np.ndarray
    """[S, B] bool"""
    completions: np.ndarray
    """[S, B, n, G] int64"""
    lengths: tuple[int, ...]

    @staticmethod
    def from_batch(
        spec: FeatureSpec, batch: Batch, anchors: Anchors, completions: Tensor, lengths: Sequence[int] | None
    ) -> FeatureRequest:
        return FeatureRequest(
            spec,
            tokens=batch.tokens.cpu().numpy(),
            document_ids=batch.document_ids.cpu().numpy(),
            positions=anchors.positions.cpu().numpy(),
            valid=anchors.valid.cpu().numpy(),
            completions=completions.cpu().numpy(),
            lengths=tuple(lengths or [completions.shape[-1]]),
        )


@dataclass
class Usage:
    """Cache hits and tokens of one request. A feature counts once, however often the request contains it."""

    requested: int = 0
    """Samples and ground truth; a sample that equals the ground truth counts once here."""
    samples: int = 0
    truths: int = 0
    sample_hits: int = 0
    truth_hits: int = 0
    memory_hits: int = 0
    disk_hits: int = 0
    tokens_embedded: int = 0
    """Tokens of the sequences and completions that were run for this request."""
    tokens_saved: int = 0
    """Tokens that would also have been run without the cache and without other requests."""


@dataclass(frozen=True)
class FeatureReply:
    """Per length, phi [S, B, n, d] and psi [S, B, d] float32; 0 where the anchor is not valid."""

    phi: list[np.ndarray]
    psi: list[np.ndarray]
    usage: Usage
    queue_seconds: float = 0.0
    """Time from the request's arrival to the start of its pass."""
    batch_requests: int = 1
    """Requests in the same pass."""
    cache_bytes: int = 0


@dataclass
class _Job:
    """A request with its keys [length][sequence], and the usage counted for it."""

    request: FeatureRequest
    keys: list[list[Keys]]
    usage: Usage = field(default_factory=Usage)

    def samples(self) -> set[bytes]:
        return {key for of_length in self.keys for keys in of_length for key in keys.all_samples()}

    def truths(self) -> set[bytes]:
        return {key for of_length in self.keys for keys in of_length for key in keys.all_truths()}


@dataclass(frozen=True)
class _Part:
    """Sequence `s` of a request, to be run for the completions `missing` [B, n] and for its ground truth."""

    request: FeatureRequest
    s: int
    keys: list[Keys]
    missing: np.ndarray


class Embedder:
    """One network that serves every choice of depths, pooling and normalisation. For use by one thread."""

    def __init__(self, network: nn.Module, cache: TieredCache, *, fingerprint: str, backend: Backend = "auto") -> None:
        """`network` is frozen and put in evaluation mode; `fingerprint` identifies its weights."""
        self.network = network.eval().requires_grad_(False)
        self.cache, self.fingerprint, self.backend = cache, fingerprint, backend
        parameter = next(network.parameters())
        self.device, self.dtype = parameter.device, str(parameter.dtype)
        self._backends: dict[FeatureSpec, LocalFeatures] = {}
        self._verified_tokens = 0

    def indices(self, spec: FeatureSpec) -> list[int]:
        """Return the layers at the depths of `spec`."""
        return self._local(spec).indices

    def embed(self, requests: Sequence[FeatureRequest]) -> list[FeatureReply]:
        """Embed all requests; those of one spec and the same lengths share passes, as many as `PASS_BYTES` hold.

        Raises:
            ModelError: the network is not exact over sequences as long as these (see `verify`).
        """
        self._verify(requests)
        groups: dict[tuple[FeatureSpec, tuple[int, ...], int], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault((request.spec, request.lengths, request.completions.shape[-1]), []).append(index)
        replies: dict[int, FeatureReply] = {}
        for indices in groups.values():
            replies |= zip(indices, self._embed([requests[index] for index in indices]), strict=True)
        return [replies[index] for index in range(len(requests))]

    def _verify(self, requests: Sequence[FeatureRequest]) -> None:
        """Trials of a study may have longer sequences than the first one that the network served."""
        n_tokens, length = (max(sizes) for sizes in zip(*(_lengths(request) for request in requests), strict=True))
        if n_tokens + length > self._verified_tokens:
            name = str(getattr(self.network.config, "name_or_path", ""))
            verify(self.network, name=name, n_tokens=n_tokens, completion_length=length, backend=self.backend)
            self._verified_tokens = n_tokens + length

    def _embed(self, requests: list[FeatureRequest]) -> list[FeatureReply]:
        jobs = [_Job(request, self._keys(request)) for request in requests]
        rows: dict[bytes, np.ndarray] = {}
        for job in jobs:
            rows |= self._look_up(job)
        computed = dict[bytes, np.ndarray]()
        for parts in self._passes(_missing_parts(jobs, rows)):
            computed |= self._compute(parts)
        # Ground truth comes again in every epoch and trial; samples, n times as many, seldom do.
        truths = {key for job in jobs for key in job.truths()}
        self.cache.put({key: row for key, row in computed.items() if key in truths})
        self.cache.put({key: row for key, row in computed.items() if key not in truths}, on_disk=False)
        rows |= computed
        cache_bytes = self.cache.used_bytes
        return [_reply(job, rows, self._feature_sizes(job.request), cache_bytes) for job in jobs]

    def _keys(self, request: FeatureRequest) -> list[list[Keys]]:
        root = request.spec.root(
            indices=self.indices(request.spec),
            fingerprint=self.fingerprint,
            dtype=self.dtype,
            device=self.device.type,
            torch_version=torch.__version__,
        )
        anchors = Anchors(torch.tensor(request.positions), torch.tensor(request.valid))
        contexts = contexts_of(torch.tensor(request.document_ids), anchors)
        bounds = torch.stack(contexts, dim=-1).tolist()
        return [
            [
                sequence_keys(root, tokens, bound, completions, length=length)
                for tokens, bound, completions in zip(request.tokens, bounds, request.completions, strict=True)
            ]
            for length in request.lengths
        ]

    def _look_up(self, job: _Job) -> dict[bytes, np.ndarray]:
        """Return the cached features of a job, and count them."""
        samples, truths, usage = job.samples(), job.truths(), job.usage
        rows, hits = self.cache.get_with_tiers([*truths, *(samples - truths)])
        usage.requested, usage.samples, usage.truths = len(samples | truths), len(samples), len(truths)
        usage.sample_hits, usage.truth_hits = len(samples & rows.keys()), len(truths & rows.keys())
        usage.memory_hits, usage.disk_hits = hits.memory, hits.disk
        return rows

    def _compute(self, parts: list[_Part]) -> dict[bytes, np.ndarray]:
        """Run all parts in one pass; returns their missing features and ground truth by key."""
        request = parts[0].request
        batch, anchors, completions = _join(parts, self.device)
        local = self._local(request.spec)
        embedded = local.embed(batch, anchors, completions, lengths=request.lengths)
        # A batch is embedded only once here, so its prefix is of no further use.
        local.free_prefix()
        computed: dict[bytes, np.ndarray] = {}
        for index, features in enumerate(embedded):
            phi, psi = features.phi.float().cpu().numpy(), features.psi.float().cpu().numpy()
            for row, part in enumerate(parts):
                keys = part.keys[index]
                computed |= {key: psi[row, b] for b, key in enumerate(keys.truth) if key is not None}
                computed |= {keys.sample(b, j): phi[row, b, j] for b, j in np.argwhere(part.missing).tolist()}
        return computed

    def _passes(self, parts: list[_Part]) -> Iterator[list[_Part]]:
        """Cut the parts, in order, into passes that fit into `PASS_BYTES`; a pass has at least one."""
        joined, largest = list[_Part](), 0
        for part in parts:
            larger = max(largest, self._bytes(part.request))
            if joined and larger * (len(joined) + 1) > PASS_BYTES[self.device.type]:
                yield joined
                joined, larger = [], self._bytes(part.request)
            joined.append(part)
            largest = larger
        if joined:
            yield joined

    def _bytes(self, request: FeatureRequest) -> int:
        """Return the memory of one sequence of a request, with the features of its completions."""
        shape, width = ModelShape.from_config(self.network.config), next(self.network.parameters()).element_size()
        per_token = embedded_bytes_per_token(shape, request.spec.depths, compute_bytes=width)
        T, (B, n) = int(request.tokens.shape[1]), map(int, request.completions.shape[1:3])
        return per_token * T + 4 * B * (n + 1) * sum(self._feature_sizes(request))

    def _local(self, spec: FeatureSpec) -> LocalFeatures:
        if spec not in self._backends:
            # Each choice of depths cuts the layers above its deepest one.
            self._backends[spec] = LocalFeatures(
                over_same_weights(self.network),
                depths=spec.depths,
                pooling=spec.pooling,
                normalize=spec.normalize,
                backend=self.backend,
                fingerprint=self.fingerprint,
            )
        return self._backends[spec]

    def _feature_sizes(self, request: FeatureRequest) -> list[int]:
        """Return d at every length."""
        hidden = int(self.network.get_output_embeddings().weight.shape[1])  # type: ignore[operator]
        d = hidden * len(self.indices(request.spec))
        return [d * length if request.spec.pooling == "concat" else d for length in request.lengths]


def _lengths(request: FeatureRequest) -> tuple[int, int]:
    return request.tokens.shape[-1], request.completions.shape[-1]


def _missing_parts(jobs: list[_Job], rows: Mapping[bytes, np.ndarray]) -> list[_Part]:
    """List the sequences with features that are not in `rows`; a feature of several jobs is computed for the first."""
    claimed, parts = set(rows), []
    for job in jobs:
        request, usage = job.request, job.usage
        _, _, n, G = request.completions.shape
        for s in range(len(request.tokens)):
            keys = [of_length[s] for of_length in job.keys]
            missing = np.zeros((request.completions.shape[1], n), dtype=bool)
            for b in np.flatnonzero(request.valid[s]).tolist():
                for j in range(n):
                    of_sample = {key.sample(b, j) for key in keys}
                    missing[b, j] = not of_sample <= claimed
                    claimed |= of_sample
            truths = {key for of_length in keys for key in of_length.all_truths()}
            n_tokens = int((request.document_ids[s] != PADDING_DOCUMENT).sum())
            n_distinct, n_missing = len(set(keys[-1].all_samples())), int(missing.sum())
            if n_missing or not truths <= claimed:
                parts.append(_Part(request, s, keys, missing))
                usage.tokens_embedded += n_tokens + n_missing * G
                usage.tokens_saved += (n_distinct - n_missing) * G
            else:
                usage.tokens_saved += n_tokens + n_distinct * G
            claimed |= truths
    return parts


def _join(parts: list[_Part], device: torch.device) -> tuple[Batch, Anchors, Tensor]:
    """Join the parts in one batch, padded to the longest; repeats replace the completions that are not missing."""
    requests = [part.request for part in parts]
    S, G = len(parts), requests[0].completions.shape[-1]
    T, B = max(r.tokens.shape[1] for r in requests), max(r.positions.shape[1] for r in requests)
    n = max(r.completions.shape[2] for r in requests)
    tokens, documents = np.zeros((S, T), np.int64), np.full((S, T), PADDING_DOCUMENT, np.int64)
    positions, valid = np.zeros((S, B), np.int64), np.zeros((S, B), bool)
    completions = np.zeros((S, B, n, G), np.int64)
    for row, part in enumerate(parts):
        request, s = part.request, part.s
        length, (n_anchors, n_samples) = request.tokens.shape[1], part.missing.shape
        tokens[row, :length], documents[row, :length] = request.tokens[s], request.document_ids[s]
        positions[row, :n_anchors], valid[row, :n_anchors] = request.positions[s], part.missing.any(axis=1)
        # The network runs equal completions of an anchor once, so repeats of its first missing one cost nothing.
        chosen = np.where(part.missing, np.arange(n_samples), part.missing.argmax(axis=1)[:, None])
        repeated = np.take_along_axis(request.completions[s], chosen[..., None], axis=1)
        completions[row, :n_anchors, :n_samples] = repeated
        completions[row, :n_anchors, n_samples:] = repeated[:, :1]
    on_device = [torch.from_numpy(array).to(device) for array in (tokens, documents, positions, valid, completions)]
    batch = Batch(on_device[0], on_device[1], torch.zeros_like(on_device[1], dtype=torch.bool), torch.arange(S))
    return batch, Anchors(on_device[2], on_device[3]), on_device[4]


def _reply(job: _Job, rows: Mapping[bytes, np.ndarray], sizes: list[int], cache_bytes: int) -> FeatureReply:
    S, B, n, _ = job.request.completions.shape
    phi = [np.zeros((S, B, n, d), np.float32) for d in sizes]
    psi = [np.zeros((S, B, d), np.float32) for d in sizes]
    for index, of_length in enumerate(job.keys):
        for s, keys in enumerate(of_length):
            for b, truth in enumerate(keys.truth):
                if truth is not None:
                    psi[index][s, b] = rows[truth]
                    phi[index][s, b] = [rows[keys.sample(b, j)] for j in range(n)]
    return FeatureReply(phi, psi, job.usage, cache_bytes=cache_bytes)
