"""One EBFT step: the same gradient however it is cut into parts, and whoever samples."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ebft_study.algorithm.anchors import Anchors, find_anchors
from ebft_study.config import build_run, nest
from ebft_study.data import Batch
from ebft_study.features.local import LocalFeatures
from ebft_study.methods import LossDenominators, MetricAccumulator
from ebft_study.methods.ebft import Ebft
from ebft_study.rollouts import Rollouts
from ebft_study.rollouts.strided import StridedRollouts
from tests.references import naive_model
from tests.rollout_backends import WithoutGraph
from tests.small_models import ARCHITECTURES, small_batch, small_model

LAYOUTS = {
    "whole": [[0] * 24, [0] * 24, [0] * 24],
    "ragged": [[0] * 24, [0] * 17 + [-1] * 7, [0] * 5 + [-1] * 19],
    "short": [[0] * 12 + [1] * 12, [0] * 19 + [-1] * 5, [0] * 2 + [-1] * 22],
    "packed": [[0] * 9 + [1] * 15, [0] * 24, [0] * 8 + [1] * 8 + [2] * 8],
}


def gradients(
    *,
    architecture: str = "qwen2-tied",
    layout: str = "whole",
    anchors_at_once: int | None = None,
    micro_batch_size: int = 3,
    rollouts: StridedRollouts | None = None,
    **settings: Any,
) -> tuple[float, dict[str, Tensor], MetricAccumulator]:
    """Loss, gradients and tally of one step over three sequences."""
    settings = {"completion_length": 4, "stride": 4, "sequence_length": 24, "profile_lengths": [1]} | settings
    config = build_run(nest(settings, source="test"), source="test")
    model, other = small_model(architecture), small_model(architecture, seed=1)
    features = LocalFeatures(other, depths=(0.25, 0.5, 0.75), pooling="last_token", normalize="per_layer")
    base = copy.deepcopy(small_model(architecture, seed=2)).requires_grad_(False)
    method = Ebft(
        config,
        rollouts=rollouts or StridedRollouts(),
        features=features,
        base=base if config.loss.kl_coefficient else None,
        anchors_at_once=anchors_at_once,
    )
    return accumulate(method, model, config, layout, micro_batch_size)


def accumulate(
    method: Ebft, model: nn.Module, config: Any, layout: str, micro_batch_size: int
) -> tuple[float, dict[str, Tensor], MetricAccumulator]:
    batch, rollout = small_batch(LAYOUTS[layout]), config.rollout
    G = rollout.completion_length
    anchors = find_anchors(
        batch.document_ids, completion_length=G, stride=rollout.stride, first_context_length=rollout.context_length
    )
    noise = torch.rand(*anchors.positions.shape, rollout.n_samples, G, generator=torch.Generator().manual_seed(0))
    denominators = LossDenominators(contexts=float(anchors.valid.sum()), ce_tokens=float(batch.ce_mask("all").sum()))
    accumulator, loss = MetricAccumulator(), 0.0
    for rows in torch.arange(3).split(micro_batch_size):
        share = Anchors(*(tensor[rows] for tensor in anchors))
        loss += method.backward(
            model, batch.select(rows), share, noise=noise[rows], denominators=denominators, accumulator=accumulator
        )
    return loss, {name: p.grad for name, p in model.named_parameters()}, accumulator


def assert_same(
    one: tuple[float, dict[str, Tensor], MetricAccumulator], other: tuple[float, dict[str, Tensor], MetricAccumulator]
) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5, abs=1e-6)
    for name, expected in one[1].items():
        torch.testing.assert_close(other[1][name], expected, atol=2e-5 * float(expected.abs().max()), rtol=1e-4)
    assert one[2].observed.keys() == other[2].observed.keys()
    for name in {name for name in one[2].observed if not name.endswith("seconds")}:
        first, second = (dataclasses.astuple(accumulator.of(name)) for accumulator in (one[2], other[2]))
        assert first == pytest.approx(second, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("layout", ["whole", "ragged", "packed"])
@pytest.mark.parametrize(("anchors_at_once", "micro_batch_size"), [(1, 3), (2, 3), (None, 1), (2, 2)])
def test_parts_of_the_batch_and_of_the_anchors_add_up_to_the_whole(
    layout: str, anchors_at_once: int | None, micro_batch_size: int
) -> None:
    settings = {"gamma": 0.1, "kl_coefficient": 0.05, "whitening": "variant_i"}
    whole = gradients(layout=layout, **settings)
    parts = gradients(layout=layout, anchors_at_once=anchors_at_once, micro_batch_size=micro_batch_size, **settings)
    assert_same(whole, parts)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layout", ["whole", "ragged", "packed"])
def test_differentiating_the_sampling_pass_equals_scoring_its_completions_again(architecture: str, layout: str) -> None:
    sampled = gradients(architecture=architecture, layout=layout, gamma=0.1)
    scored = gradients(architecture=architecture, layout=layout, gamma=0.1, rollouts=WithoutGraph())
    assert_same(sampled, scored)


@pytest.mark.parametrize(
    "settings",
    [
        {"completion_length": 1, "stride": 3},
        {"n_samples": 2},
        {"n_samples": 2, "completion_length": 1, "whitening": "variant_i"},
        {"stride": 20, "first_context_length": 20},
        {"stride": 5, "first_context_length": 3},
    ],
    ids=["one token", "two samples", "one token and two samples", "one anchor", "anchors that divide nothing"],
)
def test_edge_cases_have_the_same_gradient_in_parts_and_scored_again(settings: dict[str, Any]) -> None:
    whole = gradients(**settings)
    assert any(float(gradient.abs().max()) > 0 for gradient in whole[1].values())
    assert_same(whole, gradients(**settings, anchors_at_once=1, rollouts=WithoutGraph()))


def test_a_batch_without_anchors_has_the_gradient_of_cross_entropy_alone() -> None:
    loss, found, accumulator = gradients(gamma=0.5, layout="short", first_context_length=20)
    assert accumulator.mean("train_ce_loss") == pytest.approx(2 * loss, rel=1e-5)
    assert "reward" not in accumulator.observed
    assert float(found["model.embed_tokens.weight"].abs().max()) > 0


def test_long_completions_are_scored_again_with_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = gradients(gamma=0.1, kl_coefficient=0.05)
    sampled: list[bool] = []

    class Watched(StridedRollouts):
        def sample(self, *args: Any, **kwargs: Any) -> Rollouts:
            rollouts = super().sample(*args, **kwargs)
            sampled.append(rollouts.log_probs.requires_grad)
            return rollouts

    gradients(rollouts=Watched())
    monkeypatch.setattr("ebft_study.cost.shapes.LONGEST_GRAPH", 3)
    assert_same(kept, gradients(gamma=0.1, kl_coefficient=0.05, rollouts=Watched()))
    assert sampled == [True, False]


class Given(StridedRollouts):
    """Returns completions that the test has chosen."""

    rollouts: Rollouts

    def sample(self, *args: Any, **kwargs: Any) -> Rollouts:
        return self.rollouts


@pytest.mark.parametrize(
    "settings",
    [
        {"aggregation": "sum"},
        {"aggregation": "token_mean"},
        {"aggregation": "sum", "alpha": 0.0, "off_policy": True},
        {"aggregation": "sum", "kl_estimator": "k1"},
    ],
    ids=["sum", "token_mean", "samples of another policy", "k1"],
)
def test_the_expected_gradient_is_that_of_the_kl_regularised_loss(settings: dict[str, Any]) -> None:
    """Over all pairs of completions of two tokens of three words: (10) with 1/beta = 0.3, at the policy's temperature.

    With `token_mean` it is half of that; k1 does not have it.
    """
    off_policy, settings = settings.get("off_policy", False), {"kl_coefficient": 0.3, "alpha": 1.0} | settings
    settings.pop("off_policy", None)
    model, network, base, other = (small_model(seed=seed, vocabulary=3) for seed in range(4))
    base.requires_grad_(False)
    tokens, context, truth = torch.tensor([[0, 2, 1, 1, 2, 0]]), slice(0, 4), slice(4, 6)
    batch = Batch(tokens, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool), torch.arange(1))
    anchors = Anchors(torch.tensor([[4]]), torch.tensor([[True]]))
    completions = torch.tensor(list(itertools.product(range(3), repeat=2)))

    def log_probs(of: nn.Module) -> Tensor:
        return torch.stack([naive_model.completion_log_probs(of, tokens[0, context], y, 0.6) for y in completions])

    def features(y: Tensor) -> Tensor:
        return naive_model.features(network, tokens[0, context], y, [1, 2, 3], "last_token", "per_layer")

    phi, psi = torch.stack([features(y) for y in completions]), features(tokens[0, truth])
    log_p, log_q = log_probs(model).sum(dim=-1), log_probs(base).sum(dim=-1).detach()
    mean = log_p.exp() @ phi
    exact = settings["alpha"] * mean.square().sum() - 2 * mean @ psi + 0.3 * (log_p.exp() * (log_p - log_q)).sum()
    expected = torch.autograd.grad(exact / (1 if settings["aggregation"] == "sum" else 2), list(model.parameters()))

    backend, version = Given(), 0 if off_policy else None
    config = build_run(
        nest(
            {
                "n_samples": 2, "completion_length": 2, "temperature": 0.6, "sequence_length": 6, "stride": 4,
                "profile_lengths": [1], "rollout.backend": "vllm", "importance_ratio_clip": 1e9,
            } | settings,
            source="test",
        ),
        source="test",
    )  # fmt: skip
    local = LocalFeatures(network, depths=(0.25, 0.5, 0.75), pooling="last_token", normalize="per_layer")
    method = Ebft(config, rollouts=backend, features=local, base=base)
    sampler = log_probs(other if off_policy else model).detach()
    for i, j in itertools.combinations_with_replacement(range(9), 2):
        backend.rollouts = Rollouts(completions[[i, j]][None, None], sampler[[i, j]][None, None], version)
        probability = float(sampler[[i, j]].sum().exp()) * (1 if i == j else 2)
        # One context with this weight in the expectation.
        denominators = LossDenominators(contexts=1 / probability, ce_tokens=1.0)
        method.backward(
            model, batch, anchors, noise=torch.empty(1, 1, 2, 2), denominators=denominators,
            accumulator=MetricAccumulator(),
        )  # fmt: skip
    found = [parameter.grad for parameter in model.parameters()]
    size = max(float(gradient.abs().max()) for gradient in expected)
    error = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    assert (error > 1e-2 * size) if config.loss.kl_estimator == "k1" else (error < 1e-4 * size)


def test_the_reported_kl_is_the_mean_ratio_of_a_token() -> None:
    """Whatever the aggregation; with `sum`, the loss has G times as much of it."""
    tallies = {}
    for aggregation in ("token_mean", "sum"):
        loss, _, tallies[aggregation] = gradients(aggregation=aggregation, kl_coefficient=0.5)
        share = loss - tallies[aggregation].of("policy_loss").total
        scale = 4 if aggregation == "sum" else 1
        assert share == pytest.approx(0.5 * scale * tallies[aggregation].mean("kl"), rel=1e-5)
    assert tallies["sum"].mean("kl") == pytest.approx(tallies["token_mean"].mean("kl"))
    assert tallies["sum"].mean("kl") == pytest.approx(gradients(kl_coefficient=0.5, kl_estimator="k1")[2].mean("kl"))
