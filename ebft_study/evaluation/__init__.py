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

from ebft_study.algorithm.anchors import Anchors, completions_at
from ebft_study.algorithm.metrics import conditional_feature_matching
from ebft_study.algorithm.sampling import uniforms
from ebft_study.config import RunConfig
from ebft_study.data import Batch, TokenDataset
from ebft_study.evaluation.extra_metrics import Evaluated, ExtraMetric
from ebft_study.features import FeatureBackend
from ebft_study.networks.blocks import Prefix, next_token_log_probs, run_prefix
from ebft_study.results.metrics import in_table, metric
from ebft_study.rollouts import RolloutBackend, Rollouts, anchors_of

TOKENS_AT_ONCE = 2**14
"""Completion tokens whose hidden states are in memory at a time."""
CE, CE_ANSWER, CFM, JUDGE_CFM, ENTROPY = "ce_loss", "ce_answer_loss", "cfm_loss", "judge_cfm_loss", "entropy"


@dataclass
class Scores:
    """Sums of a metric's values and their numbers by held-out sequence, a ratio estimate and its standard error.

    Contexts of one sequence are nested, so they are not independent; sequences are. With x_i the sum of values of
    sequence i and m_i their count: value v = sum x / sum m, variance = sum (x_i - v m_i)^2 / (sum m)^2.
    """

    sequences: Tensor
    """[S] row numbers in the data set, which identify sequences."""
    sums: Tensor
    """[S] float64."""
    counts: Tensor
    """[S] float64; 0 for sequences without a value, and for those that another worker measures."""

    @classmethod
    def zeros(cls, sequences: Tensor) -> Scores:
        return cls(sequences, *torch.zeros(2, len(sequences), dtype=torch.float64))

    def add(self, at: Tensor, values: Tensor, mask: Tensor) -> None:
        """Add the masked values [len(at), ...] of the sequences at positions `at`."""
        self.sums[at] += torch.where(mask, values, 0.0).flatten(1).double().sum(dim=1).cpu()
        self.counts[at] += mask.flatten(1).double().sum(dim=1).cpu()

    @property
    def count(self) -> float:
        return float(self.counts.sum())

    @property
    def value(self) -> float:
        return float(self.sums.sum()) / self.count if self.count else math.nan

    @property
    def standard_error(self) -> float:
        return float((self.sums - self.value * self.counts).norm()) / self.count if self.count else math.nan


Measured = dict[tuple[str, int | None], Scores]
"""(metric, position) -> scores."""


