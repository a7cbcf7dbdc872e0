"""Rollouts by other weights than those being trained: exact corrections, limits, and what is recorded."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ebft_study.algorithm.anchors import find_anchors
from ebft_study.algorithm.losses import importance_weights
from ebft_study.config import RunConfig, build_run, nest
from ebft_study.errors import ParityError, ServiceError
from ebft_study.methods import MetricAccumulator, off_policy
from ebft_study.methods.off_policy import OffPolicy, RechunkProbe, check_parity
from ebft_study.networks.blocks import completion_log_probs, run_prefix
from ebft_study.rollouts import Rollouts
from tests.small_models import VOCABULARY, small_batch, small_model


def test_weighted_samples_of_another_policy_have_the_expectation_of_this_one() -> None:
    """All completions of two tokens over three words, enumerated."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    value = torch.randn(9, generator=torch.Generator().manual_seed(0))
    _, ratios = importance_weights(p[pairs].log(), q[pairs].log(), clip=2.0)
    under_q, under_p = q[pairs].prod(dim=1), p[pairs].prod(dim=1)
    torch.testing.assert_close((under_q * ratios * value).sum(), (under_p * value).sum())


def test_weights_are_ratios_up_to_the_clip_and_carry_no_gradient() -> None:
    ours = torch.log(torch.tensor([[0.5, 0.5], [0.1, 0.5], [0.9, 0.9]])).requires_grad_()
    theirs = torch.log(torch.tensor([[0.5, 0.5], [0.2, 0.5], [0.1, 0.9]]))
    weights, ratios = importance_weights(ours, theirs, clip=2.0)
    torch.testing.assert_close(ratios, torch.tensor([1.0, 0.5, 9.0]))
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.5, 2.0]))
    assert not weights.requires_grad


def test_a_completion_that_the_engine_could_hardly_sample_keeps_a_finite_weight() -> None:
    weights, _ = importance_weights(torch.tensor([[-0.1]]), torch.tensor([[-500.0]]), clip=2.0)
    assert weights.item() == 2.0


VALID = torch.tensor([[True, True, False]])


def rollouts(log_probs: torch.Tensor, version: int) -> Rollouts:
    return Rollouts(torch.zeros_like(log_probs, dtype=torch.int64), log_probs, version, sync_seconds=0.5)


def log_probs(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 3, 4, 2, generator=torch.Generator().manual_seed(seed)).log()


@pytest.mark.parametrize(("version", "now"), [(2, 4), (5, 4)])
def test_rollouts_older_than_allowed_or_from_the_future_are_refused(version: int, now: int) -> None:
    with pytest.raises(ServiceError, match="max_policy_lag=1"):
        OffPolicy(1, 2.0).weights(log_probs(), rollouts(log_probs(), version), VALID, now, MetricAccumulator())


@pytest.mark.parametrize(("total", "said"), [(0.032, "0.002"), (math.nan, "nan")])
def test_disagreement_is_an_error_with_the_numbers(total: float, said: str) -> None:
    with pytest.raises(ParityError, match=rf"by {said} on average over 16 tokens.*version 3; allowed is 0\.001"):
        check_parity(run(parity_threshold=1e-3), total, 16, version=3)


def test_small_differences_and_none_at_all_are_no_error() -> None:
    check_parity(run(), 16 * 5e-5, 16, version=3)
    check_parity(run(), 0.0, 0, version=3)


def test_in_bfloat16_an_engine_may_differ_by_a_multiple_of_what_the_trainer_differs_from_itself() -> None:
    low = run(precision="bfloat16")
    check_parity(low, 16 * 0.09, 16, version=3, noise=0.01)
    with pytest.raises(
        ParityError, match=r"by 0\.11 on average.*allowed is 0\.1 \(10 times what two passes of the trainer"
    ):
        check_parity(low, 16 * 0.11, 16, version=3, noise=0.01)
    for noise in (0.0, math.nan):  # no noise is no excuse
        with pytest.raises(ParityError):
            check_parity(low, 16 * 0.01, 16, version=3, noise=noise)
    check_parity(run(precision="bfloat16", parity_threshold=0.2), 16 * 0.19, 16, version=3, noise=1e-6)
    with pytest.raises(ParityError, match=r"allowed is 0\.0001 \(rollout"):  # in float32 rounding is known
        check_parity(run(), 16 * 0.01, 16, version=3, noise=1.0)


def run(**changes: Any) -> RunConfig:
    return build_run(nest({"rollout.backend": "vllm"} | changes, source="test"), source="test")


def test_only_anchors_that_count_and_only_the_newest_weights_are_compared() -> None:
    theirs, older, accumulator = log_probs(), log_probs(1), MetricAccumulator()
    theirs[0, 1, 2, 1] += 0.25
    theirs[0, 2] += 1.0
    OffPolicy(0, 2.0).weights(log_probs(), rollouts(theirs, 3), VALID, 3, accumulator)
    OffPolicy(1, 2.0).weights(log_probs(), rollouts(older, 2), VALID, 3, accumulator)
    observed = accumulator.of("parity_mean_difference")
    assert (observed.total, observed.count) == (pytest.approx(0.25), 16)
    assert accumulator.row()["parity_max_difference"] == pytest.approx(0.25)


