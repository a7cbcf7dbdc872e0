"""Shapes of models and steps: all that the cost of a step depends on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ebft_study.errors import ModelError

if TYPE_CHECKING:
    from ebft_study.config import RunConfig

FLOAT32_BYTES = 4
_INNER_SIZES = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
LONGEST_GRAPH = 16
"""Tokens of the longest completions that are differentiated as they were sampled.

Backward through sampling goes through a small pass per token, and what a token's keys and values are copied to grows
with their square; scoring again is one large pass. `ebft-study bench rollouts` measures both (docs/performance.md).
"""


def keeps_graph(completion_length: int) -> bool:
    """Whether strided rollouts of G tokens keep the graph of sampling, or are scored again for their gradient."""
    return completion_length <= LONGEST_GRAPH


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
    def from_config(config: Any, *, trainable_parameters: int | None = None) -> ModelShape:
        """The shape of a Hugging Face configuration: exact for Qwen2, Qwen3, Llama and Mistral.

        Of other families an estimate: a mixture of experts counts as the dense model of its `intermediate_size`.

        Raises:
            ModelError: it has no sizes of a transformer.
        """
        kind = getattr(config, "model_type", "")
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
            if (_optional(config, name) or 0) < 1:
                raise ModelError(f"model type {kind!r} has no {name} of at least 1. Use a decoder-only transformer")
        H, heads = config.hidden_size, config.num_attention_heads
        head_dim = _optional(config, "head_dim") or H // heads
        kv_heads = _optional(config, "num_key_value_heads") or heads
        inner = next((size for name in _INNER_SIZES if (size := _optional(config, name))), 4 * H)
        small = 2 * H + (2 * head_dim if kind == "qwen3" else 0)
        if kind == "qwen2" or getattr(config, "attention_bias", False):
            small += (heads + 2 * kv_heads) * head_dim
            small += 0 if kind == "qwen2" else H
        if getattr(config, "mlp_bias", False):
            small += 2 * inner + H
        return ModelShape(
            n_layers=config.num_hidden_layers,
            hidden_size=H,
            intermediate_size=inner,
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=head_dim,
            vocabulary_size=config.vocab_size,
            tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
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
    def layer_parameters(self) -> int:
        """Parameters of one layer, adapters left out."""
        return self.layer_matrices // self.n_layers + self.small_parameters_per_layer

    @property
    def outer_parameters(self) -> int:
        """Parameters outside the layers: embeddings, last norm and head."""
        return self.n_parameters - self.n_layers * self.layer_parameters

    @property
    def body_parameters(self) -> int:
        """Everything but the head; all that a feature network keeps."""
        small = self.n_layers * self.small_parameters_per_layer + self.hidden_size
        return self.head_parameters + self.layer_matrices + small

    @property
    def n_parameters(self) -> int:
        """Tied embeddings count once; adapters not at all."""
        return self.body_parameters + (0 if self.tied_embeddings else self.head_parameters)

    def with_adapters(self, rank: int, targets: tuple[str, ...] | None = None) -> ModelShape:
        """This model with adapters as its only trained weights: two matrices of `rank` for each linear layer.

        Args:
            targets: names of the layers; None for all.
        """
        H, Q, K, inner = self.hidden_size, self.query_size, self.kv_size, self.intermediate_size
        sizes = {
            "q_proj": H + Q,
            "k_proj": H + K,
            "v_proj": H + K,
            "o_proj": Q + H,
            "gate_proj": H + inner,
            "up_proj": H + inner,
            "down_proj": inner + H,
        }
        per_layer = sum(size for name, size in sizes.items() if targets is None or name in targets)
        return replace(self, trainable_parameters=self.n_layers * rank * per_layer)

    @property
    def n_trainable(self) -> int:
        return self.n_parameters if self.trainable_parameters is None else self.trainable_parameters

    def cut(self, depths: tuple[float, ...]) -> ModelShape:
        """The part that features at relative `depths` need: layers up to `clamp(floor(p L), 1, L)` of the deepest p."""
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


def _optional(config: Any, name: str) -> int | None:
    """A size that not every configuration has, or that differs from layer to layer (which raises, in Gemma 4)."""
    try:
        size = getattr(config, name)
    except Exception:
        return None
    return size if isinstance(size, int) else None


@dataclass(frozen=True)
class StepShape:
    """Sizes and options of one optimizer step, over all workers."""

    method: Literal["ebft", "sft", "rlvr"]
    sequence_length: int
    stride: int
    completion_length: int
    context_length: int
    n_samples: int
    batch_size: int
    depths: tuple[float, ...]
    pooling: str = "last_token"
    """Pooling of features; with `last_token` the deepest layer computes its MLP for one token of a completion only."""
    gamma: float = 0.0
    kl_coefficient: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of activations, and of frozen networks."""
    weight_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of trained weights, their gradients and optimizer states."""
    weight_average: bool = False
    activation_checkpointing: bool = False
    """`auto` counts as False where no plan decides (`training.memory`)."""
    differentiable_rollouts: bool = True
    """The completions are differentiated as they were sampled, not run again for that."""
    remote_features: bool = False
    """The feature network is in another process."""
    world_size: int = 1
    """Workers that share the batch."""
    sharded: bool = False
    """Weights, gradients, optimizer states and frozen networks are divided among the workers, not repeated on each."""
    shared_features: bool = False
    """Feature network and base model are the generator without its adapters (LoRA), so there is no copy of it."""
    whole_answers: bool = False
    """One anchor, after a prompt of `context_length` tokens; its answers are sampled before the sequence is run for its
    gradient. They count as `completion_length` tokens long."""
    judge_parameters: int = 0
    """Frozen weights of the evaluations' judge that are not those of the feature network."""

    @staticmethod
    def from_config(config: RunConfig, **changes: Any) -> StepShape:
        """The step of a run; `changes` sets fields by name, above all those that a configuration does not contain."""
        rollout, training, answers = config.rollout, config.training, config.samples_answers
        length = config.max_answer_tokens if answers else rollout.completion_length
        divided = training.sharding == "fsdp" and changes.get("world_size", 1) > 1
        sampled_here = not answers and rollout.backend == "strided"
        shape = StepShape(
            method=config.method,
            sequence_length=config.data.sequence_length,
            stride=rollout.stride,
            completion_length=length,
            whole_answers=answers,
            context_length=config.data.sequence_length - length if answers else rollout.context_length,
            n_samples=rollout.n_samples,
            batch_size=training.batch_size,
            depths=config.features.depths,
            pooling=config.features.pooling,
            gamma=config.loss.gamma,
            kl_coefficient=config.loss.kl_coefficient,
            precision=training.precision,
            weight_dtype=training.weight_dtype,
            activation_checkpointing=training.activation_checkpointing is True,
            sharded=training.sharding == "fsdp",
            shared_features=config.lora.lora_rank > 0 and config.features.is_base,
            remote_features=config.features.backend == "service",
            differentiable_rollouts=sampled_here and keeps_graph(length) and not divided,
            weight_average=config.optimizer.ema_decay is not None,
        )
        return replace(shape, **changes)

    @property
    def shards(self) -> int:
        """Workers that the weights are divided among."""
        return self.world_size if self.sharded else 1

    @property
    def anchors(self) -> range:
        """Positions of the anchors of one sequence, which are the lengths of their contexts; none for SFT."""
        if self.method == "sft":
            return range(0)
        end = self.sequence_length - self.completion_length + 1
        return range(self.context_length, self.context_length + 1 if self.whole_answers else end, self.stride)

    @property
    def prompt_tokens(self) -> int:
        """Tokens per sequence that are run before its answers are sampled."""
        return self.context_length if self.whole_answers and self.anchors else 0

    @property
    def has_features(self) -> bool:
        """The feature network embeds the completions."""
        return self.method == "ebft"

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
    def has_kl(self) -> bool:
        """The frozen base model scores the completions, too."""
        return self.method != "sft" and self.kl_coefficient > 0

    @property
    def compute_bytes(self) -> int:
        """Bytes of one number in activations and frozen networks."""
        return FLOAT32_BYTES if self.precision == "float32" else 2

    @property
    def weight_bytes(self) -> int:
        """Bytes of one trained weight, gradient or moment."""
        return FLOAT32_BYTES if self.weight_dtype == "float32" else 2

    @property
    def sequences_per_worker(self) -> int:
        return -(-self.batch_size // self.world_size)


@dataclass(frozen=True)
class MicroBatchPlan:
    """The cut of a worker's share of the batch into micro-batches, and of each of these into parts, by anchors."""

    micro_batch_size: int
    anchors_at_once: int

    @staticmethod
    def whole(step: StepShape) -> MicroBatchPlan:
        """The micro-batch plan with a single pass."""
        return MicroBatchPlan(step.sequences_per_worker, max(len(step.anchors), 1))


@dataclass(frozen=True)
class Limits:
    """Sizes that the implementation works in, whatever the micro-batch plan; the defaults are those of a GPU."""

    logits_at_once: int = 2**28
    scores_at_once: int = 2**28
    feature_tokens_at_once: int = 2**17
    chunks: int = 1
    """Into how many chunks the blocks of a pass are cut at least, by their contexts, in the `chunked` attention."""
    fused_attention: bool = True
    """Blocks attend in one kernel (`flex`): no scores, but a copy of the prefix's keys and values in every pass."""
    fused_decoding: int = 16
    """Tokens of the longest blocks that are decoded in this way."""

    @staticmethod
    def on(device: str) -> Limits:
        """The sizes of the implementation on `cpu` or `cuda`."""
        return GPU_LIMITS if device == "cuda" else CPU_LIMITS

    def logit_rows(self, model: ModelShape) -> int:
        return max(1, self.logits_at_once // model.vocabulary_size)


GPU_LIMITS = Limits()
CPU_LIMITS = Limits(2**24, 2**20, 2**10, 6, fused_attention=False, fused_decoding=0)
