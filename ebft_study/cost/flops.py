"""Tokens and FLOPs of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ebft_study.cost.shapes import GPU_LIMITS, Limits, MicroBatchPlan, ModelShape, StepShape

Counting = Literal["needed", "executed"]


@dataclass(frozen=True)
class PhaseCost:
    """Work of one phase, over all workers."""

    token_forwards: float = 0.0
    """Tokens that go forward through layers."""
    flops: float = 0.0

    def __add__(self, other: PhaseCost) -> PhaseCost:
        return PhaseCost(self.token_forwards + other.token_forwards, self.flops + other.flops)

    def __rmul__(self, n_sequences: int) -> PhaseCost:
        return PhaseCost(n_sequences * self.token_forwards, n_sequences * self.flops)


@dataclass(frozen=True)
class StepCost:
    """Work of one optimizer step by phase; the optimizer's own has no matrix products."""

    rollouts: PhaseCost
    features: PhaseCost
    scoring_forward: PhaseCost
    scoring_backward: PhaseCost

    @property
    def scoring(self) -> PhaseCost:
        return self.scoring_forward + self.scoring_backward

    @property
    def total(self) -> PhaseCost:
        return self.rollouts + self.features + self.scoring


def step_cost(
    model: ModelShape,
    features: ModelShape,
    step: StepShape,
    *,
    plan: MicroBatchPlan | None = None,
    limits: Limits = GPU_LIMITS,
    counting: Counting = "needed",
    duplicate_rate: float = 0.0,
) -> StepCost:
    """Work of one optimizer step: each phase's sum over one sequence, times the batch size.

    Args:
        features: the whole feature network; it is cut at `step.depths` here.
        plan: by default everything in one pass. It decides which logits are computed again and, for `executed`, how
            blocks are cut into chunks.
        duplicate_rate: share of completions that repeat another one of their context; each is embedded once.
    """
    work = _Sequence(model, step, plan or MicroBatchPlan.whole(step), limits, counting)
    forward, backward = work.scoring()
    rollouts = embedding = PhaseCost()
    if step.n_blocks:
        rollouts = work.rollouts()
        if step.has_features:
            embedding = work.features(features.cut(step.depths), duplicate_rate)
    S = step.batch_size
    return StepCost(S * rollouts, S * embedding, S * forward, S * backward)


def evaluation_flops(model: ModelShape, features: ModelShape, step: StepShape) -> float:
    """FLOPs of the evaluation of the sequences of an EBFT step: cross-entropy, and completions with their features."""
    ebft, sft = (step_cost(model, features, each) for each in (step, replace(step, method="sft")))
    return ebft.rollouts.flops + ebft.features.flops + sft.scoring_forward.flops


def answers_flops(model: ModelShape, n_tokens: float, n_pairs: float, n_drawn: float) -> float:
    """FLOPs of sampling answers: tokens run, keys that these met, and tokens drawn."""
    return model.forward_flops(n_tokens, n_pairs) + model.head_flops(n_drawn)


