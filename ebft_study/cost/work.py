"""Tokens, FLOPs and weight traffic of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Literal

from ebft_study.cost.shapes import Limits, MicroBatchPlan, ModelShape, StepShape

Counting = Literal["needed", "executed"]


@dataclass(frozen=True)
class PhaseCost:
    """Work of one phase, over all workers."""

    token_forwards: float = 0.0
    """Tokens that go forward through layers."""
    flops: float = 0.0
    weight_bytes: float = 0.0
    """Weights read and gradients written, once per pass: a lower bound of the memory traffic."""

    def __add__(self, other: PhaseCost) -> PhaseCost:
        return PhaseCost(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class StepCost:
    """Work of one optimizer step by phase."""

    rollouts: PhaseCost
    features: PhaseCost
    scoring_forward: PhaseCost
    scoring_backward: PhaseCost
    optimizer: PhaseCost

    @property
    def scoring(self) -> PhaseCost:
        return self.scoring_forward + self.scoring_backward

    @property
    def total(self) -> PhaseCost:
        return self.rollouts + self.features + self.scoring + self.optimizer


def step_cost(
    model: ModelShape,
    features: ModelShape,
    step: StepShape,
    *,
    split: MicroBatchPlan | None = None,
    limits: Limits | None = None,
    counting: Counting = "needed",
    duplicate_rate: float = 0.0,
) -> StepCost:
    """Work of one optimizer step.

    Args:
        features: the whole feature network; it is cut at `step.depths` here.
        split: by default everything at once. It decides how often weights are read and logits computed again.
        duplicate_rate: share of completions that repeat another one of their context; each is embedded once.
    """
    work = _Work(step, split or MicroBatchPlan.whole(step), limits or Limits(), counting)
    forward, backward = work.scoring(model)
    # AdamW reads weights, gradients and two moments, and writes weights and moments.
    updated = 7 * model.n_trainable * (1 if step.sharded else step.world_size)
    return StepCost(
        rollouts=work.rollouts(model) if step.n_blocks else PhaseCost(),
        features=work.features(features.cut(step.depths), duplicate_rate) if step.n_blocks else PhaseCost(),
        scoring_forward=forward,
        scoring_backward=backward,
        optimizer=PhaseCost(weight_bytes=step.weight_bytes * updated),
    )


@dataclass(frozen=True)
class _Work:
    """Sums over one sequence, times the batch."""

    step: StepShape
    split: MicroBatchPlan
    limits: Limits
    counting: Counting

    @property
    def micro_batches(self) -> int:
        """Over all workers."""
        return self.step.world_size * -(-self.step.sequences_per_worker // self.split.micro_batch_size)

    @property
    def parts(self) -> int:
        """Over all micro-batches."""
        return self.micro_batches * -(-len(self.step.anchors) // self.split.anchors_at_once)

    def causal(self, length: int) -> float:
        """Keys that the queries of `length` tokens meet among these tokens."""
        return length * length if self.counting == "executed" else length * (length + 1) / 2

    def pairs(self, model: ModelShape, length: int, *, blocks_at_once: int | None = None) -> float:
        """Keys that `length` tokens of every block meet when they are run together."""
        context = length * self._context_keys(model.n_heads * length, blocks_at_once) if length else 0
        return context + self.step.n_blocks * self.causal(length)

    def decoded_pairs(self, model: ModelShape) -> float:
        """Keys that G - 1 tokens of every block meet one by one; none of its own block is then met in vain."""
        length = self.step.completion_length - 1
        own = self.step.n_blocks * length * (length + 1) / 2
        return length * self._context_keys(model.n_heads, None) + own

    def _context_keys(self, rows: int, blocks_at_once: int | None) -> int:
        """Keys of the prefix that one token of each of the N blocks meets; a block has `rows` queries, over heads."""
        if self.counting == "needed":
            return self.step.n_samples * sum(self.step.anchors)
        return sum(len(chunk) * chunk[-1] for chunk in self._chunks(rows, blocks_at_once))

    def _chunks(self, rows: int, blocks_at_once: int | None) -> Iterator[list[int]]:
        """Contexts of the blocks that are computed together, as in `algorithm.attention.plan_chunks`."""
        contexts = [anchor for anchor in self.step.anchors for _ in range(self.step.n_samples)]
        for part in _pieces(contexts, self.split.anchors_at_once * self.step.n_samples):
            for run in _pieces(part, blocks_at_once or len(part)):
                size = min(self.limits.scores_at_once // (rows * run[-1]), -(-len(run) // self.limits.chunks))
                yield from _pieces(run, max(size, 1))

    def rollouts(self, model: ModelShape) -> PhaseCost:
        """One row of logits per anchor, then G - 1 times a token of every block and its row of logits."""
        step, n_passes = self.step, self.step.completion_length - 1
        flops = model.forward_flops(step.block_tokens, self.decoded_pairs(model)) + model.head_flops(step.block_rows)
        weights = n_passes * model.layer_matrices + (n_passes + 1) * model.head_parameters
        weight_bytes = self.parts * step.compute_bytes * weights
        return PhaseCost(step.batch_size * step.block_tokens, step.batch_size * flops, weight_bytes)

    def features(self, network: ModelShape, duplicate_rate: float) -> PhaseCost:
        """The sequences and all different completions, through the layers of `network`."""
        step, G, distinct = self.step, self.step.completion_length, 1.0 - duplicate_rate
        blocks_at_once = max(1, self.limits.feature_tokens_at_once // (self.split.micro_batch_size * G))
        n_tokens = step.sequence_length + distinct * step.n_blocks * G
        pairs = self.causal(step.sequence_length) + distinct * self.pairs(network, G, blocks_at_once=blocks_at_once)
        runs = math.ceil(distinct * self.split.anchors_at_once * step.n_samples / blocks_at_once)
        weight_bytes = (self.micro_batches + self.parts * runs) * step.compute_bytes * network.layer_matrices
        flops = network.forward_flops(n_tokens, pairs)
        if step.pooling == "last_token":
            flops -= 6 * network.hidden_size * network.intermediate_size * distinct * step.n_blocks * (G - 1)
        return PhaseCost(step.batch_size * n_tokens, step.batch_size * flops, weight_bytes)

    def scoring(self, model: ModelShape) -> tuple[PhaseCost, PhaseCost]:
        """Forward and backward pass of the sequences, and of the blocks unless sampling was their forward pass."""
        step, T, length = self.step, self.step.sequence_length, self.step.completion_length - 1
        n_tokens, n_rows, pairs = T + step.block_tokens, T - 1 + step.block_rows, self.causal(T)
        again = model.forward_flops(n_tokens, pairs + self.pairs(model, length)) + model.head_flops(n_rows)
        kept = model.forward_flops(T, pairs) + model.head_flops(T - 1)
        forward, run = (kept, T) if step.differentiable_rollouts else (again, n_tokens)
        pairs += self.decoded_pairs(model) if step.differentiable_rollouts else self.pairs(model, length)
        backward, run_again = model.backward_flops(n_tokens, pairs) + self._head_backward(model), 0
        if step.has_kl:
            forward, run = forward + again - model.head_flops(T - 1), run + n_tokens
        if step.activation_checkpointing:
            # Computing again stops at the last saved input: the output of the last product is not needed.
            last = 2 * model.n_layers * model.hidden_size * model.intermediate_size * n_tokens
            backward, run_again = backward + model.forward_flops(n_tokens, pairs) - last, n_tokens
        forward_bytes, backward_bytes = self._scoring_weight_bytes(model)
        return (
            PhaseCost(step.batch_size * run, step.batch_size * forward, forward_bytes),
            PhaseCost(step.batch_size * run_again, step.batch_size * backward, backward_bytes),
        )

    def _head_backward(self, model: ModelShape) -> float:
        """Gradients of weights and states from those of the logits; the logits again where they were not all kept."""
        step, S, A = self.step, self.split.micro_batch_size, self.split.anchors_at_once
        truth = step.sequence_length - 1 if step.method == "sft" or step.gamma > 0 else 0
        later_at_once = A * step.n_samples * (1 if step.differentiable_rollouts else step.completion_length - 1)
        calls = [(len(step.anchors), A), (step.block_tokens, later_at_once), (truth, truth)]
        rows = sum(
            n_rows * (model.backward_factor + (1 if S * concurrency > self.limits.logit_rows(model) else 0))
            for n_rows, concurrency in calls
        )
        return model.head_flops(rows)

    def _scoring_weight_bytes(self, model: ModelShape) -> tuple[float, float]:
        """Weights read in the forward pass; weights read and gradients written in the backward pass."""
        step, length = self.step, self.step.completion_length - 1
        weights = model.layer_matrices + model.head_parameters
        sequences = self.micro_batches * weights
        passes = length if step.differentiable_rollouts else min(length, 1)
        blocks = self.parts * (passes * weights + model.head_parameters)
        forward = (
            sequences + (0 if step.differentiable_rollouts else blocks) + (sequences + blocks if step.has_kl else 0)
        )
        again = sequences + blocks if step.activation_checkpointing else 0
        written = sequences + blocks if model.trainable_parameters is None else 0
        read = sequences + blocks + again
        return step.compute_bytes * forward, step.compute_bytes * read + step.weight_bytes * written


def _pieces(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[first : first + size] for first in range(0, len(items), size))