def test_records_are_those_of_their_definitions() -> None:
    ours, theirs, accumulator = log_probs(0), log_probs(1), MetricAccumulator()
    OffPolicy(1, 2.0).weights(ours, rollouts(theirs, 2), VALID, 3, accumulator)
    ratios = [math.exp(float(ours[0, b, j].sum() - theirs[0, b, j].sum())) for b in range(2) for j in range(4)]
    row = accumulator.row()
    assert row["importance_ratio_min"] == pytest.approx(min(ratios))
    assert row["importance_ratio_max"] == pytest.approx(max(ratios))
    assert row["effective_sample_fraction"] == pytest.approx(sum(ratios) ** 2 / sum(r * r for r in ratios) / 8)
    assert accumulator.mean("importance_ratio") == pytest.approx(sum(ratios) / 8)
    assert accumulator.mean("importance_weight") == pytest.approx(sum(min(r, 2.0) for r in ratios) / 8)
    assert accumulator.mean("importance_clipped_fraction") == sum(r > 2 for r in ratios) / 8
    assert accumulator.mean("policy_lag") == 1.0


def test_without_any_valid_anchor_nothing_is_recorded_as_a_number() -> None:
    accumulator = MetricAccumulator()
    OffPolicy(0, 2.0).weights(log_probs(), rollouts(log_probs(1), 0), torch.zeros_like(VALID), 0, accumulator)
    assert accumulator.row() == {"sync_seconds": 0.5}


def probed(probe: RechunkProbe, version: int, shift: float = 0.0, **changes: Any) -> MetricAccumulator:
    """Two packed documents and one of padding at the end, in float32: the passes agree but for 1e-6."""
    model, accumulator = small_model(), MetricAccumulator()
    batch = small_batch([[0] * 9 + [1] * 11, [0] * 16 + [-1] * 4])
    anchors = find_anchors(batch.document_ids, completion_length=3, stride=2, first_context_length=2)
    generator = torch.Generator().manual_seed(0)
    completions = torch.randint(0, VOCABULARY, (*anchors.positions.shape, 2, 3), generator=generator)
    with torch.no_grad():
        prefix = run_prefix(model, batch.tokens, batch.document_ids)
        scored = completion_log_probs(model, prefix, anchors, completions, temperature=0.6)
    mask = changes.pop("mask", None)
    probe.record(
        model,
        batch,
        anchors,
        completions,
        scored + shift,
        policy_version=version,
        accumulator=accumulator,
        mask=None if mask is None else mask.expand(completions.shape),
    )
    return accumulator


LOW = {"precision": "bfloat16", "temperature": 0.6, "log_every_steps": 4}


def test_a_probe_compares_the_same_tokens_after_the_same_contexts() -> None:
    exact = probed(RechunkProbe(run(**LOW)), 0)
    assert exact.of("rechunk_mean_difference").count % 3 == 0
    assert 4 * 3 <= exact.of("rechunk_mean_difference").count <= 8 * 3
    assert 0.0 < exact.mean("rechunk_mean_difference") < 1e-5
    assert exact.mean("rechunk_off_fraction") == 0.0
    for shift, off in ((0.09, 0.0), (-0.12, 1.0)):
        shifted = probed(RechunkProbe(run(**LOW)), 0, shift)
        assert shifted.mean("rechunk_mean_difference") == pytest.approx(abs(shift), abs=1e-5)
        assert shifted.mean("rechunk_off_fraction") == off


def test_a_probe_counts_the_tokens_of_an_answer_alone() -> None:
    whole, masked = (
        probed(RechunkProbe(run(**LOW)), 0, mask=mask).of("rechunk_mean_difference").count
        for mask in (None, torch.tensor([True, True, False]))
    )
    assert masked == whole * 2 / 3


def test_a_probe_runs_at_the_first_step_and_at_logged_ones_once() -> None:
    probe = RechunkProbe(run(**LOW))
    versions = [
        version for version in (1, 1, 2, 3, 3, 4, 7) if probed(probe, version).of("rechunk_mean_difference").count
    ]
    assert versions == [1, 3, 7]


def test_workers_with_sharded_weights_probe_in_the_same_passes_whatever_their_anchors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers that are gathered one by one need every worker in every pass: one without any anchor, too."""
    passes: list[int] = []
    monkeypatch.setattr(off_policy, "run_prefix", lambda *args: passes.append(1) or run_prefix(*args))
    monkeypatch.setattr(off_policy, "is_sharded", lambda model: True)
    for document_ids in ([[0] * 9 + [1] * 11], [[0] * 6], [[0] * 3]):
        passes.clear()
        batch, accumulator = small_batch(document_ids), MetricAccumulator()
        anchors = find_anchors(batch.document_ids, completion_length=3, stride=2, first_context_length=2)
        anchors = anchors.padded(9)
        RechunkProbe(run(**LOW)).record(
            small_model(),
            batch,
            anchors,
            torch.zeros((1, 9, 1, 3), dtype=torch.long),
            torch.zeros((1, 9, 1, 3)),
            policy_version=0,
            accumulator=accumulator,
        )
        assert len(passes) == 8
        assert accumulator.of("rechunk_mean_difference").count == 3 * min(int(anchors.valid.sum()), 8)


def test_rounding_is_probed_in_bfloat16_with_an_engine_alone() -> None:
    for config in (run(temperature=0.6), run(precision="bfloat16", **{"rollout.backend": "strided"})):
        assert not probed(RechunkProbe(config), 0).observed


def test_the_share_of_tokens_that_an_engine_puts_elsewhere() -> None:
    theirs, accumulator = log_probs(), MetricAccumulator()
    theirs[0, 0, 0] += torch.tensor([0.05, -0.2])
    theirs[0, 2] += 1.0  # does not count
    OffPolicy(0, 2.0).weights(log_probs(), rollouts(theirs, 3), VALID, 3, accumulator)
    assert accumulator.mean("parity_off_fraction") == pytest.approx(1 / 16)
