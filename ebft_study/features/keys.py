"""Keys of features: digests of everything that a feature depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ebft_study.algorithm.features import Normalization, Pooling

if TYPE_CHECKING:
    from ebft_study.config import RunConfig

KEY_BYTES = 32
_VERSION = 1  # of the computation of features; raise it when that changes


@dataclass(frozen=True)
class FeatureSpec:
    """The features to take from a network, as plain values."""

    depths: tuple[float, ...]
    pooling: Pooling
    normalize: Normalization

    @staticmethod
    def from_config(config: RunConfig) -> FeatureSpec:
        features = config.features
        return FeatureSpec(features.depths, features.pooling, features.normalize)

    @staticmethod
    def of_judge(config: RunConfig) -> FeatureSpec:
        evaluation = config.evaluation
        return FeatureSpec(evaluation.judge_depths, evaluation.judge_pooling, evaluation.judge_normalize)

    def root(self, *, indices: Sequence[int], fingerprint: str, dtype: str, device: str, torch_version: str) -> bytes:
        """Return the common start of the keys of one network's features; `indices` are the layers at the depths.

        Types, devices and versions of torch round differently, so they share no features.
        """
        parts = {
            "version": _VERSION,
            "torch": torch_version,
            "fingerprint": fingerprint,
            "layers": list(indices),
            "pooling": self.pooling,
            "normalize": self.normalize,
            "dtype": dtype,
            "device": device,
        }
        return _digest(json.dumps(parts, sort_keys=True).encode()).digest()


@dataclass(frozen=True)
class Keys:
    """Keys of one sequence at one length: ground truth [B] and samples [B][n]; None where the anchor is not valid."""

    truth: list[bytes | None]
    samples: list[list[bytes] | None]

    def sample(self, b: int, j: int) -> bytes:
        """Return the key of sample j at the valid anchor b."""
        of_anchor = self.samples[b]
        assert of_anchor is not None
        return of_anchor[j]

    def all_truths(self) -> list[bytes]:
        return [key for key in self.truth if key is not None]

    def all_samples(self) -> list[bytes]:
        return [key for of_anchor in self.samples for key in of_anchor or ()]


def sequence_keys(
    root: bytes,
    tokens: np.ndarray,
    contexts: Sequence[Sequence[int]],
    completions: np.ndarray,
    *,
    length: int,
) -> Keys:
    """Compute the keys of the first `length` tokens of one sequence's completions.

    A key is a digest of (root, length, context tokens, completion tokens): the length determines where
    the context ends, so two different pairs never have the same bytes. Nested contexts are read once.

    Args:
        root: see `FeatureSpec.root`.
        tokens: [T] int64.
        contexts: start and end of each anchor's context; equal where the anchor is not valid.
        completions: [B, n, G] int64.
    """
    start = _digest(root + length.to_bytes(8, "little"))
    keys = Keys([], [])
    tokens = np.ascontiguousarray(tokens, dtype=np.int64)
    completions = np.ascontiguousarray(completions[..., :length], dtype=np.int64)
    for (context, end), samples in zip(_context_digests(start, tokens, contexts), completions, strict=True):
        if context is None:
            keys.truth.append(None)
            keys.samples.append(None)
            continue
        keys.truth.append(_key(context, tokens[end : end + length]))
        keys.samples.append([_key(context, completion) for completion in samples])
    return keys


def _context_digests(
    root: hashlib.blake2b, tokens: np.ndarray, contexts: Sequence[Sequence[int]]
) -> Iterator[tuple[hashlib.blake2b | None, int]]:
    """Yield the digest after each context, and its end; a context that extends the one before continues its digest."""
    digest, (digest_start, digest_end) = root, (-1, -1)
    for start, end in contexts:
        if start == end:
            yield None, end
            continue
        if start != digest_start or end < digest_end:
            digest, digest_end = root.copy(), start
        digest.update(tokens[digest_end:end].tobytes())
        digest_start, digest_end = start, end
        yield digest, end


def _key(context: hashlib.blake2b, completion: np.ndarray) -> bytes:
    state = context.copy()
    state.update(completion.tobytes())
    return state.digest()


def _digest(content: bytes) -> hashlib.blake2b:
    return hashlib.blake2b(content, digest_size=KEY_BYTES)
