"""Features of many requests in few passes, each computed once: what the feature service does, without Ray.

requests  ->  keys  ->  cache  ->  what is missing, of all requests together, in one pass  ->  cache, replies
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ebft_study.algorithm.anchors import Anchors, contexts_of
from ebft_study.data import PADDING_DOCUMENT, Batch
from ebft_study.features.cache import TieredCache
from ebft_study.features.keys import FeatureSpec, Keys, sequence_keys
from ebft_study.features.local import LocalFeatures
from ebft_study.networks.blocks import Backend


@dataclass(frozen=True)
class FeatureRequest:
    """A call of `FeatureBackend.embed` as plain arrays."""

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


@dataclass
class Usage:
    """What one request found and cost. Features are counted once each, however often they are asked for."""

    asked: int = 0
    """Samples and ground truth; what is both counts once here."""
    samples: int = 0
    truths: int = 0
    samples_found: int = 0
    truths_found: int = 0
    found_in_memory: int = 0
    found_on_disk: int = 0
    tokens_embedded: int = 0
    """Of sequences and completions that were run for this request."""
    tokens_saved: int = 0
    """That would have been run without a cache and without other requests."""


@dataclass(frozen=True)
class FeatureReply:
    """Per length, phi [S, B, n, d] and psi [S, B, d] float32; 0 where the anchor is not valid."""

    phi: list[np.ndarray]
    psi: list[np.ndarray]
    usage: Usage
    queue_seconds: float = 0.0
    """Time that the request waited for its turn."""
    batch_requests: int = 1
    """Requests that were embedded together."""
    cache_bytes: int = 0


@dataclass
class _Asked:
    """A request on its way: its keys, [length][sequence]."""

    request: FeatureRequest
    keys: list[list[Keys]]
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True)
class _Part:
    """One sequence that has to be run, for the completions `wanted` [B, n] and its ground truth."""

    request: FeatureRequest
    number: int
    keys: list[Keys]
    wanted: np.ndarray


class CachedFeatures:
    """One network that serves every choice of depths, pooling and normalisation; used by one thread."""

    def __init__(self, network: nn.Module, cache: TieredCache, *, fingerprint: str, backend: Backend = "auto") -> None:
        """`network` is taken over: frozen, in evaluation mode. `fingerprint` identifies its weights."""
        self.network = network.eval().requires_grad_(False)
        self.cache, self.fingerprint, self.backend = cache, fingerprint, backend
        parameter = next(network.parameters())
        self.device, self.dtype = parameter.device, str(parameter.dtype)
        self._backends: dict[FeatureSpec, LocalFeatures] = {}

    def indices(self, spec: FeatureSpec) -> list[int]:
        """Layers that the depths stand for."""
        return self._local(spec).indices

    def embed(self, requests: Sequence[FeatureRequest]) -> list[FeatureReply]:
        """Features of all requests; those of one spec and the same lengths share their passes."""
        groups: dict[tuple[FeatureSpec, tuple[int, ...], int], list[int]] = {}
        for number, request in enumerate(requests):
            key = (request.spec, request.lengths, request.completions.shape[-1])
            groups.setdefault(key, []).append(number)
        replies: dict[int, FeatureReply] = {}
        for numbers in groups.values():
            own = self._embed([requests[number] for number in numbers])
            replies |= dict(zip(numbers, own, strict=True))
        return [replies[number] for number in range(len(requests))]

    def _embed(self, requests: list[FeatureRequest]) -> list[FeatureReply]:
        asked = [_Asked(request, self._keys(request)) for request in requests]
        rows: dict[bytes, np.ndarray] = {}
        for one in asked:
            rows |= self._find(one)
        computed = self._compute(_parts(asked, rows))
        self._keep(asked, computed)
        rows |= computed
        used = self.cache.used_bytes
        return [_reply(one, rows, self._sizes(one.request), used) for one in asked]

    def _keep(self, asked: list[_Asked], computed: Mapping[bytes, np.ndarray]) -> None:
        """Ground truth comes again in every epoch and trial; samples, of which there are n times as many, seldom do."""
        truths = {key for one in asked for own in one.keys for keys in own for key in keys.every_truth()}
        self.cache.put({key: row for key, row in computed.items() if key in truths})
        self.cache.put({key: row for key, row in computed.items() if key not in truths}, on_disk=False)

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

    def _find(self, one: _Asked) -> dict[bytes, np.ndarray]:
        """What the cache has of a request's features."""
        samples = {key for own in one.keys for keys in own for key in keys.every_sample()}
        truths = {key for own in one.keys for keys in own for key in keys.every_truth()}
        found, hits = self.cache.get_with_tiers([*truths, *(samples - truths)])
        one.usage.asked, one.usage.samples, one.usage.truths = len(samples | truths), len(samples), len(truths)
        one.usage.samples_found, one.usage.truths_found = len(samples & found.keys()), len(truths & found.keys())
        one.usage.found_in_memory, one.usage.found_on_disk = hits.memory, hits.disk
        return found

    def _compute(self, parts: list[_Part]) -> dict[bytes, np.ndarray]:
        """Features that the parts want, all in one pass."""
        if not parts:
            return {}
        request = parts[0].request
        batch, anchors, completions = _together(parts, self.device)
        local = self._local(request.spec)
        embedded = local.embed(batch, anchors, completions, lengths=request.lengths)
        # No batch comes here twice.
        local.forget()
        computed: dict[bytes, np.ndarray] = {}
        for index, features in enumerate(embedded):
            phi, psi = features.phi.float().cpu().numpy(), features.psi.float().cpu().numpy()
            for s, part in enumerate(parts):
                keys = part.keys[index]
                computed |= {key: psi[s, b] for b, key in enumerate(keys.truth) if key is not None}
                computed |= {keys.sample(b, j): phi[s, b, j] for b, j in np.argwhere(part.wanted).tolist()}
        return computed

    def _local(self, spec: FeatureSpec) -> LocalFeatures:
        if spec not in self._backends:
            # Modules of its own over the same weights: each choice of depths cuts the layers above its deepest one.
            shared = {id(tensor): tensor for tensor in [*self.network.parameters(), *self.network.buffers()]}
            self._backends[spec] = LocalFeatures(
                copy.deepcopy(self.network, shared),
                depths=spec.depths,
                pooling=spec.pooling,
                normalize=spec.normalize,
                backend=self.backend,
                fingerprint=self.fingerprint,
            )
        return self._backends[spec]

    def _sizes(self, request: FeatureRequest) -> list[int]:
        """d of the features at every length."""
        hidden = int(self.network.get_output_embeddings().weight.shape[1])  # type: ignore[operator]
        d = hidden * len(self.indices(request.spec))
        return [d * length if request.spec.pooling == "concat" else d for length in request.lengths]


