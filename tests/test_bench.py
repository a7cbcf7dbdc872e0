"""The benchmark compares two ways of doing the same thing: they must agree."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ebft_study.algorithm.anchors import find_anchors
from ebft_study.bench import bench, naive_rollouts, write_json
from ebft_study.rollouts.strided import StridedRollouts
from tests.small_models import small_batch, small_model


def test_naive_rollouts_draw_the_same_completions_as_shared_ones() -> None:
    model, batch = small_model(), small_batch([[0] * 16, [0] * 12 + [-1] * 4])
    anchors = find_anchors(batch.document_ids, completion_length=3, stride=4, first_context_length=4)
    noise = torch.rand(*anchors.positions.shape, 2, 3, generator=torch.Generator().manual_seed(0))
    shared = StridedRollouts().sample(model, batch, anchors, noise=noise, temperature=0.7).completions
    naive = naive_rollouts(model, batch, anchors, noise, 0.7)
    assert torch.equal(naive[anchors.valid], shared[anchors.valid])


def test_bench_measures_every_phase(tmp_path: Path) -> None:
    rows = bench(sequence_length=48, n_samples=2, batch_size=1, repeats=1, device="cpu")
    assert {row["name"] for row in rows} >= {"step/rollout", "step/feature", "step/scoring", "rollouts/speedup"}
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    write_json(rows, tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text()) == rows
