"""Forward passes of a Hugging Face causal LM over a shared prefix and many completion blocks.

The model's own code runs unchanged; only its attention function is replaced, through the registry of
transformers. A description of the pass reaches the attention function as a keyword.

    run_prefix   x[0:T]                     -> keys and values of the prefix, once for all samples of all anchors
    run_blocks   L tokens of every block    -> each attends to its own context (from the prefix) and to its own block
    Decoder      one more token per block, again and again, against the same prefix

A completion token never changes anything before it. So one prefix serves sampling and scoring alike, blocks can be run
in any number of parts, and their gradients into the prefix add up until it is differentiated, once (`Prefix.leaves`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ebft_study.algorithm import log_probs
from ebft_study.algorithm.anchors import Anchors, Contexts, contexts_of, document_positions, gather_rows
from ebft_study.algorithm.attention import block_attention, plan_chunks, prefix_attention, prefix_mask
from ebft_study.algorithm.flex_attention import flex_block_attention, flex_mask
from ebft_study.errors import ModelError

ATTENTION = "ebft_blocks"
"""Name under which the attention function is registered with transformers."""

Backend = Literal["auto", "chunked", "flex"]
"""Implementation of attention. `auto`: `flex` on a GPU, `chunked` elsewhere."""

LONGEST_FUSED = 16
"""Tokens of the longest blocks that are decoded by `flex`: every earlier token costs a tile of 128 x 128 scores, of
which few are used. Longer ones are decoded in chunks."""

KeysValues = dict[int, tuple[Tensor, Tensor]]
"""Layer -> keys and values."""


def logits_at_once(device: torch.device) -> int:
    """Logits in memory at a time."""
    return 2**28 if device.type == "cuda" else 2**24


def backend_on(device: torch.device) -> Backend:
    """Implementation of attention that `auto` stands for."""
    return "flex" if device.type == "cuda" else "chunked"


def _scores_at_once(device: torch.device) -> int:
    # On a CPU what belongs to a chunk should stay in its cache; a GPU wants few large kernels.
    return 2**28 if device.type == "cuda" else 2**20


class AttentionVariant(NamedTuple):
    """The properties of a layer's attention that change its result."""

    scaling: float
    window: int | None = None
    """Tokens that a query sees, itself included."""
    softcap: float | None = None

    def among(self, n_tokens: int) -> AttentionVariant:
        """The same attention over at most `n_tokens` tokens, where a longer window hides nothing."""
        return self._replace(window=None) if self.window is not None and self.window >= n_tokens else self


class Pass(Protocol):
    """Description of a pass, for the attention function."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, variant: AttentionVariant) -> Tensor:
        """Outputs [S, Hq, M, D] of one layer for the pass's M tokens."""
        ...


# --- the prefix ------------------------------------------------------------------------------------------------


@dataclass
class Prefix:
    """Sequences that were run once: last hidden states [S, T, H], and keys and values [S, Hk, T, D] of every layer."""

    document_ids: Tensor
    states: Tensor
    keys_values: KeysValues

    def leaves(self) -> Prefix:
        """The same prefix, detached from its graph; it collects the gradients of all that use it."""
        cut = {layer: (_leaf(key), _leaf(value)) for layer, (key, value) in self.keys_values.items()}
        return Prefix(self.document_ids, _leaf(self.states), cut)

    def backward(self, leaves: Prefix) -> None:
        """Send the gradients that `leaves` collected through the prefix."""
        ours = [self.states, *(tensor for pair in self.keys_values.values() for tensor in pair)]
        theirs = [leaves.states, *(tensor for pair in leaves.keys_values.values() for tensor in pair)]
        used = [(own, leaf.grad) for own, leaf in zip(ours, theirs, strict=True) if leaf.grad is not None]
        if used:
            torch.autograd.backward([own for own, _ in used], [gradient for _, gradient in used])


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