def _parts(asked: list[_Asked], rows: Mapping[bytes, np.ndarray]) -> list[_Part]:
    """Sequences with features that are not among `rows`; what two of them want is computed for the first."""
    claimed, parts = set(rows), []
    for one in asked:
        G = one.request.completions.shape[-1]
        for s in range(len(one.request.tokens)):
            keys = [own[s] for own in one.keys]
            wanted = np.zeros(one.request.completions.shape[1:3], dtype=bool)
            for b, j in np.argwhere(np.broadcast_to(one.request.valid[s][:, None], wanted.shape)).tolist():
                own = {key.sample(b, j) for key in keys}
                wanted[b, j] = not own <= claimed
                claimed |= own
            truths = {key for own in keys for key in own.every_truth()}
            n_tokens = int((one.request.document_ids[s] != PADDING_DOCUMENT).sum())
            distinct = len(set(keys[-1].every_sample()))
            if wanted.any() or not truths <= claimed:
                parts.append(_Part(one.request, s, keys, wanted))
                one.usage.tokens_embedded += n_tokens + int(wanted.sum()) * G
                one.usage.tokens_saved += (distinct - int(wanted.sum())) * G
            else:
                one.usage.tokens_saved += n_tokens + distinct * G
            claimed |= truths
    return parts


def _together(parts: list[_Part], device: torch.device) -> tuple[Batch, Anchors, Tensor]:
    """The parts as one batch, padded to the longest; in place of completions that are not wanted, repeats."""
    requests = [part.request for part in parts]
    S, G = len(parts), requests[0].completions.shape[-1]
    T, B = max(r.tokens.shape[1] for r in requests), max(r.positions.shape[1] for r in requests)
    n = max(r.completions.shape[2] for r in requests)
    tokens, documents = np.zeros((S, T), np.int64), np.full((S, T), PADDING_DOCUMENT, np.int64)
    positions, valid = np.zeros((S, B), np.int64), np.zeros((S, B), bool)
    completions = np.zeros((S, B, n, G), np.int64)
    for s, part in enumerate(parts):
        request, own = part.request, part.number
        length, (anchors, samples) = request.tokens.shape[1], part.wanted.shape
        tokens[s, :length], documents[s, :length] = request.tokens[own], request.document_ids[own]
        positions[s, :anchors], valid[s, :anchors] = request.positions[own], part.wanted.any(axis=1)
        # Where it is not wanted, an anchor's first wanted completion stands again: the network runs it once.
        chosen = np.where(part.wanted, np.arange(samples), part.wanted.argmax(axis=1)[:, None])
        drawn = np.take_along_axis(request.completions[own], chosen[..., None], axis=1)
        completions[s, :anchors, :samples] = drawn
        completions[s, :anchors, samples:] = drawn[:, :1]
    on_device = [torch.from_numpy(array).to(device) for array in (tokens, documents, positions, valid, completions)]
    batch = Batch(on_device[0], on_device[1], torch.zeros_like(on_device[1], dtype=torch.bool), torch.arange(S))
    return batch, Anchors(on_device[2], on_device[3]), on_device[4]


def _reply(one: _Asked, rows: Mapping[bytes, np.ndarray], sizes: list[int], cache_bytes: int) -> FeatureReply:
    S, B, n, _ = one.request.completions.shape
    phi = [np.zeros((S, B, n, d), np.float32) for d in sizes]
    psi = [np.zeros((S, B, d), np.float32) for d in sizes]
    for index, own in enumerate(one.keys):
        for s, keys in enumerate(own):
            for b, truth in enumerate(keys.truth):
                if truth is not None:
                    psi[index][s, b] = rows[truth]
                    for j in range(n):
                        phi[index][s, b, j] = rows[keys.sample(b, j)]
    return FeatureReply(phi, psi, one.usage, cache_bytes=cache_bytes)