@dataclass
class Evaluator:
    """Evaluates models on one data set with one frozen feature network, and with the judge if there is one.

    The judge has a completion length, and so contexts and noise, of its own: no setting of a trial's training moves
    what it measures. The `extra` metrics of the user see the contexts and completions of CFM.
    """

    config: RunConfig
    rollouts: RolloutBackend
    features: FeatureBackend
    judge: FeatureBackend | None = None
    extra: tuple[ExtraMetric, ...] = ()

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
        """Cross-entropy, the judge's CFM, and CFM at `lengths` on this rank's share of `sequences` rows.

        All `lengths` are measured on the same contexts: those with room for the longest one.
        """
        rows = spread_rows(len(data), sequences)
        measured = {
            key: Scores.zeros(rows)
            for key in quantities(
                lengths,
                with_entropy=with_entropy,
                with_judge=self.judge is not None,
                extra=[each.name for each in self.extra],
            )
        }
        device = next(model.parameters()).device
        longest = max(*lengths, self.config.evaluation.judge_completion_length if self.judge else 0)
        training = model.training
        model.eval()
        for at in torch.arange(len(rows))[rank::world_size].split(self._rows_at_once(data, longest)):
            if len(at):
                batch = data.rows(rows[at]).to(device)
                self._measure(model, batch, lengths, with_entropy, measured, at)
        model.train(training)
        if self.judge is not None:
            self.judge.free_prefix()  # no training step embeds with it
        return measured

    def _rows_at_once(self, data: TokenDataset, longest: int) -> int:
        """Sequences per pass, so that the hidden states of all blocks stay small."""
        tokens = data.tokens.shape[1] // self.config.rollout.stride * self.config.evaluation.cfm_samples * longest
        return max(1, TOKENS_AT_ONCE // max(tokens, 1))

    @torch.no_grad()
    def _measure(
        self,
        model: nn.Module,
        batch: Batch,
        lengths: Sequence[int],
        with_entropy: bool,
        measured: Measured,
        at: Tensor,
    ) -> None:
        prefix = run_prefix(model, batch.tokens, batch.document_ids)
        log_probs = next_token_log_probs(model, prefix.states, batch.tokens)
        for name, region in ((CE, "all"), (CE_ANSWER, "answer")):
            measured[name, None].add(at, -log_probs, batch.ce_mask(region))
        longest = max(lengths)
        anchors, sampled = self._sample(model, batch, prefix, longest)
        for each in self.extra:
            length = self.config.rollout.completion_length
            completions, truth = sampled.completions[..., :length], completions_at(batch.tokens, anchors, length)
            evaluated = Evaluated(model, each.tokenizer, self.config, batch, log_probs, anchors, completions, truth)
            measured[each.name, None].add(at, *each.values(evaluated))
        for length, cfm in zip(lengths, _cfm(self.features, batch, anchors, sampled, lengths), strict=True):
            measured[CFM, length].add(at, cfm, anchors.valid)
        if with_entropy:
            valid = anchors.valid[..., None].expand(sampled.completions.shape[:3])
            for k in range(longest):
                measured[ENTROPY, k + 1].add(at, -sampled.log_probs[..., k], valid)
        if self.judge is not None:
            length = self.config.evaluation.judge_completion_length
            if length != longest:
                anchors, sampled = self._sample(model, batch, prefix, length)
            (cfm,) = _cfm(self.judge, batch, anchors, sampled, [length])
            measured[JUDGE_CFM, None].add(at, cfm, anchors.valid)

    def _sample(self, model: nn.Module, batch: Batch, prefix: Prefix, length: int) -> tuple[Anchors, Rollouts]:
        """Completions at the anchors with room for `length` tokens, on common random numbers."""
        rollout, evaluation = self.config.rollout, self.config.evaluation
        anchors = anchors_of(batch, rollout, completion_length=length)
        noise = uniforms(
            (evaluation.evaluation_seed,),
            batch.indices.tolist(),
            n_anchors=anchors.positions.shape[1],
            n_samples=evaluation.cfm_samples,
            length=length,
        )
        temperature = evaluation.evaluation_temperature or rollout.temperature
        return anchors, self.rollouts.sample(model, batch, anchors, noise=noise, temperature=temperature, prefix=prefix)


def _cfm(
    network: FeatureBackend, batch: Batch, anchors: Anchors, sampled: Rollouts, lengths: Sequence[int]
) -> list[Tensor]:
    """CFM [S, B] at each length."""
    if anchors.positions.shape[1] == 0:
        return [torch.zeros(anchors.positions.shape)] * len(lengths)
    embedded = network.embed(batch, anchors, sampled.completions, lengths=lengths)
    return [conditional_feature_matching(features.phi, features.psi) for features in embedded]


def spread_rows(size: int, wanted: int) -> Tensor:
    """Row numbers evenly spread over a data set, so that raw text is not measured on its first files only."""
    return torch.linspace(0, size - 1, min(size, wanted)).round().long()


def quantities(
    lengths: Sequence[int], *, with_entropy: bool, with_judge: bool = False, extra: Sequence[str] = ()
) -> list[tuple[str, int | None]]:
    """Metric and position of everything that an evaluation measures: the registry's, in its order.

    Args:
        extra: names of plug-ins; the registry may have those of other runs, too.
    """
    positions: dict[str, Sequence[int | None]] = {
        "": (None,),
        "completion length": lengths,
        "token": range(1, 1 + max(lengths)) if with_entropy else (),
    }
    left_out = {JUDGE_CFM} if not with_judge else set()
    entries = [entry for entry in in_table("evaluations").values() if not entry.of_benchmarks]
    measured = [e for e in entries if e.name not in left_out and (not e.plugin or e.name in extra)]
    return [(e.name, at) for e in measured for at in positions[e.position]]


def rows_of(measured: Measured, benchmark: str) -> list[dict[str, Any]]:
    """Rows of the `evaluations` table."""
    return [
        {
            "benchmark": benchmark,
            "metric": name,
            "position": position,
            "value": scores.value,
            "standard_error": scores.standard_error,
            "count": int(scores.count),
        }
        for (name, position), scores in measured.items()
    ]


def score_rows(measured: Measured, benchmark: str) -> list[dict[str, Any]]:
    """Rows of the `scores` table: the mean of each sequence, of every metric but profiles over tokens."""
    rows = []
    for (name, position), scores in measured.items():
        if metric(name).position != "token":
            has = scores.counts > 0
            means = scores.sums[has] / scores.counts[has]
            columns = {"sequences": scores.sequences[has], "counts": scores.counts[has].long(), "values": means}
            lists = {column: values.tolist() for column, values in columns.items()}
            rows.append({"benchmark": benchmark, "metric": name, "position": position, **lists})
    return rows


def summary(measured: Measured, completion_length: int) -> dict[str, float]:
    """The validation columns of the `metrics` table."""
    ce = measured[(CE, None)].value
    values = {CE: ce, "perplexity": math.exp(min(ce, 700.0)) if math.isfinite(ce) else ce}
    if (CE_ANSWER, None) in measured:
        values[CE_ANSWER] = measured[(CE_ANSWER, None)].value
    if (CFM, completion_length) in measured:
        cfm = measured[(CFM, completion_length)]
        values |= {CFM: cfm.value, "cfm_standard_error": cfm.standard_error}
    if (JUDGE_CFM, None) in measured:
        values[JUDGE_CFM] = measured[JUDGE_CFM, None].value
    return values | {name: scores.value for (name, _), scores in measured.items() if metric(name).plugin}
