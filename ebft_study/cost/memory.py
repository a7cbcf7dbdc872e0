"""Peak memory of a step, and the largest micro-batch plan that fits into a given memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from ebft_study.cost.launches import step_seconds
from ebft_study.cost.shapes import FLOAT32_BYTES, GPU_LIMITS, Limits, MicroBatchPlan, ModelShape, StepShape
from ebft_study.errors import ConfigError

EFFICIENT_BLOCK_TOKENS = 1024
"""Fewer tokens per pass than this no longer fill a matrix product."""


@dataclass(frozen=True)
class Memory:
    """Bytes in one worker. The first four last; the phases follow one another, on top of the sequences."""

    weights_bytes: float
    """Weights, the copies that autocast makes, and the average of the weights where there is one."""
    gradients_bytes: float
    optimizer_bytes: float
    frozen_bytes: float
    """Feature network, judge, and the base model of the KL term. Of all four, a worker with sharded weights has its
    part; what it gathers of the others' is counted in the phase that it is gathered for."""
    prefix_bytes: float
    """A micro-batch's sequences, from first to last: activations, keys and values, and the gradients that these
    collect; keys and values in the feature network."""
    rollouts_bytes: float
    features_bytes: float
    scoring_bytes: float
    update_bytes: float
    """Gradients in transfer between workers that all hold the whole model."""
    samples_ahead: bool = False
    """Rollouts come before the sequences of any micro-batch, not on top of them."""
    evaluation_bytes: float = 0
    """All weights of generator, feature network and judge, where they are sharded."""

    @property
    def phases_bytes(self) -> dict[str, float]:
        """Peak of every phase, with all that is in memory meanwhile."""
        lasting = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.frozen_bytes
        phases = {"rollouts": self.rollouts_bytes, "features": self.features_bytes, "scoring": self.scoring_bytes}
        peaks = {name: lasting + self.prefix_bytes + own for name, own in phases.items()}
        if self.samples_ahead:
            peaks["rollouts"] = lasting + self.rollouts_bytes
        between = {"optimizer": self.update_bytes, "evaluation": self.evaluation_bytes}
        return peaks | {name: lasting + own for name, own in between.items()}

    @property
    def peak_bytes(self) -> float:
        return max(self.phases_bytes.values())


def memory(
    model: ModelShape, features: ModelShape, step: StepShape, plan: MicroBatchPlan, *, limits: Limits = GPU_LIMITS
) -> Memory:
    """Peak memory of one worker; `features` is the whole feature network.

    Tensors only, good to about a tenth: what kernels allocate inside, and fragmentation, come on top. With adapters
    it is an upper bound, as frozen matrices free some of their inputs.
    """
    phases = _Phases(model, features.cut(step.depths), step, plan, limits)
    shards, gathered = step.shards, phases.gathered
    gradients = step.weight_bytes * model.n_trainable / shards
    copies = 2 if step.weight_average else 1
    trained = step.weight_bytes * model.n_trainable
    # Under adapters the model itself is frozen, and so are its matrices; autocast copies every matrix that is not.
    adapted = model.trainable_parameters is not None
    base_weights = step.compute_bytes * model.n_parameters if adapted else 0
    casts = not adapted and step.weight_bytes != step.compute_bytes and shards == 1
    cast = step.compute_bytes * (model.layer_matrices + model.head_parameters) if casts else 0
    frozen = step.judge_parameters + phases.frozen_features + phases.frozen_base
    return Memory(
        weights_bytes=(base_weights + copies * trained + cast) / shards,
        gradients_bytes=gradients,
        optimizer_bytes=2 * gradients,
        frozen_bytes=step.compute_bytes * frozen / shards,
        prefix_bytes=phases.prefix(),
        rollouts_bytes=gathered.model + phases.rollouts() if step.n_blocks else 0,
        features_bytes=gathered.features + phases.features() if step.n_blocks and step.has_features else 0,
        scoring_bytes=max(phases.scoring(), phases.base()),
        # One flat tensor of all gradients, and the gradients cut out of it again.
        update_bytes=2 * gradients if step.world_size > 1 and shards == 1 else 0,
        samples_ahead=step.whole_answers,
        evaluation_bytes=gathered.evaluation,
    )


