"""Signal, noise and angle of gradients against known distributions; and the whole path on a tiny run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ebft_study.training.gradient_noise import cosine, gradient_noise, signal_and_noise
from tests.tiny_run import tiny_config


def test_signal_and_noise_are_those_of_a_known_gaussian() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([3.0, 4.0] + [0.0] * 8)
    draws = mean + 2.0 * torch.randn(20_000, 10, generator=generator)
    signal, noise = signal_and_noise(draws)
    assert signal == pytest.approx(25.0, rel=0.02)
    assert noise == pytest.approx(40.0, rel=0.02)


def test_two_draws_by_hand() -> None:
    """Of draws 1 and 3 the product, 3, is the squared expectation without bias; their mean square is 5."""
    assert signal_and_noise(torch.tensor([[1.0], [3.0]])) == pytest.approx((3.0, 2.0))


def test_shared_noise_does_not_pass_for_agreement() -> None:
    generator = torch.Generator().manual_seed(1)
    shared = 5.0 * torch.randn(20_000, 4, generator=generator)
    first, second = torch.tensor([1.0, 0, 0, 0]) + shared, torch.tensor([0, 1.0, 0, 0]) + shared
    assert abs(cosine(first, second)) < 0.1
    assert cosine(first, first) == pytest.approx(1.0)


def test_no_signal_gives_nan() -> None:
    assert math.isnan(cosine(torch.tensor([[1.0], [-1.0]]), torch.ones(2, 1)))


def test_gradient_noise_compares_settings_of_one_run(tmp_path: Path) -> None:
    rows = gradient_noise(tiny_config(tmp_path), whitenings=["none", "variant_i"], n_samples=[3], draws=4)
    assert [(row["whitening"], row["n_samples"]) for row in rows] == [("none", 3), ("variant_i", 3)]
    assert all(math.isfinite(row["signal_to_noise"]) for row in rows)
