"""Depths to layers by hand; the feature map: poolings, norms, and the order of the two."""

from __future__ import annotations

import typing

import pytest
import torch

from ebft_study.algorithm.features import Normalization, Pooling, feature_map, layer_indices
from ebft_study.config import FeaturesConfig

LAYERS, G, H = 3, 4, 16
QUARTERS = (0.25, 0.5, 0.75)


def states(seed: int = 0) -> list[torch.Tensor]:
    """Layers of very different size, [5, G, H] each."""
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(5, G, H, generator=generator) for scale in (1.0, 5.0, 30.0)]


def squares(pooling: Pooling, normalize: Normalization) -> torch.Tensor:
    return feature_map(states(), pooling=pooling, normalize=normalize).square().sum(dim=-1)


def test_lengths_tell_the_order_of_mean_pooling_and_normalisation() -> None:
    """Unit vectors average to the root of their mean cosine."""
    together = torch.cat(states(), dim=-1)
    pairs = [(together, "token_joint"), *((layer, "token_per_layer") for layer in states())]
    cosines = [
        (torch.cosine_similarity(each[:, :, None], each[:, None], dim=-1).mean(dim=(1, 2)), name)
        for each, name in pairs
    ]
    torch.testing.assert_close(squares("mean", "token_joint"), cosines[0][0])
    torch.testing.assert_close(squares("mean", "token_per_layer"), sum(cosine for cosine, _ in cosines[1:]))
    torch.testing.assert_close(squares("mean", "joint"), torch.ones(5))
    torch.testing.assert_close(squares("mean", "per_layer"), torch.full((5,), 3.0))
    assert float(squares("mean", "token_joint").max()) < 0.6


@pytest.mark.parametrize("scope", ["per_layer", "joint"])
def test_both_orders_agree_on_one_token_and_differ_on_several(scope: str) -> None:
    def both(pooling: Pooling, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        names = typing.cast(tuple[Normalization, Normalization], (scope, f"token_{scope}"))
        return [feature_map(hidden, pooling=pooling, normalize=name) for name in names]

    one = [layer[:, :1] for layer in states()]
    for pooling, hidden, equal in [
        ("last_token", states(), True), ("mean", one, True), ("concat", one, True),
        ("mean", states(), False), ("concat", states(), False),
    ]:  # fmt: skip
        first, then = both(typing.cast(Pooling, pooling), hidden)
        assert torch.equal(first, then) == equal


def test_the_authors_mean_pooling_weighs_all_tokens_alike() -> None:
    """A token with a large state dominates the pooled state, but not the mean of normalised states."""
    hidden = states()
    changed = [torch.cat([layer[:, :1] * 1000.0, layer[:, 1:]], dim=1) for layer in hidden]
    for normalize in ("token_per_layer", "token_joint"):
        torch.testing.assert_close(*(feature_map(h, pooling="mean", normalize=normalize) for h in (hidden, changed)))
    pooled = [feature_map(h, pooling="mean", normalize="joint") for h in (hidden, changed)]
    assert not torch.allclose(*pooled, atol=0.1)


def test_settings_offer_what_the_map_computes() -> None:
    fields = FeaturesConfig.model_fields
    assert typing.get_args(fields["normalize"].annotation) == typing.get_args(Normalization)
    assert typing.get_args(fields["pooling"].annotation) == typing.get_args(Pooling)


@pytest.mark.parametrize(
    ("depths", "n_layers", "expected"),
    [
        (QUARTERS, 28, [7, 14, 21]),
        (QUARTERS, 6, [1, 3, 4]),
        (QUARTERS, 2, [1]),
        ((0.1, 1.0), 3, [1, 3]),
        ((0.7,), 10, [7]),
        ((0.29,), 100, [29]),
    ],
    ids=["the paper's", "rounded down", "never the embeddings", "the ends", "binary rounding", "binary rounding, too"],
)
def test_depths_are_layers_rounded_down(depths: tuple[float, ...], n_layers: int, expected: list[int]) -> None:
    assert layer_indices(depths, n_layers) == expected


@pytest.mark.parametrize("depth", [0.0, -0.5, 1.01])
def test_depths_outside_the_network_are_refused(depth: float) -> None:
    with pytest.raises(ValueError, match="depths must lie"):
        layer_indices((depth,), 4)