class _PrefixPass:
    def __init__(self, document_ids: Tensor) -> None:
        self.document_ids = document_ids
        self.masks: dict[int | None, Tensor | None] = {}
        self.keys_values: KeysValues = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, variant: AttentionVariant) -> Tensor:
        scaling, window, softcap = variant.among(self.document_ids.shape[1])
        if window not in self.masks:
            self.masks[window] = prefix_mask(self.document_ids, window)
        # Autocast leaves rotated keys in float32; cast here, they are not cast again in every pass against them.
        key = key.to(value.dtype)
        # Activation checkpointing runs a layer a second time; the first keys and values are the ones in use.
        self.keys_values.setdefault(layer, (key, value))
        return prefix_attention(query, key, value, mask=self.masks[window], scaling=scaling, softcap=softcap)


def run_prefix(model: nn.Module, tokens: Tensor, document_ids: Tensor) -> Prefix:
    """Run sequences [S, T] on their own; documents of a packed row do not see each other."""
    description = _PrefixPass(document_ids)
    states = _hidden_states(model, tokens, document_positions(document_ids), description)
    return Prefix(document_ids, states, description.keys_values)


# --- blocks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """N completion blocks per sequence, each after its own context."""

    contexts: Contexts
    _plans: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @staticmethod
    def of(document_ids: Tensor, anchors: Anchors, n_samples: int) -> Blocks:
        """`n_samples` blocks at every anchor, anchor-major: N = B * n."""
        bounds = contexts_of(document_ids, anchors)
        return Blocks(Contexts(*(bound.repeat_interleave(n_samples, dim=1) for bound in bounds)))

    def positions(self, start: int, length: int) -> Tensor:
        """Positions of block tokens `start .. start + length - 1`, [S, N * length], counted within their document."""
        first = self.contexts.end - self.contexts.start
        return (first[..., None] + start + torch.arange(length, device=first.device)).flatten(1)

    def plan(self, key: tuple[Any, ...], make: Any) -> Any:
        """Cached mask or chunks, which depend on the contexts and `key` alone: made once for all layers."""
        if key not in self._plans:
            self._plans[key] = make()
        return self._plans[key]


class _BlocksPass:
    """L tokens of every block, after the first `position` ones in `cache`, if there is one."""

    # Not a dataclass: sharding looks into dataclasses among a layer's arguments and replaces them by copies.
    def __init__(
        self, prefix: KeysValues, blocks: Blocks, backend: Backend, cache: _BlockCache | None = None, position: int = 0
    ) -> None:
        self.prefix, self.blocks, self.backend = prefix, blocks, backend
        self.cache, self.position = cache, position

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, variant: AttentionVariant) -> Tensor:
        N = self.blocks.contexts.end.shape[1]
        q, k, v = (states.unflatten(2, (N, -1)) for states in (query, key, value))
        attend = self._attend_fused if self._is_fused(q) else self._attend_in_chunks
        return attend(layer, q, k.to(v.dtype), v, variant).flatten(2, 3)

    def _is_fused(self, query: Tensor) -> bool:
        backend = backend_on(query.device) if self.backend == "auto" else self.backend
        return backend == "flex" and (self.cache is None or self.cache.capacity <= LONGEST_FUSED)

    def _attend_fused(self, layer: int, q: Tensor, k: Tensor, v: Tensor, variant: AttentionVariant) -> Tensor:
        prefix_key, prefix_value = self.prefix[layer]
        T, length, first = prefix_key.shape[2], q.shape[3], self.position
        scaling, window, softcap = variant.among(T + first + length)
        mask = self.blocks.plan(
            ("flex", length, first, window),
            lambda: flex_mask(self.blocks.contexts, n_prefix=T, length=length, first=first, window=window),
        )
        earlier = self.cache.tokens_before(layer, k, v, first) if self.cache is not None else ()
        return flex_block_attention(
            q, prefix_key, prefix_value, k, v, mask=mask, scaling=scaling, softcap=softcap, earlier=earlier
        )

    def _attend_in_chunks(self, layer: int, q: Tensor, k: Tensor, v: Tensor, variant: AttentionVariant) -> Tensor:
        length = q.shape[3]
        if self.cache is not None:
            k, v = self.cache.extend(layer, k, v, self.position)
        prefix_key, prefix_value = self.prefix[layer]
        scaling, window, softcap = variant.among(prefix_key.shape[2] + k.shape[3])
        rows, first = q.shape[1] * length, k.shape[3] - length
        scores = _scores_at_once(q.device)
        chunks = self.blocks.plan(
            ("chunks", rows, window, first if window else 0),
            lambda: plan_chunks(
                self.blocks.contexts, rows=rows, scores_at_once=scores, window=window, first=first, length=length
            ),
        )
        return block_attention(
            q, prefix_key, prefix_value, k, v, chunks=chunks, scaling=scaling, window=window, softcap=softcap
        )


