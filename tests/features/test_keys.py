"""Keys of cached features: different whenever anything that a feature depends on is, and equal otherwise."""

from __future__ import annotations

import hashlib
import itertools
import typing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ebft_study.algorithm.anchors import find_anchors
from ebft_study.algorithm.features import Normalization
from ebft_study.data import Batch
from ebft_study.features.cache import MemoryCache, TieredCache
from ebft_study.features.embedder import Embedder, FeatureRequest
from ebft_study.features.keys import FeatureSpec, sequence_keys
from ebft_study.features.local import LocalFeatures
from ebft_study.networks.loading import fingerprint
from tests.small_models import small_batch, small_model

SPEC = FeatureSpec((0.25, 0.5, 0.75), "last_token", "per_layer")
NETWORK: dict[str, Any] = {
    "indices": [1, 2, 3], "fingerprint": "f", "dtype": "float32", "device": "cpu", "torch_version": "2",
}  # fmt: skip


def test_every_part_of_what_features_are_changes_the_root() -> None:
    changed = [
        SPEC.root(**NETWORK),
        FeatureSpec(SPEC.depths, "mean", "per_layer").root(**NETWORK),
        *(
            FeatureSpec(SPEC.depths, "last_token", other).root(**NETWORK)
            for other in typing.get_args(Normalization)[1:]
        ),
        *(SPEC.root(**(NETWORK | {key: [1, 2] if key == "indices" else "other"})) for key in NETWORK),
    ]
    assert len(set(changed)) == len(changed)
    assert FeatureSpec((0.26, 0.5, 0.75), "last_token", "per_layer").root(**NETWORK) == changed[0]


def test_the_fingerprint_of_a_network_depends_on_weights_and_on_how_they_are_used() -> None:
    network, other, wider = small_model(), small_model(seed=1), small_model()
    wider.config.rms_norm_eps = 0.1  # type: ignore[union-attr]
    assert fingerprint(network) == fingerprint(small_model())
    assert len({fingerprint(model) for model in (network, other, wider)}) == 3


def plainly(root: bytes, context: np.ndarray, completion: np.ndarray) -> bytes:
    """The definition: one digest over root, length, context and completion."""
    content = root + len(completion).to_bytes(8, "little") + context.tobytes() + completion.tobytes()
    return hashlib.blake2b(content, digest_size=32).digest()


def test_keys_of_nested_contexts_are_those_of_each_context_alone() -> None:
    tokens = np.arange(100, 120)
    contexts = [(0, 4), (0, 8), (10, 12), (0, 0), (10, 15), (3, 6), (3, 5)]
    completions = np.random.default_rng(0).integers(0, 50, (len(contexts), 2, 4))
    for length in (1, 3, 4):
        keys = sequence_keys(b"root", tokens, contexts, completions, length=length)
        for b, (start, end) in enumerate(contexts):
            if start == end:
                assert keys.truth[b] is None
                assert keys.samples[b] is None
                continue
            assert keys.truth[b] == plainly(b"root", tokens[start:end], tokens[end : end + length])
            for j in range(2):
                assert keys.sample(b, j) == plainly(b"root", tokens[start:end], completions[b, j, :length])


def test_no_two_pairs_of_context_and_completion_share_a_key() -> None:
    """All contexts and completions of up to three tokens over two words, in every split of their joint tokens."""
    words = [np.array(pair) for n in (1, 2, 3) for pair in itertools.product((0, 1), repeat=n)]
    seen: dict[bytes, tuple[bytes, bytes]] = {}
    for context, completion in itertools.product(words, words):
        tokens = np.concatenate([context, completion])
        keys = sequence_keys(b"root", tokens, [(0, len(context))], completion[None, None], length=len(completion))
        key, pair = keys.sample(0, 0), (context.tobytes(), completion.tobytes())
        assert seen.setdefault(key, pair) == pair
        assert keys.truth[0] == key
    assert len(seen) == len(words) ** 2


def request(batch: Batch, completions: torch.Tensor) -> FeatureRequest:
    anchors = find_anchors(batch.document_ids, completion_length=4, stride=4, first_context_length=4)
    return FeatureRequest.from_batch(SPEC, batch, anchors, completions, None)


@pytest.fixture
def embedder() -> Embedder:
    return Embedder(small_model(), TieredCache(MemoryCache(2**24), None), fingerprint="f")


