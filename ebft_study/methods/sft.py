"""Supervised fine-tuning: next-token cross-entropy on the ground truth."""

from __future__ import annotations

from torch import Tensor, nn

from ebft_study.algorithm.anchors import Anchors
from ebft_study.algorithm.losses import cross_entropy_loss, next_token_mask
from ebft_study.config import LossConfig
from ebft_study.data import Batch
from ebft_study.methods import LossDenominators, MetricAccumulator, differentiate
from ebft_study.networks.blocks import run_prefix, token_log_probs


def ce_mask(batch: Batch, region: str) -> Tensor:
    """Tokens that carry cross-entropy, [S, T-1]."""
    return next_token_mask(batch.document_ids, batch.answer_mask if region == "answer" else None)


def ground_truth_log_probs(model: nn.Module, states: Tensor, batch: Batch) -> Tensor:
    """Log-probabilities of x_1 .. x_{T-1} at temperature 1, [S, T-1]."""
    return token_log_probs(model, states[:, :-1], batch.tokens[:, 1:], temperature=1.0)


class Sft:
    """The baseline that every study compares with."""

    def __init__(self, loss: LossConfig) -> None:
        self.region = loss.ce_region

    def backward(
        self,
        model: nn.Module,
        batch: Batch,
        anchors: Anchors,
        *,
        noise: Tensor,
        denominators: LossDenominators,
        accumulator: MetricAccumulator,
    ) -> float:
        """See `Method.backward`. Only `batch` is used."""
        with accumulator.seconds("scoring_seconds", batch.tokens.device):
            mask = ce_mask(batch, self.region)
            prefix = run_prefix(model, batch.tokens, batch.document_ids)
            log_probs = ground_truth_log_probs(model, prefix.states, batch)
            loss = differentiate(cross_entropy_loss(log_probs, mask, denominator=denominators.ce_tokens))
        accumulator.add("train_ce_loss", -log_probs.detach()[mask].double().sum(), float(mask.sum()))
        return loss