def run_blocks(
    model: nn.Module, prefix: Prefix, blocks: Blocks, tokens: Tensor, *, backend: Backend = "auto"
) -> Tensor:
    """Run the L tokens of all blocks in one pass, [S, N, L] -> last hidden states [S, N, L, H]."""
    description = _BlocksPass(prefix.keys_values, blocks, backend)
    positions = blocks.positions(0, tokens.shape[2])
    states = _hidden_states(model, tokens.flatten(1), positions, description)
    return states.view(*tokens.shape, -1)


@dataclass
class _BlockCache:
    """Keys and values of the blocks' tokens so far: in buffers of their final size, or token by token.

    Activation checkpointing runs a token again after later ones were added: it attends to the same keys as before.
    """

    capacity: int
    buffers: KeysValues = field(default_factory=dict)
    tokens: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """Layer -> keys and values [S, Hk, N, D] of every token."""

    def extend(self, layer: int, key: Tensor, value: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Add token number `position`, [S, Hk, N, 1, D]; all of them up to it are returned."""
        if torch.is_grad_enabled():
            earlier = self.tokens_before(layer, key, value, position)
            keys, values = zip(*earlier, (key.squeeze(3), value.squeeze(3)), strict=True)
            return torch.stack(keys, dim=3), torch.stack(values, dim=3)
        if layer not in self.buffers:
            shape = (*key.shape[:3], self.capacity)
            self.buffers[layer] = (key.new_empty(*shape, key.shape[4]), value.new_empty(*shape, value.shape[4]))
        for buffer, token in zip(self.buffers[layer], (key, value), strict=True):
            buffer[:, :, :, position] = token[:, :, :, 0]
        key_buffer, value_buffer = self.buffers[layer]
        return key_buffer[:, :, :, : position + 1], value_buffer[:, :, :, : position + 1]

    def tokens_before(self, layer: int, key: Tensor, value: Tensor, position: int) -> list[tuple[Tensor, Tensor]]:
        """Add token number `position`, [S, Hk, N, 1, D]; those before it are returned."""
        earlier = self.tokens.setdefault(layer, [])
        if position == len(earlier):
            earlier.append((key.squeeze(3), value.squeeze(3)))
        return earlier[:position]

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the sequences, [S] bool."""
        self.buffers = {layer: (k[rows], v[rows]) for layer, (k, v) in self.buffers.items()}
        self.tokens = {layer: [(k[rows], v[rows]) for k, v in of] for layer, of in self.tokens.items()}


class Decoder:
    """Advances all blocks, one token at a time, against one prefix."""

    def __init__(
        self, model: nn.Module, prefix: Prefix, blocks: Blocks, capacity: int, *, backend: Backend = "auto"
    ) -> None:
        """`capacity`: how many tokens will be run at most."""
        self.model, self.prefix, self.blocks, self.backend = model, prefix, blocks, backend
        self.cache, self.length = _BlockCache(capacity), 0

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the sequences, [S] bool; without gradients."""
        kept = {layer: (key[rows], value[rows]) for layer, (key, value) in self.prefix.keys_values.items()}
        self.prefix = replace(self.prefix, keys_values=kept)
        self.blocks = Blocks(Contexts(*(bound[rows] for bound in self.blocks.contexts)))
        self.cache.keep(rows)

    def advance(self, tokens: Tensor) -> Tensor:
        """Run the next token of every block, [S, N] -> last hidden states [S, N, H]."""
        description = _BlocksPass(self.prefix.keys_values, self.blocks, self.backend, self.cache, self.length)
        states = _hidden_states(self.model, tokens, self.blocks.positions(self.length, 1), description)
        self.length += 1
        return states


# --- through transformers --------------------------------------------------------------------------------------


_WITHOUT_EFFECT = {
    "use_cache",
    "position_ids",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
}
"""Arguments that models pass on to their attention function and that change nothing in its output."""


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    block_pass: Pass | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    _refuse_unknown(others)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    if block_pass is None:  # an ordinary forward pass; a window is in its mask
        if softcap is None:
            plain, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=factor)
            return plain, None
        output = prefix_attention(query, key, value, mask=attention_mask, scaling=factor, softcap=softcap)
        return output.transpose(1, 2).contiguous(), None
    variant = AttentionVariant(factor, sliding_window or _window_of_layer(module), softcap)
    output = block_pass.attend(int(module.layer_idx), query, key, value, variant)  # type: ignore[arg-type]
    return output.transpose(1, 2).contiguous(), None


def _window_of_layer(module: nn.Module) -> int | None:
    """The window of a layer whose model describes it in its configuration alone, as Qwen2-MoE does."""
    config: Any = module.config
    layer_types = getattr(config, "layer_types", None)
    if layer_types and layer_types[int(module.layer_idx)] == "sliding_attention":  # type: ignore[arg-type]
        return int(config.sliding_window)
    return None


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    """Refuse a model whose attention depends on what block attention does not know; nothing is ignored silently."""
    for name, value in arguments.items():
        is_off = value is None or (isinstance(value, bool | int | float) and not value)
        if name == "is_causal" and value is not None:
            is_off = bool(value)
        if not is_off and name not in _WITHOUT_EFFECT:
            raise ModelError(f"its attention depends on {name!r}, which block attention does not support")


AttentionInterface.register(ATTENTION, _attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _hidden_states(model: nn.Module, tokens: Tensor, positions: Tensor, description: Pass) -> Tensor:
    """Last hidden states (after the final norm) of one pass: tokens [S, M] at `positions` [S, M] -> [S, M, H]."""
    body = model.get_decoder()  # type: ignore[operator]
    # A four-dimensional mask is used unchanged; without one, transformers would read the positions as packed
    # sequences and build a dense mask that the attention function then ignores.
    placeholder = torch.empty(1, 1, 1, 1, device=tokens.device)
    output = body(
        input_ids=tokens,
        attention_mask=placeholder,
        position_ids=positions,
        use_cache=False,
        block_pass=description,
    )
    return output.last_hidden_state  # type: ignore[no-any-return]


class DecoderNames(NamedTuple):
    """Attributes of a decoder."""

    layers: str
    norm: str
    """The norm after the last layer."""


def decoder_names(model: nn.Module) -> DecoderNames:
    """The names that an architecture gives to the list of its layers and to its last norm.

    Raises:
        ModelError: it has no such parts.
    """
    body = model.get_decoder()  # type: ignore[operator]
    layers = next(
        (name for name in ("layers", "h", "blocks") if isinstance(getattr(body, name, None), nn.ModuleList)), None
    )
    norms = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")
    norm = next((name for name in norms if isinstance(getattr(body, name, None), nn.Module)), None)
    if layers is None or norm is None:
        raise ModelError("its decoder is not a list of layers with a norm after them")
    return DecoderNames(layers, norm)


@contextmanager
def captured_layers(model: nn.Module, indices: list[int]) -> Iterator[dict[int, Tensor]]:
    """Collect `hidden_states[i]` for the given indices (i >= 1: output of layer i - 1) of the last pass run inside."""
    layers = getattr(model.get_decoder(), decoder_names(model).layers)  # type: ignore[operator]
    captured: dict[int, Tensor] = {}
    handles = []
    for index in indices:

        def keep(_module: nn.Module, _inputs: Any, output: Any, index: int = index) -> None:
            captured[index] = output[0] if isinstance(output, tuple) else output

        handles.append(layers[index - 1].register_forward_hook(keep))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def mlp_only_at(layer: nn.Module, rows: Tensor) -> Iterator[None]:
    """Context in which `layer` computes its MLP for the tokens `rows` [K] of a pass; its output is undefined elsewhere.

    For the last layer of a pass of which few tokens are read: most of a layer's work is in its MLP. A layer without
    one under that name computes everything.
    """
    mlp = getattr(layer, "mlp", None)
    if mlp is None:
        yield
        return
    shapes: list[torch.Size] = []

    def choose(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shapes.append(inputs[0].shape)
        return (inputs[0][:, rows], *inputs[1:])

    def put_back(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        states, *others = output if isinstance(output, tuple) else (output,)  # experts return their routing, too
        states = states.new_zeros(*shapes.pop()[:2], states.shape[-1]).index_copy_(1, rows, states)
        return (states, *others) if isinstance(output, tuple) else states

    handles = mlp.register_forward_pre_hook(choose), mlp.register_forward_hook(put_back)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- the head --------------------------------------------------------------------------------------------------


def _head(model: nn.Module, temperature: float) -> dict[str, Any]:
    """Weights of the head, and the factor and bound that some models apply to their logits (Cohere, Granite, Gemma)."""
    head, config = model.get_output_embeddings(), model.config  # type: ignore[operator]
    factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return {
        "weight": head.weight,
        "bias": head.bias,
        "temperature": temperature / factor,
        "softcap": None if softcap is None else softcap / factor,
    }


def token_log_probs(model: nn.Module, states: Tensor, tokens: Tensor, *, temperature: float) -> Tensor:
    """`log softmax(head(states) / temperature)[tokens]` in float32.

    Args:
        states: [..., H].
        tokens: [...], one token per state, or [..., m], several tokens of each state's distribution.
    """
    several = tokens.dim() == states.dim()
    values = log_probs.token_log_probs(
        states.flatten(0, -2),
        tokens=tokens.reshape(-1, tokens.shape[-1] if several else 1),
        logits_at_once=logits_at_once(states.device),
        **_head(model, temperature),
    )
    return values.view(tokens.shape)


def next_token_log_probs(model: nn.Module, states: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of x_1 .. x_{T-1} at temperature 1: states [S, T, H] of tokens [S, T] -> [S, T-1]."""
    return token_log_probs(model, states[:, :-1], tokens[:, 1:], temperature=1.0)


def sample_tokens(
    model: nn.Module, states: Tensor, noise: Tensor, *, temperature: float, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw tokens from the distributions after `states`: [..., H] and noise [..., m] -> tokens, log-probs [..., m].

    The log-probabilities carry gradients where these are enabled; they are those of the whole distribution.
    """
    drawn = log_probs.sample_tokens(
        states.flatten(0, -2),
        noise=noise.flatten(0, -2),
        logits_at_once=logits_at_once(states.device),
        top_p=top_p,
        **_head(model, temperature),
    )
    tokens, scored = (values.view(noise.shape) for values in drawn)
    return tokens, scored


def states_before(prefix: Prefix, anchors: Anchors) -> Tensor:
    """States that predict the first token of every completion, one for all samples of an anchor: [S, B, H]."""
    return gather_rows(prefix.states, (anchors.positions - 1).clamp(min=0))


def completion_log_probs(
    model: nn.Module,
    prefix: Prefix,
    anchors: Anchors,
    completions: Tensor,
    *,
    temperature: float,
    backend: Backend = "auto",
) -> Tensor:
    """Log-probabilities of completion tokens, [S, B, n, G] int64 -> [S, B, n, G] float32, with gradient.

    The first token of all n samples shares one distribution; the last one predicts nothing, so it is not run.
    """
    n, G = completions.shape[2:]
    first = token_log_probs(model, states_before(prefix, anchors), completions[..., 0], temperature=temperature)[
        ..., None
    ]
    if G == 1:
        return first
    blocks = Blocks.of(prefix.document_ids, anchors, n)
    inputs = completions[..., :-1].flatten(1, 2)
    states = run_blocks(model, prefix, blocks, inputs, backend=backend).unflatten(1, (-1, n))
    return torch.cat([first, token_log_probs(model, states, completions[..., 1:], temperature=temperature)], dim=-1)
