"""Stochastic rounding of bfloat16 weights: unbiased, AdamW otherwise, and the same again from a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ebft_study.config import OptimizerConfig
from ebft_study.errors import ConfigError
from ebft_study.training import checkpoint, optimizer
from ebft_study.training.optimizer import new_optimizer, round_stochastically
from ebft_study.training.update import Run
from tests.tiny_run import DETERMINISTIC, keep_checkpoints, run_tiny, tiny_config

LOW = {"precision": "bfloat16", "weight_dtype": "bfloat16"}
ROUNDED = LOW | {"rounding": "stochastic"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- rounding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.02, -0.02, 1.001, -3.1415927, 1e-30, 65536.5, 1 + 1 / 256])
def test_a_number_becomes_one_of_its_neighbours_and_itself_on_average(value: float) -> None:
    """Neighbours by their spacing, 2^(exponent - 7); the mean of 200,000 draws within five standard errors."""
    exact = torch.tensor(value).double().item()
    spacing = 2.0 ** (math.floor(math.log2(abs(exact))) - 7)
    lower = math.floor(exact / spacing) * spacing
    drawn = round_stochastically(torch.full((200_000,), value), generator()).double()
    assert set(drawn.unique().tolist()) <= {lower, lower + spacing}
    upper = (exact - lower) / spacing
    error = 5 * math.sqrt(upper * (1 - upper) / len(drawn)) + 2.0**-15
    assert float((drawn - lower).mean() / spacing) == pytest.approx(upper, abs=error)


def test_a_bfloat16_number_stays_as_it_is() -> None:
    """Every finite one, and the infinities."""
    numbers = torch.arange(2**16, dtype=torch.int32).short().view(torch.bfloat16)
    numbers = numbers[~numbers.isnan()]
    assert torch.equal(round_stochastically(numbers.float(), generator()).view(torch.int16), numbers.view(torch.int16))


def test_every_draw_is_independent_of_its_neighbours() -> None:
    """Four draws share 64 random bits; pairs at distances up to 8 are uncorrelated."""
    up = (round_stochastically(torch.full((400_001,), 1 + 1 / 256), generator(1)) > 1).double() - 0.5
    assert len(up) == 400_001
    for distance in range(1, 9):
        correlation = 4 * float((up[distance:] * up[:-distance]).mean())
        assert abs(correlation) < 5 / math.sqrt(len(up))


# --- AdamW -----------------------------------------------------------------------------------------------------


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((40, 7), (13,), (3, 5))]


def train(kind: str, given: list[nn.Parameter], *, steps: int, keys: list[int] | None = None) -> Any:
    config = OptimizerConfig(rounding=kind, weight_decay=0.1)  # type: ignore[arg-type]
    numbers = iter(keys or range(steps))
    chosen = new_optimizer(given, config, learning_rate=0.01, rounding_key=lambda: (next(numbers),))
    noise = generator(7)
    for _ in range(steps):
        for parameter in given[:2]:  # the last one has no gradient
            gradient = torch.randn(parameter.shape, generator=noise, dtype=torch.float32)
            parameter.grad = gradient.to(parameter.dtype)
        chosen.step()
    return chosen


def test_without_rounding_it_is_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of 64 weights, as PyTorch's own does it at once; decay on matrices alone."""
    expected, own = parameters(torch.float32), parameters(torch.float32)
    theirs = train("nearest", expected, steps=5)
    monkeypatch.setattr(optimizer, "_AT_ONCE", 64)
    monkeypatch.setattr(optimizer, "round_stochastically", lambda exact, generator: exact)
    ours = train("stochastic", own, steps=5)
    assert isinstance(ours, optimizer.StochasticAdamW)
    assert not isinstance(theirs, optimizer.StochasticAdamW)
    for one, other in zip(expected, own, strict=True):
        assert torch.equal(one, other)
        assert ours.state[other].keys() == theirs.state[one].keys()
        for name, tensor in theirs.state[one].items():
            assert torch.equal(ours.state[other][name], tensor)


