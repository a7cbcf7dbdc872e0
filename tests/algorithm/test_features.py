"""Depths to layers, by hand."""

from __future__ import annotations

import pytest

from ebft_study.algorithm.features import layer_indices

QUARTERS = (0.25, 0.5, 0.75)


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
