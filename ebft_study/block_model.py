"""One forward pass of a Hugging Face causal LM over a shared prefix and many completion blocks.

The model's own code runs unchanged; only its attention function is replaced, through the registry that transformers
offers for that purpose. A pass is described by a `BlockPass`, which travels to the attention function as a keyword.

    prefill  x[0:T]                      -> keys and values of the prefix are kept, once for all n samples
    decode   one token of every block    -> attends to its own context (from the prefix) and to its own block
    score    [x ; all n*B*G tokens]      -> both at once, with gradients
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ebft_study.algorithm.anchors import Anchors, context_mask, document_positions
from ebft_study.algorithm.attention import block_attention, prefix_attention, prefix_mask
from ebft_study.errors import ModelError

ATTENTION = "ebft_blocks"
"""Name under which the attention function is registered with transformers."""


@dataclass
class BlockPass:
    """What the attention function must know of one pass. `n_prefix` tokens come first, then N blocks of L tokens."""

    document_ids: Tensor
    """[S, T]"""
    anchors: Anchors
    n_samples: int
    n_prefix: int = 0
    """T when the pass runs the prefix, 0 when its keys are already cached."""
    keep: bool = False
    """Keep keys and values for later passes (sampling)."""
    prefix_cache: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    block_cache: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mask = prefix_mask(self.document_ids)
        self.context = context_mask(self.document_ids, self.anchors)
        self.prefix_positions = document_positions(self.document_ids)

    @property
    def n_blocks(self) -> int:
        return int(self.anchors.positions.shape[1]) * self.n_samples

    def block_positions(self, start: int, length: int) -> Tensor:
        """Positions of block tokens `start .. start+length-1`, [S, N * length], counted within their document."""
        first = self.prefix_positions.gather(1, self.anchors.positions).repeat_interleave(self.n_samples, dim=1)
        return (first[..., None] + start + torch.arange(length, device=first.device)).flatten(1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention outputs [S, Hq, n_prefix + N * L, D] of one layer."""
        outputs = []
        if self.n_prefix:
            prefix = tuple(tensor[:, :, : self.n_prefix] for tensor in (query, key, value))
            outputs.append(prefix_attention(*prefix, mask=self.mask, scaling=scaling))
            prefix_key, prefix_value = prefix[1:]
            if self.keep:
                self.prefix_cache[layer] = (prefix_key, prefix_value)
        else:
            prefix_key, prefix_value = self.prefix_cache[layer]
        if query.shape[2] > self.n_prefix:
            q, k, v = (self._as_blocks(tensor[:, :, self.n_prefix :]) for tensor in (query, key, value))
            if self.keep:
                k, v = self._extend(layer, k, v)
            blocks = block_attention(q, prefix_key, prefix_value, k, v, context=self.context, scaling=scaling)
            outputs.append(blocks.flatten(2, 3))
        return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]

    def _as_blocks(self, states: Tensor) -> Tensor:
        return states.reshape(*states.shape[:2], self.n_blocks, -1, states.shape[-1])

    def _extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.block_cache:
            old_key, old_value = self.block_cache[layer]
            key, value = torch.cat([old_key, key], dim=3), torch.cat([old_value, value], dim=3)
        self.block_cache[layer] = (key, value)
        return key, value


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    block_pass: BlockPass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if block_pass is None:
        output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output, weights
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = block_pass.attend(int(module.layer_idx), query, key, value, factor)  # type: ignore[arg-type]
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def hidden_states(model: nn.Module, tokens: Tensor, positions: Tensor, block_pass: BlockPass) -> Tensor:
    """Last hidden states (after the final norm) of one pass: tokens [S, M] at `positions` [S, M] -> [S, M, H]."""
    body = model.get_decoder()  # type: ignore[operator]
    # A four-dimensional mask is taken as it stands; without one, transformers would read the positions as packed
    # sequences and build a mask of size (T + N * G)^2 that the attention function then ignores.
    placeholder = torch.empty(1, 1, 1, 1, device=tokens.device)
    output = body(
        input_ids=tokens,
        attention_mask=placeholder,
        position_ids=positions,
        use_cache=False,
        block_pass=block_pass,
    )
    return output.last_hidden_state  # type: ignore[no-any-return]


def prefill(model: nn.Module, tokens: Tensor, block_pass: BlockPass) -> Tensor:
    """Run the prefix [S, T] once and keep its keys and values -> hidden states [S, T, H]."""
    block_pass.n_prefix, block_pass.keep = tokens.shape[1], True
    states = hidden_states(model, tokens, block_pass.prefix_positions, block_pass)
    block_pass.n_prefix = 0
    return states


def decode(model: nn.Module, tokens: Tensor, block_pass: BlockPass, *, step: int) -> Tensor:
    """Advance all blocks by their token `step` (0-based), [S, N] -> hidden states [S, N, H]. Needs `prefill`."""
    return hidden_states(model, tokens, block_pass.block_positions(step, 1), block_pass)