def test_what_two_requests_of_one_pass_have_in_common_is_embedded_once(embedder: Embedder) -> None:
    batch = small_batch([[0] * 16])
    drawn = torch.randint(0, 40, (1, 3, 2, 4), generator=torch.Generator().manual_seed(0))
    other = drawn.clone()
    other[0, 1, 1] += 1
    first, second = embedder.embed([request(batch, drawn), request(batch, other % 40)])
    # A sequence of 16 tokens and six completions of four; then the sequence and the one that differs.
    assert (first.usage.tokens_embedded, first.usage.tokens_saved) == (16 + 24, 0)
    assert (second.usage.tokens_embedded, second.usage.tokens_saved) == (16 + 4, 20)
    np.testing.assert_array_equal(first.psi[0], second.psi[0])
    same = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    for b, j in same:
        np.testing.assert_array_equal(first.phi[0][0, b, j], second.phi[0][0, b, j])
    assert not np.array_equal(first.phi[0][0, 1, 1], second.phi[0][0, 1, 1])


def test_a_completion_known_at_one_length_is_run_for_the_others(embedder: Embedder) -> None:
    batch = small_batch([[0] * 16])
    drawn = torch.randint(0, 40, (1, 3, 2, 4), generator=torch.Generator().manual_seed(0))
    anchors = find_anchors(batch.document_ids, completion_length=4, stride=4, first_context_length=4)
    fresh = Embedder(small_model(), TieredCache(MemoryCache(2**24), None), fingerprint="f")
    embedder.embed([FeatureRequest.from_batch(SPEC, batch, anchors, drawn, [2])])
    both = FeatureRequest.from_batch(SPEC, batch, anchors, drawn, [2, 4])
    for known, computed in zip(embedder.embed([both])[0].phi, fresh.embed([both])[0].phi, strict=True):
        np.testing.assert_allclose(known, computed, atol=1e-6)


def test_a_sequence_of_which_everything_is_known_is_not_run(embedder: Embedder) -> None:
    batch = small_batch([[0] * 16, [0] * 16])
    drawn = torch.randint(0, 40, (2, 3, 2, 4), generator=torch.Generator().manual_seed(0))
    embedder.embed([request(batch, drawn)])
    changed = drawn.clone()
    changed[1, 0, 0] = (changed[1, 0, 0] + 1) % 40
    (reply,) = embedder.embed([request(batch, changed)])
    assert reply.usage.tokens_embedded == 16 + 4
    assert reply.usage.tokens_saved == 16 + 6 * 4 + 5 * 4
    assert reply.usage.truth_hits == reply.usage.truths == 6
    assert reply.usage.sample_hits == reply.usage.samples - 1


def test_joined_requests_take_as_many_passes_as_memory_holds(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass holds as many sequences as fit, or a single one, and the features are the same."""
    generator = torch.Generator().manual_seed(0)
    asked = []
    for T in (16, 16, 24, 16, 16):
        batch = replace(small_batch([[0] * T] * 2), tokens=torch.randint(0, 40, (2, T), generator=generator))
        anchors = find_anchors(batch.document_ids, completion_length=4, stride=4, first_context_length=4)
        drawn = torch.randint(0, 40, (2, anchors.positions.shape[1], 2, 4), generator=generator)
        asked.append(FeatureRequest.from_batch(SPEC, batch, anchors, drawn, None))
    together = embedder.embed(asked)
    shapes: list[tuple[int, int]] = []
    embed = LocalFeatures.embed

    def counted(self: LocalFeatures, batch: Batch, *rest: Any, **keywords: Any) -> Any:
        shapes.append(tuple(batch.tokens.shape))  # type: ignore[arg-type]
        return embed(self, batch, *rest, **keywords)

    monkeypatch.setattr(LocalFeatures, "embed", counted)
    small, large = embedder._bytes(asked[0]), embedder._bytes(asked[2])
    for budget, expected in (
        (3 * large, [(4, 16), (3, 24), (3, 16)]),
        (4 * small, [(4, 16), (2, 24), (4, 16)]),
        (1, [(1, 16)] * 4 + [(1, 24)] * 2 + [(1, 16)] * 4),
        (10 * large, [(10, 24)]),
    ):
        monkeypatch.setattr("ebft_study.features.embedder.PASS_BYTES", {"cpu": budget})
        shapes.clear()
        fresh = Embedder(small_model(), TieredCache(MemoryCache(2**24), None), fingerprint="f")
        for one, other in zip(fresh.embed(asked), together, strict=True):
            np.testing.assert_allclose(one.phi[0], other.phi[0], atol=1e-6)
            np.testing.assert_allclose(one.psi[0], other.psi[0], atol=1e-6)
            assert one.usage == other.usage
        assert shapes == expected, budget