def test_weights_and_states_are_the_rounded_ones_of_one_step() -> None:
    """After one step from bfloat16 weights, everything is a neighbour of what float32 gives, and not always nearest."""
    exact, own = parameters(torch.bfloat16), parameters(torch.bfloat16)
    for parameter in exact:
        parameter.data = parameter.data.float()
    torch.manual_seed(0)
    gradients = [torch.randn(p.shape).bfloat16() for p in own]
    results = []
    for kind, given in (("nearest", exact), ("stochastic", own)):
        chosen = new_optimizer(given, OptimizerConfig(rounding=kind), learning_rate=0.01, rounding_key=lambda: (3,))  # type: ignore[arg-type]
        for parameter, gradient in zip(given, gradients, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        chosen.step()
        results.append(
            [t for p in given for t in (p.detach(), chosen.state[p]["exp_avg"], chosen.state[p]["exp_avg_sq"])]
        )
    nearest = 0
    for one, other in zip(*results, strict=True):
        assert other.dtype == torch.bfloat16
        assert ((other.double() - one.double()).abs() < 2.0**-7 * one.double().abs() + 1e-40).all()
        nearest += int((other == one.bfloat16()).sum())
    total = sum(tensor.numel() for tensor in results[0])
    assert 0.6 * total < nearest < 0.9 * total  # 3/4 if the position between neighbours is uniform


def test_small_steps_are_not_lost_on_average() -> None:
    """A weight of 1 and steps of 1/3000 of it, 1/24 of the distance to its neighbours: 300 steps move it by a tenth."""
    moved = {}
    for kind in ("nearest", "stochastic"):
        weights = nn.Parameter(torch.ones(2000, 1, dtype=torch.bfloat16))
        config = OptimizerConfig(rounding=kind, betas=(0.9, 0.999))  # type: ignore[arg-type]
        step = iter(range(300))
        chosen = new_optimizer([weights], config, learning_rate=1 / 3000, rounding_key=lambda step=step: (next(step),))
        for _ in range(300):
            weights.grad = torch.full_like(weights, 0.5)
            chosen.step()
        moved[kind] = 1 - float(weights.detach().float().mean())
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(0.1, rel=0.05)


def test_averages_of_gradients_with_beta_near_one_follow_their_gradients() -> None:
    """Squares of gradients that fall from 1 to 0.01: to nearest, 0.999 never lets the average fall."""
    averages = {}
    for kind in ("nearest", "stochastic"):
        weights = nn.Parameter(torch.ones(500, 1, dtype=torch.bfloat16))
        config = OptimizerConfig(rounding=kind, betas=(0.9, 0.999))  # type: ignore[arg-type]
        step = iter(range(2000))
        chosen = new_optimizer([weights], config, learning_rate=0.0, rounding_key=lambda step=step: (next(step),))
        weights.grad = torch.ones_like(weights)
        chosen.step()
        chosen.state[weights]["exp_avg_sq"].fill_(1.0)
        for _ in range(1000):
            weights.grad = torch.full_like(weights, 0.1)
            chosen.step()
        averages[kind] = float(chosen.state[weights]["exp_avg_sq"].float().mean())
    assert averages["nearest"] > 0.9
    assert averages["stochastic"] == pytest.approx(0.01 + 0.99 * 0.999**1000, rel=0.02)


def test_the_noise_is_a_function_of_the_key() -> None:
    same, again, other = parameters(torch.bfloat16), parameters(torch.bfloat16), parameters(torch.bfloat16)
    for given, keys in ((same, [1, 2, 3]), (again, [1, 2, 3]), (other, [1, 2, 4])):
        train("stochastic", given, steps=3, keys=keys)
    assert torch.equal(same[0], again[0])
    assert not torch.equal(same[0], other[0])
    assert torch.equal(same[2], parameters(torch.bfloat16)[2])


def test_shards_are_updated_in_place() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain, sharded = parameters(torch.bfloat16), parameters(torch.bfloat16)
        sharded = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in sharded]
        for given in (plain, sharded):
            chosen = new_optimizer(
                given, OptimizerConfig(rounding="stochastic"), learning_rate=0.1, rounding_key=lambda: (3,)
            )
            for parameter in given:
                parameter.grad = torch.ones_like(parameter)
            chosen.step()
        for one, other in zip(plain, sharded, strict=True):
            assert torch.equal(one, other.full_tensor())
            assert chosen.state[other]["exp_avg"].placements == other.placements
        assert not torch.equal(plain[0], parameters(torch.bfloat16)[0])
    finally:
        dist.destroy_process_group()