def score(model: nn.Module, tokens: Tensor, completions: Tensor, block_pass: BlockPass) -> tuple[Tensor, Tensor]:
    """One pass over `[x ; completions]`: [S, T] and [S, B, n, G] -> hidden states [S, T, H] and [S, B, n, G, H]."""
    T, G = tokens.shape[1], completions.shape[-1]
    block_pass.n_prefix = T
    everything = torch.cat([tokens, completions.flatten(1)], dim=1)
    positions = torch.cat([block_pass.prefix_positions, block_pass.block_positions(0, G)], dim=1)
    states = hidden_states(model, everything, positions, block_pass)
    return states[:, :T], states[:, T:].unflatten(1, completions.shape[1:])


@contextmanager
def captured_layers(model: nn.Module, indices: list[int]) -> Iterator[dict[int, Tensor]]:
    """Collect `hidden_states[i]` for the given indices (i >= 1: output of layer i - 1) of the passes run inside."""
    body = model.get_decoder()  # type: ignore[operator]
    captured: dict[int, Tensor] = {}
    handles = []
    for index in indices:

        def keep(_module: nn.Module, _inputs: Any, output: Any, index: int = index) -> None:
            captured[index] = output[0] if isinstance(output, tuple) else output

        handles.append(body.layers[index - 1].register_forward_hook(keep))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


_verified: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@torch.no_grad()
def verify(model: nn.Module, *, name: str) -> None:
    """Refuse a model whose block pass differs from its plain forward pass (sliding windows, soft-capping, ...).

    Raises:
        ModelError: naming the largest difference in logits.
    """
    if model in _verified:
        return
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    x = torch.randint(0, vocabulary, (1, 12), generator=generator).to(device)
    completion = torch.randint(0, vocabulary, (1, 2, 2, 3), generator=generator).to(device)
    anchors = Anchors(torch.tensor([[4, 7]], device=device), torch.ones(1, 2, dtype=torch.bool, device=device))
    block_pass = BlockPass(torch.zeros_like(x), anchors, n_samples=2)
    try:
        _, blocks = score(model, x, completion, block_pass)
    except (TypeError, AttributeError, KeyError) as error:
        raise ModelError(
            f"model {name!r}: its architecture does not run with block-parallel rollouts ({error}). "
            "Use a decoder-only model with standard attention, such as Qwen2, Qwen3, Llama or Mistral without windows"
        ) from error
    logits = model.get_output_embeddings()(blocks)  # type: ignore[operator]
    worst, scale = 0.0, 1.0
    for b, anchor in enumerate([4, 7]):
        for j in range(2):
            plain = model(torch.cat([x[:, :anchor], completion[:, b, j]], dim=1)).logits[:, anchor:]
            worst = max(worst, float((plain - logits[:, b, j]).abs().max()))
            scale = max(scale, float(plain.abs().max()))
    tolerance = 1e-3 if logits.dtype == torch.float32 else 5e-2
    if not worst <= tolerance * scale:
        raise ModelError(
            f"model {name!r}: block-parallel rollouts differ from a plain forward pass by {worst:.3g} in the logits. "
            "Its attention (sliding window, soft-capping, sinks?) is not supported; use another architecture"
        )
    _verified.add(model)


LOGITS_AT_ONCE = 2**26
"""Logits held at a time; more are computed in chunks and, in the backward pass, again."""


def token_log_probs(model: nn.Module, states: Tensor, tokens: Tensor, *, temperature: float) -> Tensor:
    """`log softmax(head(states) / temperature)[tokens]` in float32: [..., H] and [...] -> [...].

    Logits of more than `LOGITS_AT_ONCE` entries never exist at once, with gradients or without.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]

    def log_probs(chunk: Tensor, targets: Tensor) -> Tensor:
        # Without a bias, dividing the states is the same as dividing the logits, and there are far fewer of them.
        logits = head(chunk / temperature).float() if head.bias is None else head(chunk).float() / temperature
        return torch.gather(logits.log_softmax(dim=-1), -1, targets[..., None])[..., 0]

    flat, targets = states.flatten(0, -2), tokens.flatten()
    rows = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    if len(flat) <= rows:
        return log_probs(states, tokens)
    pieces = [
        checkpoint(log_probs, chunk, target, use_reentrant=False)
        for chunk, target in zip(flat.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(pieces).view(tokens.shape)


def completion_states(prefix: Tensor, blocks: Tensor, anchors: Anchors) -> Tensor:
    """States that predict each completion token, [S, B, n, G, H].

    Token 0 is predicted by the last token of the context (in `prefix` [S, T, H]), token t by token t - 1 of the block
    (in `blocks` [S, B, n, G - 1, H]).
    """
    n, H = blocks.shape[2], prefix.shape[-1]
    before = (anchors.positions - 1).clamp(min=0)[..., None].expand(-1, -1, H)
    first = prefix.gather(1, before)[:, :, None, None].expand(-1, -1, n, -1, -1)
    return torch.cat([first, blocks], dim=3)
