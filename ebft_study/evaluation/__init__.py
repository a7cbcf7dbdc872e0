"""Measure a model on held-out sequences: cross-entropy, feature matching over completion lengths, entropy.

Contexts, and the noise that drives their completions, depend on the data set and `evaluation_seed` alone: models are
compared on common random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ebft_study.algorithm.metrics import conditional_feature_matching
from ebft_study.algorithm.sampling import uniforms
from ebft_study.config import RunConfig
from ebft_study.data import Batch, TokenDataset
from ebft_study.features import FeatureBackend
from ebft_study.networks.blocks import next_token_log_probs, run_prefix
from ebft_study.results.metrics import in_table, metric
from ebft_study.rollouts import RolloutBackend, anchors_of

TOKENS_AT_ONCE = 2**14
"""Completion tokens whose hidden states are in memory at a time."""
CE, CE_ANSWER, CFM, ENTROPY = "ce_loss", "ce_answer_loss", "cfm_loss", "entropy"


@dataclass
class Moments:
    """Sums over sequences that give a ratio estimate and its standard error, clustered by sequence.

    Contexts of one sequence are nested, so they are not independent; sequences are. With x the sum of values and m
    their count per sequence: value = sum x / sum m, variance = sum (x - value m)^2 / (sum m)^2.
    """

    x: float = 0.0
    m: float = 0.0
    xx: float = 0.0
    xm: float = 0.0
    mm: float = 0.0

    def add(self, sums: Tensor, counts: Tensor) -> None:
        """Add sequences: sums of values [S] and numbers of values [S]."""
        x, m = sums.double(), counts.double()
        for name, value in (("x", x), ("m", m), ("xx", x * x), ("xm", x * m), ("mm", m * m)):
            setattr(self, name, getattr(self, name) + float(value.sum()))

    @property
    def value(self) -> float:
        return self.x / self.m if self.m else float("nan")

    @property
    def standard_error(self) -> float:
        if not self.m:
            return float("nan")
        v = self.value
        return math.sqrt(max(self.xx - 2 * v * self.xm + v * v * self.mm, 0.0)) / self.m


Measured = dict[tuple[str, int | None], Moments]
"""(metric, position) -> moments."""


@dataclass
class Evaluator:
    """Evaluates models on one data set with one frozen feature network."""

    config: RunConfig
    rollouts: RolloutBackend
    features: FeatureBackend

    def measure(
        self,
        model: nn.Module,
        data: TokenDataset,
        *,
        sequences: int,
        lengths: Sequence[int],
        with_entropy: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> Measured:
        """Cross-entropy on `sequences` rows and CFM at `lengths`, this rank's share of the sums.

        All lengths are measured on the same contexts: those with room for the longest one.
        """
        measured: Measured = {key: Moments() for key in quantities(lengths, with_entropy=with_entropy)}
        rows = spread_rows(len(data), sequences)[rank::world_size]
        device = next(model.parameters()).device
        training = model.training
        model.eval()
        for chunk in rows.split(self._rows_at_once(data, max(lengths))):
            if len(chunk):
                batch = data.rows(chunk).to(device)
                self._cross_entropy(model, batch, measured)
                self._feature_matching(model, batch, lengths, with_entropy, measured)
        model.train(training)
        return {key: moments for key, moments in measured.items() if moments.m}

    def _rows_at_once(self, data: TokenDataset, longest: int) -> int:
        """Sequences per pass, so that the hidden states of all blocks stay small."""
        tokens = data.tokens.shape[1] // self.config.rollout.stride * self.config.evaluation.cfm_samples * longest
        return max(1, TOKENS_AT_ONCE // max(tokens, 1))

    @torch.no_grad()
    def _cross_entropy(self, model: nn.Module, batch: Batch, measured: Measured) -> None:
        states = run_prefix(model, batch.tokens, batch.document_ids).states
        log_probs = next_token_log_probs(model, states, batch.tokens)
        for name, region in ((CE, "all"), (CE_ANSWER, "answer")):
            mask = batch.ce_mask(region)
            if name == CE or bool(mask.any()):
                _add(measured, (name, None), -torch.where(mask, log_probs, 0.0), mask)

    @torch.no_grad()
    def _feature_matching(
        self, model: nn.Module, batch: Batch, lengths: Sequence[int], with_entropy: bool, measured: Measured
    ) -> None:
        rollout, evaluation = self.config.rollout, self.config.evaluation
        G = max(lengths)
        anchors = anchors_of(batch, rollout, completion_length=G)
        B = anchors.positions.shape[1]
        if B == 0:
            return
        noise = uniforms(
            (evaluation.evaluation_seed,),
            batch.indices.tolist(),
            n_anchors=B,
            n_samples=evaluation.cfm_samples,
            length=G,
        )
        sampled = self.rollouts.sample(
            model, batch, anchors, noise=noise, temperature=evaluation.evaluation_temperature or rollout.temperature
        )
        for length, features in zip(
            lengths, self.features.embed(batch, anchors, sampled.completions, lengths=lengths), strict=True
        ):
            cfm = conditional_feature_matching(features.phi, features.psi)
            _add(measured, (CFM, length), torch.where(anchors.valid, cfm, 0.0), anchors.valid)
        if with_entropy:
            surprise = torch.where(anchors.valid[..., None, None], -sampled.log_probs, 0.0)
            for k in range(G):
                valid = anchors.valid[..., None].expand(-1, -1, noise.shape[2])
                _add(measured, (ENTROPY, k + 1), surprise[..., k], valid)


def spread_rows(size: int, wanted: int) -> Tensor:
    """Row numbers evenly spread over a data set, so that raw text is not measured on its first files only."""
    return torch.linspace(0, size - 1, min(size, wanted)).round().long()


def quantities(lengths: Sequence[int], *, with_entropy: bool) -> list[tuple[str, int | None]]:
    """Metric and position of everything that an evaluation measures: the registry's, in its order."""
    positions: dict[str, Sequence[int | None]] = {
        "": (None,),
        "completion length": lengths,
        "token": range(1, 1 + max(lengths)) if with_entropy else (),
    }
    return [(entry.name, at) for entry in in_table("evaluations").values() for at in positions[entry.position]]


def _add(measured: Measured, key: tuple[str, int | None], values: Tensor, mask: Tensor) -> None:
    metric(key[0], "evaluations")
    measured[key].add(values.flatten(1).sum(dim=1), mask.flatten(1).sum(dim=1))


def rows_of(measured: Measured, benchmark: str) -> list[dict[str, Any]]:
    """Rows of the `evaluations` table."""
    return [
        {
            "benchmark": benchmark,
            "metric": metric,
            "position": position,
            "value": moments.value,
            "standard_error": moments.standard_error,
            "count": int(moments.m),
        }
        for (metric, position), moments in measured.items()
    ]


def summary(measured: Measured, completion_length: int) -> dict[str, float]:
    """The validation columns of the `metrics` table."""
    ce = measured[(CE, None)].value
    values = {CE: ce, "perplexity": math.exp(min(ce, 700.0)) if math.isfinite(ce) else ce}
    if (CE_ANSWER, None) in measured:
        values[CE_ANSWER] = measured[(CE_ANSWER, None)].value
    if (CFM, completion_length) in measured:
        cfm = measured[(CFM, completion_length)]
        values |= {CFM: cfm.value, "cfm_standard_error": cfm.standard_error}
    return values
