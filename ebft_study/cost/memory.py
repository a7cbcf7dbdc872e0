"""Peak memory of a step."""

from __future__ import annotations

from dataclasses import dataclass

from ebft_study.cost.shapes import FLOAT32_BYTES, Limits, MicroBatchPlan, ModelShape, StepShape


@dataclass(frozen=True)
class Memory:
    """What one worker holds. The first four last; the phases follow one another, on top of the sequences."""

    weights_bytes: float
    """With the copies that autocast makes, and the average of the weights where there is one."""
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
    model: ModelShape, features: ModelShape, step: StepShape, split: MicroBatchPlan, *, limits: Limits | None = None
) -> Memory:
    """Peak memory of one worker; `features` is the whole feature network.

    Tensors only, good to about a tenth: what kernels allocate inside, and fragmentation, come on top. With adapters
    it is an upper bound, as frozen matrices let go of some of their inputs. For sharded workers it is too low: what
    they hold of each other's weights and gradients inside a step is not counted.
    """
    held = _Held(model, features.cut(step.depths), step, split, limits or Limits())
    shards = step.world_size if step.sharded else 1
    gradients = step.weight_bytes * model.n_trainable / shards
    copies = 2 if step.weight_average else 1
    trained = step.weight_bytes * model.n_trainable
    # Under adapters the model itself is frozen, and so are its matrices; autocast copies every matrix that is not.
    adapted = model.trainable_parameters is not None
    own = step.compute_bytes * model.n_parameters if adapted else 0
    casts = not adapted and step.weight_bytes != step.compute_bytes
    cast = step.compute_bytes * (model.layer_matrices + model.head_parameters) if casts else 0
    frozen = 0
    if step.method == "ebft" and not step.shared_features:
        frozen = 0 if step.remote_features else held.network.body_parameters
        frozen += model.n_parameters if step.has_kl else 0
    return Memory(
        weights_bytes=(own + copies * trained + cast) / shards,
        gradients_bytes=gradients,
        optimizer_bytes=2 * gradients,
        frozen_bytes=step.compute_bytes * frozen,
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
    split: MicroBatchPlan
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
        """Of one token in all layers."""
        return 2 * model.n_layers * model.kv_size * self.step.compute_bytes

    def saved(self, *, blocks: bool) -> int:
        """Of one token in all layers and around them, until its backward pass."""
        model, step = self.model, self.step
        outside = FLOAT32_BYTES * (3 * model.hidden_size + 2 * model.head_dim)
        if step.activation_checkpointing:
            kept = 0 if blocks else self.keys_values(model)
            return outside + kept + FLOAT32_BYTES * model.n_layers * model.hidden_size
        return outside + model.n_layers * saved_bytes_per_token(model, step, blocks=blocks)

    def running(self, model: ModelShape, n_tokens: int, *, mlp_copies: int = 3, score_copies: int = 0) -> int:
        """Of one layer while it runs: its MLP or, of blocks, the scores of a chunk."""
        mlp = 4 * FLOAT32_BYTES * model.hidden_size + mlp_copies * self.step.compute_bytes * model.intermediate_size
        all_scores = n_tokens * model.n_heads * self.step.sequence_length
        scores = min(self.limits.scores_at_once, all_scores // self.limits.chunks)
        return max(n_tokens * mlp, score_copies * FLOAT32_BYTES * scores)

    def differentiating(self, n_tokens: int, *, blocks: bool) -> int:
        """Of one layer while the backward pass goes through it; what was saved goes as its gradient comes."""
        again = saved_bytes_per_token(self.model, self.step, blocks=blocks) if self.step.activation_checkpointing else 0
        score_copies = 3 if blocks and (self.step.differentiable_rollouts or not self.limits.fused_attention) else 0
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
            per_token += 0 if self.step.remote_features else self.keys_values(self.network) + self.states
        return self.prefix_tokens * per_token

    def graph(self) -> int:
        """What sampling keeps for its backward pass, and autograd of all passes of a block where there is one."""
        model, step, length = self.model, self.step, self.step.completion_length - 1
        if not step.differentiable_rollouts:
            return 0
        held = self.block_tokens * self.saved(blocks=True)
        # Every decode pass keeps the keys and values of its block so far, unless it is going to run again.
        earlier = length if step.activation_checkpointing else (length - 1) * length // 2
        held += self.blocks * earlier * self.keys_values(model)
        if self.blocks <= self.limits.logit_rows(model):
            rows = self.block_tokens + self.blocks // step.n_samples if step.n_samples else 0
            held += FLOAT32_BYTES * rows * model.vocabulary_size
        return held

    def rollouts(self) -> int:
        """What sampling keeps, or keys and values of the blocks so far; a decode pass, or drawing from its logits."""
        kept = self.graph() if self.step.differentiable_rollouts else self.block_tokens * self.keys_values(self.model)
        decoding = self.running(self.model, self.blocks, score_copies=2)
        return kept + max(decoding, self.logits(self.blocks, copies=3))

    def features(self) -> int:
        """A pass of completions, with their states at the requested depths; of a service, its reply and a copy."""
        if self.step.remote_features:
            return self.graph() + 2 * self.blocks * self.states
        G, network = self.step.completion_length, self.network
        n_tokens = min(self.blocks * G, max(self.limits.feature_tokens_at_once, G))
        running = self.running(network, n_tokens, score_copies=0 if self.limits.fused_attention else 2)
        return self.graph() + self.blocks * self.states + n_tokens * self.states + running

    def scoring(self) -> int:
        """Cross-entropy, then the backward pass of a part of the blocks, at last that of the sequences."""
        trains_head = self.model.trainable_parameters is None
        # The gradient of the head: the sum so far, and what is added to it.
        head = 2 * self.step.weight_bytes * self.model.head_parameters if trains_head else 0
        truth = head + self.logits(self.prefix_tokens, copies=2)
        return max(truth, self._part(head), self.differentiating(self.prefix_tokens, blocks=False))

    def _part(self, head: int) -> int:
        model, step, n_tokens = self.model, self.step, self.block_tokens
        if step.differentiable_rollouts:
            # Each weight is used in every pass; its gradients wait for one another, while the last pass is let go.
            length, graph = step.completion_length - 1, self.graph()
            waiting = step.weight_bytes * model.n_trainable + graph * (length - 1) // length if length > 1 else 0
            backward = self.differentiating(self.blocks, blocks=True)
            return max(graph, waiting) + max(head + self.logits(self.blocks, copies=2), backward)
        held = n_tokens * self.saved(blocks=True)
        if self.limits.fused_attention and n_tokens:
            copied_layers = 1 if step.activation_checkpointing else model.n_layers
            held += 2 * copied_layers * self.prefix_tokens * model.kv_size * step.compute_bytes
        return held + max(head + self.logits(n_tokens, copies=2), self.differentiating(n_tokens, blocks=True))
