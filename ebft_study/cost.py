"""What one optimizer step costs, from shapes alone: tokens, FLOPs, weight traffic and peak memory.

Letters: T tokens per sequence, C first context, s stride, B anchors at `a_b = C + b s`, n samples of G tokens each,
N = B n blocks, S sequences and A anchors at once, H hidden size, V vocabulary. Per sequence an EBFT step runs

    scoring    x[0:T] with gradient; backward through it and through the blocks, which are run again, G - 1 tokens
               each, only where sampling did not keep its graph
    rollouts   G - 1 decode passes of N tokens against the keys and values of x; B + N (G - 1) rows of logits
    features   T + N G tokens through the frozen network, up to its deepest requested layer; no logits

and an SFT step x[0:T] alone. Sequences count as full: T tokens and B anchors each.

FLOPs are those of matrix products and attention (a multiply-add is 2), as `torch.utils.flop_counter` counts them, with
attention counted as `needed` (every token meets its true number of keys) or as `executed` (what that counter sees:
causal attention as a full square, blocks against the longest context of their chunk in the `chunked` attention).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal

from ebft_study.config import RunConfig
from ebft_study.errors import ConfigError

Counting = Literal["needed", "executed"]
FLOAT32_BYTES = 4
EFFICIENT_BLOCK_TOKENS = 1024
"""Fewer tokens per pass than this no longer fill a matrix product."""


# --- shapes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer of the Qwen2/Llama family, with a gated MLP."""

    n_layers: int
    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocabulary_size: int
    tied_embeddings: bool
    small_parameters_per_layer: int
    """Parameters outside matrices: biases and norms of one layer."""
    trainable_parameters: int | None = None
    """None: all are trained. A number: only so many, in adapters (LoRA); the rest is frozen."""

    @staticmethod
    def of(config: Any, *, trainable_parameters: int | None = None) -> ModelShape:
        """From anything with the attributes of a Hugging Face configuration (Qwen2, Qwen3, Llama, Mistral)."""
        H, kind = config.hidden_size, getattr(config, "model_type", "")
        head_dim = getattr(config, "head_dim", None) or H // config.num_attention_heads
        small = 2 * H + (2 * head_dim if kind == "qwen3" else 0)
        if kind == "qwen2" or getattr(config, "attention_bias", False):
            small += (config.num_attention_heads + 2 * config.num_key_value_heads) * head_dim
            small += 0 if kind == "qwen2" else H
        if getattr(config, "mlp_bias", False):
            small += 2 * config.intermediate_size + H
        return ModelShape(
            n_layers=config.num_hidden_layers,
            hidden_size=H,
            intermediate_size=config.intermediate_size,
            n_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            vocabulary_size=config.vocab_size,
            tied_embeddings=bool(config.tie_word_embeddings),
            small_parameters_per_layer=small,
            trainable_parameters=trainable_parameters,
        )

    @property
    def query_size(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Numbers in the keys of one token and layer; its values are as many."""
        return self.n_kv_heads * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Parameters in the matrices of all layers: q, k, v, o, gate, up, down."""
        attention = 2 * self.query_size + 2 * self.kv_size
        return self.n_layers * self.hidden_size * (attention + 3 * self.intermediate_size)

    @property
    def head_parameters(self) -> int:
        return self.vocabulary_size * self.hidden_size

    @property
    def body_parameters(self) -> int:
        """Everything but the head; all that a feature network keeps."""
        small = self.n_layers * self.small_parameters_per_layer + self.hidden_size
        return self.head_parameters + self.layer_matrices + small

    @property
    def n_parameters(self) -> int:
        """Tied embeddings count once; adapters not at all."""
        return self.body_parameters + (0 if self.tied_embeddings else self.head_parameters)

    @property
    def n_trainable(self) -> int:
        return self.n_parameters if self.trainable_parameters is None else self.trainable_parameters

    def cut(self, depths: tuple[float, ...]) -> ModelShape:
        """What features at relative `depths` need: layers up to `clamp(floor(p L), 1, L)` of the deepest p."""
        deepest = math.floor(max(depths) * self.n_layers + 1e-9)
        return replace(self, n_layers=min(max(deepest, 1), self.n_layers), trainable_parameters=None)

    def forward_flops(self, n_tokens: float, n_pairs: float) -> float:
        """All layers, adapters included, over tokens whose queries meet `n_pairs` keys altogether."""
        return 2 * (self.layer_matrices + (self.trainable_parameters or 0)) * n_tokens + self._attention_flops(n_pairs)

    def backward_flops(self, n_tokens: float, n_pairs: float) -> float:
        """Frozen matrices need no gradient of their own; attention computes its scores again: 5 products after 2."""
        adapters = 2 * (self.trainable_parameters or 0)
        products = 2 * (self.backward_factor * self.layer_matrices + adapters) * n_tokens
        return products + 2.5 * self._attention_flops(n_pairs)

    def _attention_flops(self, n_pairs: float) -> float:
        return 4 * self.n_layers * self.query_size * n_pairs

    def head_flops(self, n_rows: float) -> float:
        return 2 * self.head_parameters * n_rows

    @property
    def backward_factor(self) -> int:
        """Products per matrix in the backward pass, relative to the one of the forward pass."""
        return 2 if self.trainable_parameters is None else 1


@dataclass(frozen=True)
class StepShape:
    """What one optimizer step is asked to do, over all workers."""

    method: Literal["ebft", "sft"]
    sequence_length: int
    stride: int
    completion_length: int
    context_length: int
    n_samples: int
    batch_size: int
    depths: tuple[float, ...]
    gamma: float = 0.0
    kl_coefficient: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of activations, through autocast; weights, gradients and optimizer states are float32."""
    weight_average: bool = False
    activation_checkpointing: bool = False
    differentiable_rollouts: bool = True
    """Sampling keeps what its backward pass needs, unless activations are checkpointed."""
    world_size: int = 1
    """Workers that share the batch."""
    sharded: bool = False
    """Weights, gradients and optimizer states are divided among the workers, not repeated on each."""
    shared_features: bool = False
    """Feature network and base model are the generator without its adapters (LoRA), so there is no copy of it."""

    @staticmethod
    def of(config: RunConfig, **changes: Any) -> StepShape:
        """From a run; `changes` sets fields by name, above all those that a configuration does not tell."""
        rollout, training = config.rollout, config.training
        shape = StepShape(
            method=config.method,
            sequence_length=config.data.sequence_length,
            stride=rollout.stride,
            completion_length=rollout.completion_length,
            context_length=rollout.context_length,
            n_samples=rollout.n_samples,
            batch_size=training.batch_size,
            depths=config.features.depths,
            gamma=config.loss.gamma,
            kl_coefficient=config.loss.kl_coefficient,
            precision=training.precision,
            weight_average=config.optimizer.ema_decay is not None,
        )
        return replace(shape, **changes)

    @property
    def anchors(self) -> range:
        """Positions of the anchors of one sequence, which are the lengths of their contexts; none for SFT."""
        end = self.sequence_length - self.completion_length + 1
        return range(self.context_length, end, self.stride) if self.method == "ebft" else range(0)

    @property
    def n_blocks(self) -> int:
        """N, completions per sequence."""
        return len(self.anchors) * self.n_samples

    @property
    def block_tokens(self) -> int:
        """Completion tokens per sequence that the generator runs, N (G - 1): the last one predicts nothing."""
        return self.n_blocks * (self.completion_length - 1)

    @property
    def block_rows(self) -> int:
        """Rows of logits per sequence behind the completions; the samples of an anchor share their first."""
        return len(self.anchors) + self.block_tokens

    @property
    def keeps_graph(self) -> bool:
        """The completions are differentiated as they were sampled, not run again."""
        return self.differentiable_rollouts and not self.activation_checkpointing

    @property
    def has_kl(self) -> bool:
        """The frozen base model scores the completions, too."""
        return self.method == "ebft" and self.kl_coefficient > 0

    @property
    def compute_bytes(self) -> int:
        return FLOAT32_BYTES if self.precision == "float32" else 2

    @property
    def sequences_per_worker(self) -> int:
        return -(-self.batch_size // self.world_size)


@dataclass(frozen=True)
class Split:
    """How a worker's share of the batch is cut: into micro-batches, and each of these into parts, by anchors."""

    micro_batch_size: int
    anchors_at_once: int

    @staticmethod
    def whole(step: StepShape) -> Split:
        """Everything at once."""
        return Split(step.sequences_per_worker, max(len(step.anchors), 1))


@dataclass(frozen=True)
class Limits:
    """What the implementation holds at a time, whatever the split; the defaults are those of a GPU."""

    logits_at_once: int = 2**28
    scores_at_once: int = 2**28
    feature_tokens_at_once: int = 2**17
    chunks: int = 6
    """Into how many chunks the blocks of a pass are cut at least, by their contexts, in the `chunked` attention."""
    fused_attention: bool = True
    """Blocks attend in one kernel (`flex`), except while decoding: no scores, but a copy of the prefix's keys and
    values in every pass."""

    @staticmethod
    def on(device: str) -> Limits:
        """Those of the implementation on `cpu` or `cuda`."""
        return Limits() if device == "cuda" else Limits(2**24, 2**20, 2**13, fused_attention=False)

    def logit_rows(self, model: ModelShape) -> int:
        return max(1, self.logits_at_once // model.vocabulary_size)


# --- work ------------------------------------------------------------------------------------------------------


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
    split: Split | None = None,
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
    work = _Work(step, split or Split.whole(step), limits or Limits(), counting)
    forward, backward = work.scoring(model)
    # AdamW reads weights, gradients and two moments, and writes weights and moments.
    updated = 7 * model.n_trainable * (1 if step.sharded else step.world_size)
    return StepCost(
        rollouts=work.rollouts(model) if step.n_blocks else PhaseCost(),
        features=work.features(features.cut(step.depths), duplicate_rate) if step.n_blocks else PhaseCost(),
        scoring_forward=forward,
        scoring_backward=backward,
        optimizer=PhaseCost(weight_bytes=FLOAT32_BYTES * updated),
    )


@dataclass(frozen=True)
class _Work:
    """Sums over one sequence, times the batch."""

    step: StepShape
    split: Split
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
        return PhaseCost(step.batch_size * n_tokens, step.batch_size * flops, weight_bytes)

    def scoring(self, model: ModelShape) -> tuple[PhaseCost, PhaseCost]:
        """Forward and backward pass of the sequences, and of the blocks unless sampling was their forward pass."""
        step, T, length = self.step, self.step.sequence_length, self.step.completion_length - 1
        n_tokens, n_rows, pairs = T + step.block_tokens, T - 1 + step.block_rows, self.causal(T)
        again = model.forward_flops(n_tokens, pairs + self.pairs(model, length)) + model.head_flops(n_rows)
        kept = model.forward_flops(T, pairs) + model.head_flops(T - 1)
        forward, run = (kept, T) if step.keeps_graph else (again, n_tokens)
        pairs += self.decoded_pairs(model) if step.keeps_graph else self.pairs(model, length)
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
        later_at_once = A * step.n_samples * (1 if step.keeps_graph else step.completion_length - 1)
        calls = [(len(step.anchors), A), (step.block_tokens, later_at_once), (truth, truth)]
        rows = sum(
            n_rows * (model.backward_factor + (1 if S * at_once > self.limits.logit_rows(model) else 0))
            for n_rows, at_once in calls
        )
        return model.head_flops(rows)

    def _scoring_weight_bytes(self, model: ModelShape) -> tuple[float, float]:
        """Weights read in the forward pass; weights read and gradients written in the backward pass."""
        step, length = self.step, self.step.completion_length - 1
        weights = model.layer_matrices + model.head_parameters
        sequences = self.micro_batches * weights
        passes = length if step.keeps_graph else min(length, 1)
        blocks = self.parts * (passes * weights + model.head_parameters)
        forward = sequences + (0 if step.keeps_graph else blocks) + (sequences + blocks if step.has_kl else 0)
        again = sequences + blocks if step.activation_checkpointing else 0
        written = sequences + blocks if model.trainable_parameters is None else 0
        read = sequences + blocks + again
        return step.compute_bytes * forward, step.compute_bytes * read + FLOAT32_BYTES * written


def _pieces(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[first : first + size] for first in range(0, len(items), size))


# --- memory ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """What one worker holds. The first four last; the phases follow one another, on top of the sequences."""

    weights_bytes: float
    """Float32, with the copies that autocast makes, and the average of the weights where there is one."""
    gradients_bytes: float
    optimizer_bytes: float
    frozen_bytes: float
    """Feature network, and the base model of the KL term."""
    prefix_bytes: float
    """A micro-batch's sequences, from first to last: activations, keys and values, and the gradients that these
    collect; keys and values in the feature network."""
    rollouts_bytes: float
    features_bytes: float
    scoring_bytes: float
    update_bytes: float
    """Gradients on their way between workers that all hold the whole model."""

    @property
    def phases_bytes(self) -> dict[str, float]:
        """Peak of every phase, all that it stands on included."""
        lasting = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.frozen_bytes
        phases = {"rollouts": self.rollouts_bytes, "features": self.features_bytes, "scoring": self.scoring_bytes}
        peaks = {name: lasting + self.prefix_bytes + held for name, held in phases.items()}
        return {**peaks, "optimizer": lasting + self.update_bytes}

    @property
    def peak_bytes(self) -> float:
        return max(self.phases_bytes.values())


def memory(
    model: ModelShape, features: ModelShape, step: StepShape, split: Split, *, limits: Limits | None = None
) -> Memory:
    """Peak memory of one worker; `features` is the whole feature network.

    Tensors only, good to about a tenth: what kernels allocate inside, and fragmentation, come on top. With adapters
    it is an upper bound, as frozen matrices let go of some of their inputs.
    """
    held = _Held(model, features.cut(step.depths), step, split, limits or Limits())
    shards = step.world_size if step.sharded else 1
    gradients = FLOAT32_BYTES * model.n_trainable / shards
    copies = 2 if step.weight_average else 1
    cast = 0 if step.precision == "float32" else step.compute_bytes * (model.layer_matrices + model.head_parameters)
    frozen = 0
    if step.method == "ebft" and not step.shared_features:
        frozen = held.network.body_parameters + (model.n_parameters if step.has_kl else 0)
    return Memory(
        weights_bytes=(FLOAT32_BYTES * copies * model.n_parameters + cast) / shards,
        gradients_bytes=gradients,
        optimizer_bytes=2 * FLOAT32_BYTES * model.n_trainable / shards,
        frozen_bytes=FLOAT32_BYTES * frozen,
        prefix_bytes=held.prefix(),
        rollouts_bytes=held.rollouts() if step.n_blocks else 0,
        features_bytes=held.features() if step.n_blocks else 0,
        scoring_bytes=held.scoring(),
        # One flat tensor of all gradients, and the gradients cut out of it again.
        update_bytes=2 * gradients if step.world_size > 1 and not step.sharded else 0,
    )


def saved_bytes_per_token(model: ModelShape, step: StepShape, *, blocks: bool) -> int:
    """What autograd keeps of one token in one layer of the Hugging Face implementation, without checkpointing.

    Residuals and norms are float32 whatever the precision: x and its normalised form, twice. Under autocast q, k, v,
    gate and up each keep a copy of their input. Attention of `blocks` keeps its output apart from the projection's.
    """
    width = step.compute_bytes
    inputs = 2 if step.precision == "float32" else 5
    norms = model.hidden_size * (4 * FLOAT32_BYTES + inputs * width) + 2 * FLOAT32_BYTES
    attention = ((3 if blocks else 2) * model.query_size + 2 * model.kv_size) * width + model.n_heads * FLOAT32_BYTES
    return norms + attention + 4 * model.intermediate_size * width


@dataclass(frozen=True)
class _Held:
    """Bytes held by the phases of one micro-batch."""

    model: ModelShape
    network: ModelShape
    step: StepShape
    split: Split
    limits: Limits

    @property
    def prefix_tokens(self) -> int:
        return self.split.micro_batch_size * self.step.sequence_length

    @property
    def blocks(self) -> int:
        """Of one part of a micro-batch."""
        n_samples = self.step.n_samples if self.step.n_blocks else 0
        return self.split.micro_batch_size * self.split.anchors_at_once * n_samples

    @property
    def block_tokens(self) -> int:
        return self.blocks * (self.step.completion_length - 1)

    @property
    def states(self) -> int:
        """Of one token at all requested depths."""
        return FLOAT32_BYTES * self.network.hidden_size * len(self.step.depths)

    def keys_values(self, model: ModelShape) -> int:
        """Of one token in all layers. Rotated keys are float32 whatever the precision."""
        return model.n_layers * model.kv_size * (FLOAT32_BYTES + self.step.compute_bytes)

    def saved(self, *, blocks: bool) -> int:
        """Of one token in all layers and around them, until its backward pass."""
        model, step = self.model, self.step
        outside = FLOAT32_BYTES * (3 * model.hidden_size + 2 * model.head_dim)
        if step.activation_checkpointing:
            kept = 0 if blocks else self.keys_values(model)
            return outside + kept + FLOAT32_BYTES * model.n_layers * model.hidden_size
        # Attention saves keys as it used them: in float32 they are the ones kept for the blocks, else copies.
        keys = 0 if blocks or step.precision == "float32" else FLOAT32_BYTES * model.kv_size
        return outside + model.n_layers * (saved_bytes_per_token(model, step, blocks=blocks) + keys)

    def running(self, model: ModelShape, n_tokens: int, *, mlp_copies: int = 3, score_copies: int = 0) -> int:
        """Of one layer while it runs: its MLP or, of blocks, the scores of a chunk."""
        mlp = 4 * FLOAT32_BYTES * model.hidden_size + mlp_copies * self.step.compute_bytes * model.intermediate_size
        all_scores = n_tokens * model.n_heads * self.step.sequence_length
        scores = min(self.limits.scores_at_once, all_scores // self.limits.chunks)
        return max(n_tokens * mlp, score_copies * FLOAT32_BYTES * scores)

    def differentiating(self, n_tokens: int, *, blocks: bool) -> int:
        """Of one layer while the backward pass goes through it; what was saved goes as its gradient comes."""
        again = saved_bytes_per_token(self.model, self.step, blocks=blocks) if self.step.activation_checkpointing else 0
        score_copies = 3 if blocks and (self.step.keeps_graph or not self.limits.fused_attention) else 0
        return n_tokens * again + self.running(self.model, n_tokens, mlp_copies=1, score_copies=score_copies)

    def logits(self, n_rows: int, *, copies: int) -> int:
        cast = 0 if self.step.precision == "float32" else self.step.compute_bytes
        rows = min(n_rows, self.limits.logit_rows(self.model))
        return rows * self.model.vocabulary_size * (copies * FLOAT32_BYTES + cast)

    def prefix(self) -> int:
        per_token = self.saved(blocks=False)
        if self.step.method == "ebft":
            leaves = self.keys_values(self.model) + FLOAT32_BYTES * self.model.hidden_size
            per_token += leaves * (2 if self.step.has_kl else 1)
            per_token += self.keys_values(self.network) + self.states
        return self.prefix_tokens * per_token

    def graph(self) -> int:
        """What sampling keeps for its backward pass, and autograd of all passes of a block where there is one."""
        model, step, length = self.model, self.step, self.step.completion_length - 1
        if not step.keeps_graph:
            return 0
        held = self.block_tokens * self.saved(blocks=True)
        # Every decode pass keeps the keys and values of its block so far, and cast keys of the sequences.
        earlier = self.blocks * (length - 1) * length // 2
        held += 2 * model.n_layers * earlier * model.kv_size * step.compute_bytes
        if step.precision != "float32":
            held += length * model.n_layers * self.prefix_tokens * model.kv_size * step.compute_bytes
        if self.blocks <= self.limits.logit_rows(model):
            rows = self.block_tokens + self.blocks // step.n_samples if step.n_samples else 0
            held += FLOAT32_BYTES * rows * model.vocabulary_size
        return held

    def rollouts(self) -> int:
        """What sampling keeps, or keys and values of the blocks so far; a decode pass, or drawing from its logits."""
        kept = self.graph() if self.step.keeps_graph else self.block_tokens * self.keys_values(self.model)
        decoding = self.running(self.model, self.blocks, score_copies=2)
        return kept + max(decoding, self.logits(self.blocks, copies=3))

    def features(self) -> int:
        """A pass of completions, with their states at the requested depths."""
        G, network = self.step.completion_length, self.network
        n_tokens = min(self.blocks * G, max(self.limits.feature_tokens_at_once, G))
        running = self.running(network, n_tokens, score_copies=0 if self.limits.fused_attention else 2)
        return self.graph() + self.blocks * self.states + n_tokens * self.states + running

    def scoring(self) -> int:
        """Cross-entropy, then the backward pass of a part of the blocks, at last that of the sequences."""
        trains_head = self.model.trainable_parameters is None
        # The gradient of the head: the sum so far, and what is added to it.
        head = 2 * FLOAT32_BYTES * self.model.head_parameters if trains_head else 0
        truth = head + self.logits(self.prefix_tokens, copies=2)
        return max(truth, self._part(head), self.differentiating(self.prefix_tokens, blocks=False))

    def _part(self, head: int) -> int:
        model, step, n_tokens = self.model, self.step, self.block_tokens
        if step.keeps_graph:
            # Each weight is used in every pass; its gradients wait for one another, while the last pass is let go.
            length, graph = step.completion_length - 1, self.graph()
            waiting = FLOAT32_BYTES * model.n_trainable + graph * (length - 1) // length if length > 1 else 0
            backward = self.differentiating(self.blocks, blocks=True)
            return max(graph, waiting) + max(head + self.logits(self.blocks, copies=2), backward)
        held = n_tokens * self.saved(blocks=True)
        if self.limits.fused_attention and n_tokens:
            copied_layers = 1 if step.activation_checkpointing else model.n_layers
            held += 2 * copied_layers * self.prefix_tokens * model.kv_size * step.compute_bytes
        return held + max(head + self.logits(n_tokens, copies=2), self.differentiating(n_tokens, blocks=True))


# --- choosing a split ------------------------------------------------------------------------------------------


def largest_split(
    model: ModelShape, features: ModelShape, step: StepShape, *, budget_bytes: float, limits: Limits | None = None
) -> Split:
    """The fewest passes whose peak memory fits into `budget_bytes` on one worker; depends on its arguments alone.

    All sequences and all anchors if that fits; otherwise fewer anchors at once, while a pass still has
    `EFFICIENT_BLOCK_TOKENS`; otherwise fewer sequences, with as many anchors as fit; at last fewer anchors still.

    Raises:
        ConfigError: not even one sequence and one anchor at a time fit.
    """
    for split in _splits(step):
        if memory(model, features, step, split, limits=limits).peak_bytes <= budget_bytes:
            return split
    raise _does_not_fit(memory(model, features, step, Split(1, 1), limits=limits), step, budget_bytes)


def _splits(step: StepShape) -> Iterator[Split]:
    whole = Split.whole(step)
    tokens_per_anchor = step.n_samples * (1 if step.keeps_graph else step.completion_length - 1)
    for S in _halvings(whole.micro_batch_size):
        for A in _halvings(whole.anchors_at_once):
            if S == 1 or whole.anchors_at_once == A or S * A * tokens_per_anchor >= EFFICIENT_BLOCK_TOKENS:
                yield Split(S, A)


def _halvings(count: int) -> Iterator[int]:
    while count > 1:
        yield count
        count = -(-count // 2)
    yield 1


def _does_not_fit(least: Memory, step: StepShape, budget_bytes: float) -> ConfigError:
    remedies = ["a shorter sequence_length"]
    if step.method == "ebft":
        remedies += ["fewer n_samples", "a shorter completion_length"]
    if not step.activation_checkpointing:
        remedies.append("activation_checkpointing=true")
    if step.precision == "float32":
        remedies.append("precision=bfloat16")
    needed, lasting, budget = (b / 2**30 for b in (least.peak_bytes, least.phases_bytes["optimizer"], budget_bytes))
    return ConfigError(
        f"memory={budget:.3g} GiB: one optimizer step needs at least {needed:.3g} GiB, with micro_batch_size=1 and "
        f"anchors_at_once=1; {lasting:.3g} GiB of them are weights, gradients, optimizer states and the feature "
        f"network. Use {', '.join(remedies)}, lora_rank, or a smaller model"
    )
