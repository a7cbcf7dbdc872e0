"""The share of updates that a weight's type is too coarse for, against comparing all weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ebft_study.training.update import Run
from ebft_study.training.validation import vanishing_updates
from ebft_study.training.vanishing import watch
from tests.tiny_run import run_tiny, tiny_config

METRIC = "unchanged_weight_fraction"


def with_gradient(weight: torch.Tensor, gradient: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(weight)
    parameter.grad = gradient
    return parameter


def test_weights_without_a_gradient_and_vectors_do_not_count() -> None:
    matrix = with_gradient(torch.ones(2, 3), torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]))
    vector, unused = with_gradient(torch.ones(5), torch.ones(5)), nn.Parameter(torch.ones(2, 2))
    unchanged = watch([matrix, vector, unused])
    with torch.no_grad():
        matrix[0] += 1.0  # of which two have a gradient
    assert unchanged() == (2.0, 4.0)


def test_a_sample_of_large_matrices_is_like_all_of_them() -> None:
    """Also where one column in 64 changes, and of many matrices every third."""
    generator = torch.Generator().manual_seed(0)
    matrices = [with_gradient(torch.zeros(512, 512), torch.ones(512, 512)) for _ in range(192)]
    unchanged = watch(matrices)
    with torch.no_grad():
        for number, matrix in enumerate(matrices):
            if number % 3 == 0:
                matrix[:, ::2] += torch.rand(512, 256, generator=generator) + 0.1
    total, count = unchanged()
    assert count < 200_000
    assert total / count == pytest.approx(1 - 1 / 6, abs=0.03)


def test_bfloat16_weights_hardly_change_at_a_small_learning_rate_and_the_run_says_so_once(tmp_path: Path) -> None:
    small: dict[str, Any] = {"learning_rate": 1e-6, "steps": 6, "log_every_steps": 2}
    low = {"precision": "bfloat16", "weight_dtype": "bfloat16"}
    _, coarse = run_tiny(tiny_config(tmp_path, **small, **low))
    assert set(coarse.curve(METRIC)) == {2, 4, 6}
    assert min(coarse.curve(METRIC).values()) > 0.9
    ((_, message),) = [event for event in coarse.events if event[0] == "vanishing"]
    for part in ("learning rate 1e-06", "weight_dtype=bfloat16", "weight_dtype=float32"):
        assert part in message
    for settings in (small, small | low | {"learning_rate": 0.05}):
        _, fine = run_tiny(tiny_config(tmp_path, **settings))
        assert max(fine.curve(METRIC).values()) < 0.4
        assert "vanishing" not in dict(fine.events)


def test_the_metric_is_what_comparing_all_weights_gives(tmp_path: Path) -> None:
    low = {"precision": "bfloat16", "weight_dtype": "bfloat16", "learning_rate": 3e-4, "max_grad_norm": None}
    run = Run(tiny_config(tmp_path, **low))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.dim() > 1}
    gradients: dict[str, torch.Tensor] = {}
    step = run.optimizer.step

    def observed(*arguments: Any) -> Any:
        gradients.update({n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None})
        return step(*arguments)

    run.optimizer.step = observed  # type: ignore[method-assign]
    run.update()
    after = dict(run.model.named_parameters())
    counts = [((before[n] == after[n])[gradients[n] != 0].sum(), (gradients[n] != 0).sum()) for n in before]
    expected = float(sum(u for u, _ in counts) / sum(c for _, c in counts))
    assert 0.1 < expected < 0.9
    assert run.accumulator.mean(METRIC) == pytest.approx(expected, abs=0.05)


def test_a_warm_up_and_a_learning_rate_of_zero_are_no_reason_to_warn(tmp_path: Path) -> None:
    low = {"precision": "bfloat16", "weight_dtype": "bfloat16"}
    _, stopped = run_tiny(tiny_config(tmp_path, learning_rate=0.0, **low))
    assert stopped.curve(METRIC) == {}
    run, rate = Run(tiny_config(tmp_path, **low)), 1e-3
    assert not vanishing_updates(run, {METRIC: 0.9, "learning_rate": 0.4 * rate})
    assert not vanishing_updates(run, {METRIC: 0.4, "learning_rate": rate})
    assert not vanishing_updates(run, {"learning_rate": rate})
    assert "90 % of the weights" in vanishing_updates(run, {METRIC: 0.9, "learning_rate": 0.6 * rate})
    assert not vanishing_updates(run, {METRIC: 0.9, "learning_rate": rate}), "once is enough"