def saved_bytes_per_token(model: ModelShape, step: StepShape, *, blocks: bool) -> int:
    """Bytes that autograd saves per token and layer of the Hugging Face implementation, without checkpointing.

    Residuals and norms are float32 whatever the precision: x and its normalised form, twice. Under autocast q, k, v,
    gate and up each keep a copy of their input. Attention of `blocks` keeps its output apart from the projection's.
    """
    width = step.compute_bytes
    inputs = 2 if step.precision == "float32" else 5
    norms = model.hidden_size * (4 * FLOAT32_BYTES + inputs * width) + 2 * FLOAT32_BYTES
    attention = ((3 if blocks else 2) * model.query_size + 2 * model.kv_size) * width + model.n_heads * FLOAT32_BYTES
    return norms + attention + 4 * model.intermediate_size * width


def embedded_bytes_per_token(network: ModelShape, depths: tuple[float, ...], *, compute_bytes: int) -> int:
    """Bytes of a token of a sequence that a frozen network embeds: keys, values and states, and one layer that runs."""
    kept = 2 * network.cut(depths).n_layers * network.kv_size * compute_bytes
    states = FLOAT32_BYTES * network.hidden_size * len(depths)
    return kept + states + 4 * FLOAT32_BYTES * network.hidden_size + 3 * compute_bytes * network.intermediate_size


@dataclass(frozen=True)
class _Gathered:
    """Bytes of what workers with sharded weights gather, and of gradients on their way; all 0 without shards."""

    model: float = 0
    """The whole generator, for sampling."""
    features: float = 0
    """The feature network, for its passes, beside the generator's embeddings and head."""
    base: float = 0
    """The base model of the KL term, likewise."""
    outside: float = 0
    """Embeddings and head, for a whole step, and the gradient of the head that cross-entropy leaves."""
    head_gradient: float = 0
    """The same of the policy's loss."""
    backward: float = 0
    """In a backward pass: a layer, the next one, the layer's gradient, and that of the layer before it in transit."""
    end: float = 0
    """At its end: the gradient of embeddings and head, and the same in transit."""
    evaluation: float = 0

    @staticmethod
    def of(phases: _Phases) -> _Gathered:
        model, step = phases.model, phases.step
        if step.shards == 1:
            return _Gathered()
        trains_all, adapters, width = (
            model.trainable_parameters is None,
            model.trainable_parameters or 0,
            step.compute_bytes,
        )
        in_layer = adapters // model.n_layers
        layer, outer = model.layer_parameters + in_layer, model.outer_parameters
        whole, outside = width * (model.n_parameters + adapters), width * outer
        head = width * model.head_parameters if trains_all else 0
        left = head if step.method != "sft" and step.gamma > 0 else 0
        network = whole if step.shared_features else outside + width * phases.frozen_features
        in_transit = FLOAT32_BYTES * (1 + 1 / step.shards)
        return _Gathered(
            model=whole + left,
            features=network + left,
            base=outside + width * phases.frozen_base + left,
            outside=outside + left,
            head_gradient=head - left,
            backward=2 * width * layer + (width + FLOAT32_BYTES) * (layer if trains_all else in_layer),
            end=(width + in_transit) * outer - left if trains_all else 0,
            evaluation=whole + width * (phases.frozen_features + step.judge_parameters),
        )