# --- runs ------------------------------------------------------------------------------------------------------


def test_a_resumed_run_rounds_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **ROUNDED)
    _, whole = run_tiny(config, on_report=keep_checkpoints(tmp_path / "whole"))
    _, rest = run_tiny(config, start_from=tmp_path / "whole" / "step-2", on_report=keep_checkpoints(tmp_path / "rest"))
    for name in DETERMINISTIC:
        assert rest.curve(name) == {step: value for step, value in whole.curve(name).items() if step > 2}
    saved = [checkpoint.load(tmp_path / name / "step-4")["tensors"] for name in ("whole", "rest")]
    for kind, named in saved[0].items():
        for name, tensor in named.items():
            assert torch.equal(tensor, saved[1][kind][name])
    assert saved[0]["weights"].keys() == saved[0]["exp_avg"].keys()
    assert {tensor.dtype for tensor in saved[0]["exp_avg_sq"].values()} == {torch.bfloat16}


def test_seed_step_and_shard_are_the_key_of_the_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[list[int]] = []
    sequence = np.random.SeedSequence
    monkeypatch.setattr(np.random, "SeedSequence", lambda key: keys.append([int(k) for k in key]) or sequence(key))
    run = Run(tiny_config(tmp_path, seed=11, **ROUNDED))
    for _ in range(2):
        run.update()
    assert [key for key in keys if key[1] == optimizer.ROUNDING_STREAM] == [[11, 2, 0, 0], [11, 2, 1, 0]]


def test_it_moves_the_weights_where_rounding_to_nearest_loses_the_steps(tmp_path: Path) -> None:
    """Along the way that float32 weights go: all of it on average, where nearest goes a small part of it."""
    small = {"method": "sft", "learning_rate": 1e-5, "steps": 20, "checkpoint_every_steps": 20, "eval_every_steps": 20}
    ways = {}
    for name, settings in {"float32": LOW | {"weight_dtype": "float32"}, "nearest": LOW, "stochastic": ROUNDED}.items():
        config = tiny_config(tmp_path, **small, **settings)
        begin = {n: p.detach().float().clone() for n, p in Run(config).model.named_parameters() if p.dim() > 1}
        _, recorder = run_tiny(config, on_report=keep_checkpoints(tmp_path / name))
        end = checkpoint.load(tmp_path / name / "step-20")["tensors"]["weights"]
        ways[name] = torch.cat([(end[n].float() - before).flatten() for n, before in begin.items()])
        assert ("vanishing" in dict(recorder.events)) == (name == "nearest")
    exact = ways["float32"].double()
    shares = {name: float(way.double() @ exact / (exact @ exact)) for name, way in ways.items()}
    assert shares["nearest"] < 0.2
    assert 0.5 < shares["stochastic"] < 1.5


def test_a_warning_names_it(tmp_path: Path) -> None:
    _, recorder = run_tiny(tiny_config(tmp_path, learning_rate=1e-6, **LOW))
    assert "rounding=stochastic" in dict(recorder.events)["vanishing"]


def test_it_is_refused_where_nothing_is_rounded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer.rounding.*float32.*weight_dtype=bfloat16"):
        tiny_config(tmp_path, rounding="stochastic")