@dataclass(frozen=True)
class _Sequence:
    """Work of one sequence.

    With P parameters in the matrices of all layers, Q = heads x head size, L layers and V H in the head, a pass of M
    tokens whose queries meet K keys altogether takes 2 P M + 4 L Q K FLOPs, and R rows of logits 2 V H R. Backward
    takes twice the products, and 5/2 of the attention.
    """

    model: ModelShape
    step: StepShape
    plan: MicroBatchPlan
    limits: Limits
    counting: Counting

    def causal(self, length: int) -> float:
        """Keys that the queries of `length` tokens meet among these tokens."""
        return length * length if self.counting == "executed" else length * (length + 1) / 2

    def pairs(self, model: ModelShape, length: int, *, blocks_at_once: int | None = None) -> float:
        """Keys that `length` tokens of every block meet when they go through `model` in one pass."""
        context = length * self._context_keys(model.n_heads * length, blocks_at_once) if length else 0
        return context + self.step.n_blocks * self.causal(length)

    def decoded_pairs(self) -> float:
        """Keys that G - 1 tokens of every block meet one by one; no key of the own block is masked then."""
        length = self.step.completion_length - 1
        own = self.step.n_blocks * length * (length + 1) / 2
        return length * self._context_keys(self.model.n_heads, None) + own

    def _context_keys(self, rows: int, blocks_at_once: int | None) -> int:
        """Keys of the prefix that one token of each of the N blocks meets; a block has `rows` queries, over heads."""
        if self.counting == "needed":
            return self.step.n_samples * sum(self.step.anchors)
        return sum(len(chunk) * chunk[-1] for chunk in self._chunks(rows, blocks_at_once))

    def _chunks(self, rows: int, blocks_at_once: int | None) -> Iterator[list[int]]:
        """Contexts of the blocks that are computed in one product, as in `algorithm.attention.plan_chunks`."""
        contexts = [anchor for anchor in self.step.anchors for _ in range(self.step.n_samples)]
        for part in _pieces(contexts, self.plan.anchors_at_once * self.step.n_samples):
            for run in _pieces(part, blocks_at_once or len(part)):
                size = min(self.limits.scores_at_once // (rows * run[-1]), -(-len(run) // self.limits.chunks))
                yield from _pieces(run, max(size, 1))

    def rollouts(self) -> PhaseCost:
        """One row of logits per anchor, then G - 1 times a token of every block and its row of logits.

        Whole answers come after a pass of their prompt.
        """
        prompt = self.step.prompt_tokens
        n_tokens, n_rows = prompt + self.step.block_tokens, self.step.block_rows
        pairs = self.causal(prompt) + self.decoded_pairs()
        flops = self.model.forward_flops(n_tokens, pairs) + self.model.head_flops(n_rows)
        return PhaseCost(n_tokens, flops)

    def features(self, network: ModelShape, duplicate_rate: float) -> PhaseCost:
        """The sequence and its distinct completions, through the layers of `network`."""
        step, G, distinct = self.step, self.step.completion_length, 1.0 - duplicate_rate
        blocks_at_once = max(1, self.limits.feature_tokens_at_once // (self.plan.micro_batch_size * G))
        n_tokens = step.sequence_length + distinct * step.n_blocks * G
        pairs = self.causal(step.sequence_length) + distinct * self.pairs(network, G, blocks_at_once=blocks_at_once)
        flops = network.forward_flops(n_tokens, pairs)
        if step.pooling == "last_token" and not step.whole_answers:
            # The deepest layer's MLP, three matrices, runs at one token of a completion only.
            flops -= 6 * network.hidden_size * network.intermediate_size * distinct * step.n_blocks * (G - 1)
        return PhaseCost(n_tokens, flops)

    def scoring(self) -> tuple[PhaseCost, PhaseCost]:
        """Forward and backward pass of the sequence, and of the blocks unless sampling was their forward pass."""
        model, step, T, length = self.model, self.step, self.step.sequence_length, self.step.completion_length - 1
        n_tokens, n_rows, pairs = T + step.block_tokens, T - 1 + step.block_rows, self.causal(T)
        all_blocks = model.forward_flops(n_tokens, pairs + self.pairs(model, length)) + model.head_flops(n_rows)
        forward, run = all_blocks, n_tokens
        if step.differentiable_rollouts:
            forward, run = model.forward_flops(T, pairs) + model.head_flops(T - 1), T
        if step.has_kl:
            forward, run = forward + all_blocks - model.head_flops(T - 1), run + n_tokens
        pairs += self.decoded_pairs() if step.differentiable_rollouts else self.pairs(model, length)
        backward = model.backward_flops(n_tokens, pairs) + self._head_backward()
        if step.activation_checkpointing:
            # Computing again stops at the last saved input: the output of the last product is not needed.
            last = 2 * model.n_layers * model.hidden_size * model.intermediate_size * n_tokens
            backward += model.forward_flops(n_tokens, pairs) - last
        return PhaseCost(run, forward), PhaseCost(flops=backward)

    def _head_backward(self) -> float:
        """Gradients of weights and states from those of the logits; the logits again where not all were kept."""
        step, S, A = self.step, self.plan.micro_batch_size, self.plan.anchors_at_once
        truth = step.sequence_length - 1 if step.method == "sft" or step.gamma > 0 else 0
        later_at_once = A * step.n_samples * (1 if step.differentiable_rollouts else step.completion_length - 1)
        rows = 0
        for n_rows, rows_at_once in ((len(step.anchors), A), (step.block_tokens, later_at_once), (truth, truth)):
            again = S * rows_at_once > self.limits.logit_rows(self.model)
            rows += n_rows * (self.model.backward_factor + again)
        return self.model.head_flops(rows)


def _pieces(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[first : first + size] for first in range(0, len(items), size))