@dataclass(frozen=True)
class _Phases:
    """Bytes in use during the phases of one micro-batch."""

    model: ModelShape
    network: ModelShape
    step: StepShape
    plan: MicroBatchPlan
    limits: Limits

    @property
    def frozen_features(self) -> int:
        """Weights of a feature network in this process that are not the generator's; SFT is evaluated with it."""
        elsewhere = self.step.shared_features or self.step.remote_features
        return 0 if elsewhere else self.network.body_parameters

    @property
    def frozen_base(self) -> int:
        """Weights of the base model of the KL term; without adapters the generator does not contain it."""
        return self.model.n_parameters if self.step.has_kl and self.model.trainable_parameters is None else 0

    @functools.cached_property
    def gathered(self) -> _Gathered:
        return _Gathered.of(self)

    @property
    def prefix_tokens(self) -> int:
        return self.plan.micro_batch_size * self.step.sequence_length

    @property
    def blocks(self) -> int:
        """Completions in one part of a micro-batch."""
        n_samples = self.step.n_samples if self.step.n_blocks else 0
        return self.plan.micro_batch_size * self.plan.anchors_at_once * n_samples

    @property
    def block_tokens(self) -> int:
        return self.blocks * (self.step.completion_length - 1)

    @property
    def states(self) -> int:
        """Bytes of a token's hidden states at all requested depths."""
        return FLOAT32_BYTES * self.network.hidden_size * len(self.step.depths)

    @property
    def decodes_fused(self) -> bool:
        return 0 < self.step.completion_length - 1 <= self.limits.fused_decoding

    @property
    def copied(self) -> int:
        """Bytes of a copy of the prefix's keys and values, of as many layers as keep theirs for the backward pass."""
        layers = 1 if self.step.activation_checkpointing else self.model.n_layers
        return 2 * layers * self.prefix_tokens * self.model.kv_size * self.step.compute_bytes

    def keys_values(self, model: ModelShape) -> int:
        """Bytes of a token's keys and values in all layers."""
        return 2 * model.n_layers * model.kv_size * self.step.compute_bytes

    def saved(self, *, blocks: bool) -> int:
        """Bytes per token in all layers and around them, until its backward pass."""
        model, step = self.model, self.step
        outside = FLOAT32_BYTES * (3 * model.hidden_size + 2 * model.head_dim)
        if step.activation_checkpointing:
            kept = 0 if blocks else self.keys_values(model)
            return outside + kept + FLOAT32_BYTES * model.n_layers * model.hidden_size
        return outside + model.n_layers * saved_bytes_per_token(model, step, blocks=blocks)

    def running(self, model: ModelShape, n_tokens: int, *, mlp_copies: int = 3, score_copies: int = 0) -> int:
        """Bytes of one layer while it runs: its MLP or, for blocks, the scores of a chunk."""
        mlp = 4 * FLOAT32_BYTES * model.hidden_size + mlp_copies * self.step.compute_bytes * model.intermediate_size
        all_scores = n_tokens * model.n_heads * self.step.sequence_length
        scores = min(self.limits.scores_at_once, all_scores // self.limits.chunks)
        return max(n_tokens * mlp, score_copies * FLOAT32_BYTES * scores)

    def differentiating(self, n_tokens: int, *, blocks: bool) -> int:
        """Bytes of one layer during its backward pass; saved activations are freed as their gradients are made."""
        again = saved_bytes_per_token(self.model, self.step, blocks=blocks) if self.step.activation_checkpointing else 0
        fused = self.decodes_fused if self.step.differentiable_rollouts else self.limits.fused_attention
        score_copies = 3 if blocks and not fused else 0
        return n_tokens * again + self.running(self.model, n_tokens, mlp_copies=1, score_copies=score_copies)

    def logits(self, n_rows: int, *, copies: int) -> int:
        cast = 0 if self.step.precision == "float32" else self.step.compute_bytes
        rows = min(n_rows, self.limits.logit_rows(self.model))
        return rows * self.model.vocabulary_size * (copies * FLOAT32_BYTES + cast)

    def prefix(self) -> int:
        per_token = self.saved(blocks=False)
        if self.step.method != "sft":
            leaves = self.keys_values(self.model) + FLOAT32_BYTES * self.model.hidden_size
            per_token += leaves * (2 if self.step.has_kl else 1)
            embedded = self.step.has_features and not self.step.remote_features
            per_token += self.keys_values(self.network) + self.states if embedded else 0
        return self.prefix_tokens * per_token

    def graph(self) -> int:
        """Bytes that sampling saves for its backward pass."""
        model, step, length = self.model, self.step, self.step.completion_length - 1
        if not step.differentiable_rollouts:
            return 0
        kept = self.block_tokens * self.saved(blocks=True)
        # Every decode pass keeps the keys and values of its block so far, unless it is going to run again.
        earlier = length if step.activation_checkpointing else (length - 1) * length // 2
        kept += self.blocks * earlier * self.keys_values(model)
        if self.decodes_fused:
            kept += self.copied * (1 if step.activation_checkpointing else length)
        if self.blocks <= self.limits.logit_rows(model):
            rows = self.block_tokens + self.blocks // step.n_samples if step.n_samples else 0
            kept += FLOAT32_BYTES * rows * model.vocabulary_size
        return kept

    def rollouts(self) -> int:
        """The graph of sampling, or keys and values of the blocks so far; a decode pass, or drawing from its logits."""
        kept = self.graph() if self.step.differentiable_rollouts else self.block_tokens * self.keys_values(self.model)
        decoding = self.running(self.model, self.blocks, score_copies=0 if self.decodes_fused else 2)
        drawing = kept + max(decoding, self.logits(self.blocks, copies=3))
        prompts = self.plan.micro_batch_size * self.step.prompt_tokens
        own = prompts * (self.keys_values(self.model) + FLOAT32_BYTES * self.model.hidden_size)
        return own + max(drawing, self.running(self.model, prompts))

    def features(self) -> int:
        """A pass of completions, with their states at the requested depths; with a service, its reply and a copy."""
        graph = self.scored() if self.step.whole_answers else self.graph()
        if self.step.remote_features:
            return graph + 2 * self.blocks * self.states
        G, network = self.step.completion_length, self.network
        n_tokens = min(self.blocks * G, max(self.limits.feature_tokens_at_once, G))
        running = self.running(network, n_tokens, score_copies=0 if self.limits.fused_attention else 2)
        return graph + self.blocks * self.states + n_tokens * self.states + running

    def base(self) -> float:
        """A pass of the frozen base model, before the generator's, where its weights are gathered for it."""
        if self.step.shards == 1 or not self.frozen_base:
            return 0
        n_tokens = max(self.prefix_tokens, self.block_tokens)
        running = self.running(self.model, n_tokens, score_copies=0 if self.limits.fused_attention else 2)
        return self.gathered.base + max(running, self.logits(n_tokens, copies=2))

    def scoring(self) -> float:
        """Cross-entropy, then the backward pass of a part of the blocks, at last that of the sequences."""
        trains_head, gathered = self.model.trainable_parameters is None, self.gathered
        # The gradient of the head: the sum so far, and the gradient that is added to it.
        width = self.step.weight_bytes if self.step.shards == 1 else self.step.compute_bytes
        head = 2 * width * self.model.head_parameters if trains_head else 0
        truth = head + self.logits(self.prefix_tokens, copies=2)
        sequences = gathered.backward + self.differentiating(self.prefix_tokens, blocks=False)
        sequences += gathered.head_gradient if self.step.method == "sft" else 0
        # What the sequences need is gone when their gradients are complete; that of blocks is not.
        end = gathered.end - (0 if self.block_tokens else self.prefix())
        return gathered.outside + max(truth, self._part(head), sequences, end)

    def _part(self, head: int) -> float:
        model, step, n_tokens = self.model, self.step, self.block_tokens
        if step.differentiable_rollouts:
            # Each weight is used in every pass; its gradients wait for one another, while the last pass is let go.
            length, graph = step.completion_length - 1, self.graph()
            later, gradients = graph * (length - 1) // max(length, 1), step.weight_bytes * model.n_trainable
            decoding, logits = self.differentiating(self.blocks, blocks=True), self.logits(self.blocks, copies=2)
            if length > 0 and self.plan == MicroBatchPlan.whole(step):
                # A step's only part: what waits becomes its gradients. The head has one of cross-entropy already.
                before = head // 2 if step.gamma > 0 else 0
                return before + max(graph - gradients, later) + max(head // 2 + logits, decoding)
            waiting = gradients + later if length > 1 else 0
            return max(graph, waiting) + max(head + logits, decoding)
        backward = self.gathered.backward + self.gathered.head_gradient + self.differentiating(n_tokens, blocks=True)
        return self.scored() + max(head + self.logits(n_tokens, copies=2), backward)

    def scored(self) -> int:
        """Bytes that scoring the blocks of a part again saves for its backward pass."""
        n_tokens = self.block_tokens
        kept = n_tokens * self.saved(blocks=True)
        if self.limits.fused_attention and n_tokens:
            kept += self.copied
        return kept


# --- the largest plan that fits --------------------------------------------------------------------------------


def largest_plan(
    model: ModelShape,
    features: ModelShape,
    step: StepShape,
    *,
    budget_bytes: float,
    limits: Limits = GPU_LIMITS,
    given: tuple[int | None, int | None] = (None, None),
) -> MicroBatchPlan:
    """The best plan whose peak memory fits into `budget_bytes` on one worker; depends on its arguments alone.

    On a GPU the one with the least predicted time (`step_seconds`). On a CPU the one with the fewest passes: all
    sequences and all anchors if that fits; otherwise fewer anchors at a time, while a pass still has
    `EFFICIENT_BLOCK_TOKENS`; otherwise fewer sequences, with as many anchors as fit; at last fewer anchors still.

    Args:
        given: micro_batch_size and anchors_at_once where the user has chosen them.

    Raises:
        ConfigError: not even one sequence and one anchor at a time fit, or the sizes that the user has chosen do not.
    """
    launches, fitting = limits.fused_attention, list[MicroBatchPlan]()
    for plan in _all_plans(step, given) if launches else _plans(step, given):
        needed = memory(model, features, step, plan, limits=limits)
        if needed.peak_bytes <= budget_bytes:
            fitting.append(plan)
            if not launches:
                break
    if not fitting:
        raise _does_not_fit(needed, step, plan, budget_bytes)
    return min(fitting, key=lambda plan: step_seconds(model, features, step, plan, limits=limits))


def _all_plans(step: StepShape, given: tuple[int | None, int | None]) -> Iterator[MicroBatchPlan]:
    """Candidates, from the largest to the smallest."""
    whole = MicroBatchPlan.whole(step)
    for S in _choices(whole.micro_batch_size, given[0]):
        for A in _choices(whole.anchors_at_once, given[1]):
            yield MicroBatchPlan(S, A)


def _plans(step: StepShape, given: tuple[int | None, int | None]) -> Iterator[MicroBatchPlan]:
    """Candidates, from the preferred one to the smallest."""
    whole = MicroBatchPlan.whole(step)
    tokens_per_anchor = step.n_samples * (1 if step.differentiable_rollouts else step.completion_length - 1)
    sizes = list(_choices(whole.micro_batch_size, given[0]))
    for S in sizes:
        for A in _choices(whole.anchors_at_once, given[1]):
            widest = min(whole.anchors_at_once, given[1] or whole.anchors_at_once)
            efficient = S * A * tokens_per_anchor >= EFFICIENT_BLOCK_TOKENS
            if efficient or sizes[-1] == S or widest == A:
                yield MicroBatchPlan(S, A)


def _choices(count: int, given: int | None) -> Iterator[int]:
    if given is not None:
        yield min(given, count)
        return
    while count > 1:
        yield count
        count = -(-count // 2)
    yield 1


def _does_not_fit(least: Memory, step: StepShape, plan: MicroBatchPlan, budget_bytes: float) -> ConfigError:
    remedies = {
        "a smaller anchors_at_once": plan.anchors_at_once > 1,
        "a smaller micro_batch_size": plan.micro_batch_size > 1,
        "a shorter sequence_length": True,
        "fewer n_samples": step.method != "sft",
        "a shorter completion_length": step.method == "ebft" and not step.whole_answers,
        "a smaller max_answer_tokens": step.whole_answers,
        "activation_checkpointing=true": not step.activation_checkpointing,
        "precision=bfloat16": step.precision == "float32",
        "a smaller judge": step.judge_parameters > 0,
        "sharding=fsdp with more workers_per_trial": step.shards == 1,
        "more workers_per_trial": step.shards > 1,
    }
    useful = ", ".join(remedy for remedy, helps in remedies.items() if helps)
    needed, lasting, budget = (b / 2**30 for b in (least.peak_bytes, least.phases_bytes["optimizer"], budget_bytes))
    return ConfigError(
        f"memory={budget:.3g} GiB: one optimizer step needs {needed:.3g} GiB with "
        f"micro_batch_size={plan.micro_batch_size} and anchors_at_once={plan.anchors_at_once}; {lasting:.3g} GiB of "
        f"them are weights, gradients, optimizer states and frozen networks. Use {useful}, lora_rank, "
        "or a smaller model"
    )
