"""Supervised fine-tuning: next-token cross-entropy on the ground truth."""

from __future__ import annotations

from torch import Tensor, nn

from ebft_study.algorithm.anchors import Anchors
from ebft_study.algorithm.losses import cross_entropy_loss
from ebft_study.config import LossConfig
from ebft_study.data import Batch
from ebft_study.methods import LossDenominators, MetricAccumulator, differentiate
from ebft_study.networks.blocks import next_token_log_probs, run_prefix


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
            mask = batch.ce_mask(self.region)
            prefix = run_prefix(model, batch.tokens, batch.document_ids)
            log_probs = next_token_log_probs(model, prefix.states, batch.tokens)
            loss = differentiate(cross_entropy_loss(log_probs, mask, denominator=denominators.ce_tokens))
        accumulator.add("train_ce_loss", -log_probs.detach()[mask].double().sum(), float(mask.sum()))
        return loss
