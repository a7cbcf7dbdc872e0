"""Where an EBFT step spends its time, and what sharing the prefix saves.

The naive way of the comparison is the published one: the whole sequence, repeated for each of the n samples, run again
at each of the G steps. Both are timed in turn in one process, so that a noisy machine disturbs both alike.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from ebft_study.algorithm.anchors import Anchors, find_anchors
from ebft_study.bench.naive import naive_rollouts
from ebft_study.block_model import ATTENTION
from ebft_study.config import build_run
from ebft_study.data import Batch
from ebft_study.features.local import LocalFeatures
from ebft_study.methods import Tally, Totals
from ebft_study.methods.ebft import Ebft
from ebft_study.rollouts.strided import StridedRollouts

PHASES = ("rollout_seconds", "feature_seconds", "scoring_seconds")


def bench(*, sequence_length: int, n_samples: int, batch_size: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """Times of one EBFT step by phase and of rollouts, shared prefix against naive: rows of name, value, unit."""
    config = build_run(
        {"data": {"sequence_length": sequence_length}, "rollout": {"n_samples": n_samples}}, source="bench"
    )
    model = _model().to(device)
    features = LocalFeatures(_model().to(device), depths=(0.25, 0.5, 0.75), pooling="last_token", normalize="per_layer")
    method = Ebft(config, rollouts=StridedRollouts(), features=features, base=None)
    batch, anchors, noise = _work(config.rollout.completion_length, sequence_length, n_samples, batch_size, device)
    totals = Totals(contexts=float(anchors.valid.sum()), ce_tokens=float(batch.tokens[:, 1:].numel()))

    def step(tally: Tally) -> None:
        method.backward(model, batch, anchors, noise=noise, totals=totals, tally=tally)
        model.zero_grad(set_to_none=True)

    def shared() -> None:
        StridedRollouts().sample(model, batch, anchors, noise=noise, temperature=0.6)

    times: dict[str, list[float]] = {name: [] for name in ("shared", "naive", *PHASES)}
    step(Tally())
    for _ in range(repeats):
        times["shared"].append(_seconds(shared, device))
        times["naive"].append(_seconds(lambda: naive_rollouts(model, batch, anchors, noise, 0.6), device))
        tally = Tally()
        step(tally)
        for name in PHASES:
            times[name].append(tally.sums[name])
    ratios = [naive / ours for naive, ours in zip(times["naive"], times["shared"], strict=True)]
    rows = [_row(f"step/{name.removesuffix('_seconds')}", times[name], "s") for name in PHASES]
    rows.append(_row("rollouts/shared_prefix", times["shared"], "s"))
    rows.append(_row("rollouts/naive", times["naive"], "s"))
    rows.append(_row("rollouts/speedup", ratios, "x"))
    return rows


def _row(name: str, values: list[float], unit: str) -> dict[str, Any]:
    return {"name": name, "value": statistics.median(values), "low": min(values), "high": max(values), "unit": unit}


def _model() -> nn.Module:
    """Seven million parameters with random weights: timing does not depend on their values."""
    config = Qwen2Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM._from_config(config, attn_implementation=ATTENTION).eval()  # type: ignore[no-any-return]


def _work(G: int, T: int, n: int, batch_size: int, device: str) -> tuple[Batch, Anchors, Tensor]:
    tokens = torch.randint(0, 4096, (batch_size, T), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, torch.zeros_like(tokens), tokens >= 0, torch.arange(batch_size)).to(device)
    anchors = find_anchors(batch.document_ids, completion_length=G, stride=G, first_context_length=G)
    noise = torch.rand(*anchors.positions.shape, n, G, generator=torch.Generator().manual_seed(1))
    return batch, anchors, noise.to(device)


def _seconds(work: Callable[[], object], device: str) -> float:
    started = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def write_json(rows: list[dict[str, Any]], path: Path) -> None:
    """Rows as a JSON list."""
    path.write_text(json.dumps(rows, indent=1))
