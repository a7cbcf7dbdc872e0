"""Digests that name a feature by everything that it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ebft_study.algorithm.features import Normalization, Pooling

KEY_BYTES = 32
_VERSION = 1  # of how features are computed; another one shares no features with older ones


@dataclass(frozen=True)
class FeatureSpec:
    """Which features of a network, as plain values."""

    depths: tuple[float, ...]
    pooling: Pooling
    normalize: Normalization

    def root(self, *, indices: Sequence[int], fingerprint: str, dtype: str, device: str, torch_version: str) -> bytes:
        """What the keys of one network's features begin with; `indices` are the layers that the depths stand for.

        Types, devices and versions of torch round differently, so they share nothing.
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
    """Keys of one sequence at one length: of the truth [B] and of the samples [B][n]; None where not valid."""

    truth: list[bytes | None]
    samples: list[list[bytes] | None]

    def sample(self, b: int, j: int) -> bytes:
        """The key of sample j at the valid anchor b."""
        own = self.samples[b]
        assert own is not None
        return own[j]

    def every_truth(self) -> list[bytes]:
        return [key for key in self.truth if key is not None]

    def every_sample(self) -> list[bytes]:
        return [key for own in self.samples if own is not None for key in own]


def sequence_keys(
    root: bytes,
    tokens: np.ndarray,
    contexts: Sequence[Sequence[int]],
    completions: np.ndarray,
    *,
    length: int,
) -> Keys:
    """Keys of the first `length` tokens of one sequence's completions.

    A key is a digest of (root, length, context tokens, completion tokens): with the length given, the bytes say where
    the context ends, so two different pairs never have the same ones. Nested contexts are read once.

    Args:
        root: see `FeatureSpec.root`.
        tokens: [T] int64.
        contexts: start and end of each anchor's context; equal where the anchor is not valid.
        completions: [B, n, G] int64.
    """
    begun = _digest(root + length.to_bytes(8, "little"))
    found = Keys([], [])
    content = np.ascontiguousarray(tokens, dtype=np.int64)
    drawn = np.ascontiguousarray(completions[..., :length], dtype=np.int64)
    for (state, end), own in zip(_contexts(begun, content, contexts), drawn, strict=True):
        if state is None:
            found.truth.append(None)
            found.samples.append(None)
            continue
        found.truth.append(_key(state, content[end : end + length]))
        found.samples.append([_key(state, completion) for completion in own])
    return found


def _contexts(
    begun: hashlib.blake2b, content: np.ndarray, contexts: Sequence[Sequence[int]]
) -> Iterator[tuple[hashlib.blake2b | None, int]]:
    """The digest after each context, and its end; a context that continues the one before is not read again."""
    state, at = None, (-1, -1)
    for start, end in contexts:
        if start == end:
            yield None, end
            continue
        if state is None or start != at[0] or end < at[1]:
            state, at = begun.copy(), (start, start)
        state.update(content[at[1] : end].tobytes())
        at = (start, end)
        yield state, end


def _key(context: hashlib.blake2b, completion: np.ndarray) -> bytes:
    state = context.copy()
    state.update(completion.tobytes())
    return state.digest()


def _digest(content: bytes) -> hashlib.blake2b:
    return hashlib.blake2b(content, digest_size=KEY_BYTES)
