"""The published way of computing an EBFT step: correct, obvious and wasteful.

Every pass calls the whole model, logits of all tokens included, on the whole sequence with all its blocks, repeated
for each of the n samples, behind a dense mask; sampling does so at each of the G decoding steps; the feature network
likewise; features are whitened by a batched SVD. Two things flatter it: the mask is built by tensor operations rather
than loops, and attention is PyTorch's fused one rather than matrices of probabilities (`attending` gives these).

This is the one slow implementation of a whole step, and it is timed. The tests' references (`tests/references`) are
too slow for that: they run one context at a time, without masks or batches, so that agreement with them is evidence.

Letters as in `algorithm`; M = T + B * L tokens of a sequence with L tokens per block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.settings import Attention
from ebft_study.algorithm.anchors import Anchors, completion_positions, document_positions, gather_rows
from ebft_study.algorithm.features import feature_map, layer_indices
from ebft_study.algorithm.sampling import draw
from ebft_study.algorithm.whitening import RELATIVE_TOLERANCE
from ebft_study.data import Batch


def dense_mask(document_ids: Tensor, anchors: Anchors, length: int) -> Tensor:
    """Attention mask over `[x ; B blocks of `length` tokens]`, [S, 1, M, M] bool with M = T + B * length."""
    T, B = document_ids.shape[1], anchors.positions.shape[1]
    index = torch.arange(T + B * length, device=document_ids.device)
    in_block = index >= T
    block = torch.where(in_block, (index - T) // max(length, 1), 0)
    # A prefix token attends to the prefix up to itself, a block token to the prefix before its anchor.
    ends = torch.where(in_block, anchors.positions[:, block] if B else 0, index + 1)
    document = torch.where(
        in_block,
        document_ids.gather(1, anchors.positions)[:, block] if B else 0,
        document_ids[:, index.clamp(max=T - 1)],
    )
    same = document[:, :, None] == document[:, None, :]
    prefix = ~in_block & (index[None, None, :] < ends[..., None]) & same
    own = in_block[:, None] & in_block & (block[:, None] == block) & (index <= index[:, None])
    return (prefix | own)[:, None]


@contextmanager
def attending(attention: Attention, *models: PreTrainedModel) -> Iterator[None]:
    """Set the attention of the models; `eager` is with matrices of probabilities, as in the published code."""
    before = [model.config._attn_implementation for model in models]
    for model in models:
        if attention == "eager":
            model.config._attn_implementation = attention
    try:
        yield
    finally:
        for model, implementation in zip(models, before, strict=True):
            model.config._attn_implementation = implementation


@dataclass(frozen=True)
class _Copies:
    """A batch repeated n times, sample-minor: row s * n + j is sample j of sequence s."""

    tokens: Tensor
    document_ids: Tensor
    anchors: Anchors
    n_samples: int

    @staticmethod
    def of(batch: Batch, anchors: Anchors, n: int) -> _Copies:
        repeated = Anchors(*(tensor.repeat_interleave(n, 0) for tensor in anchors))
        return _Copies(batch.tokens.repeat_interleave(n, 0), batch.document_ids.repeat_interleave(n, 0), repeated, n)

    def spread(self, completions: Tensor) -> Tensor:
        """[S, B, n, L] -> [S * n, B, L]."""
        return completions.transpose(1, 2).flatten(0, 1)

    def gather(self, values: Tensor) -> Tensor:
        """[S * n, B, ...] -> [S, B, n, ...]."""
        gathered: Tensor = values.unflatten(0, (-1, self.n_samples)).transpose(1, 2)
        return gathered

    def run(self, model: Any, blocks: Tensor, *, hidden: bool = False) -> Any:
        """The model's output for `[x ; blocks]`, [S * n, T + B * L] tokens."""
        length = blocks.shape[2]
        mask = dense_mask(self.document_ids, self.anchors, length)
        if model.config._attn_implementation == "eager":
            dtype = next(model.parameters()).dtype
            zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            mask = zeros.masked_fill_(~mask, torch.finfo(dtype).min)
        position = document_positions(self.document_ids)
        first = position.gather(1, self.anchors.positions)
        in_blocks = first[..., None] + torch.arange(length, device=first.device)
        return model(
            input_ids=torch.cat([self.tokens, blocks.flatten(1)], dim=1),
            attention_mask=mask,
            position_ids=torch.cat([position, in_blocks.flatten(1)], dim=1),
            use_cache=False,
            output_hidden_states=hidden,
        )

    def first_logits(self, logits: Tensor) -> Tensor:
        """Logits before the first token of every completion, [S * n, B, V]."""
        return gather_rows(logits, (self.anchors.positions - 1).clamp(min=0))

    def of_blocks(self, values: Tensor, length: int) -> Tensor:
        """The part of [S * n, T + B * L, X] that belongs to the blocks, [S * n, B, L, X]."""
        blocks: Tensor = values[:, self.tokens.shape[1] :].unflatten(1, (self.anchors.positions.shape[1], length))
        return blocks


@torch.no_grad()
def naive_rollouts(model: nn.Module, batch: Batch, anchors: Anchors, noise: Tensor, temperature: float) -> Tensor:
    """Completions [S, B, n, G], the whole of `[x ; tokens so far]` run again for every token."""
    n, G = noise.shape[2:]
    copies = _Copies.of(batch, anchors, n)
    uniforms = copies.spread(noise.to(batch.tokens.device))
    completions = torch.empty(*uniforms.shape[:2], 0, dtype=torch.long, device=batch.tokens.device)
    for t in range(G):
        logits = copies.run(model, completions).logits
        last = copies.of_blocks(logits, t)[:, :, -1] if t else copies.first_logits(logits)
        token = draw((last.float() / temperature).softmax(dim=-1), uniforms[..., t : t + 1])
        completions = torch.cat([completions, token], dim=-1)
    return copies.gather(completions)


@torch.no_grad()
def naive_features(
    network: nn.Module, batch: Batch, anchors: Anchors, completions: Tensor, depths: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """phi [S, B, n, d] and psi [S, B, d] with `last_token` pooling, from all layers of the whole network."""
    copies, G = _Copies.of(batch, anchors, completions.shape[2]), completions.shape[3]
    states = copies.run(network, copies.spread(completions), hidden=True).hidden_states
    layers = [states[i] for i in layer_indices(depths, len(states) - 1)]
    at = completion_positions(copies.anchors, G, batch.tokens.shape[1])
    sampled, real = [copies.of_blocks(h, G) for h in layers], [gather_rows(h, at) for h in layers]
    phi, psi = (feature_map(parts, pooling="last_token", normalize="per_layer") for parts in (sampled, real))
    return copies.gather(phi), copies.gather(psi)[:, :, 0]


def naive_whitened(phi: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    """`(Sigma^+)^(1/2)` applied to phi [..., n, d] and psi [..., d], from an SVD of each context's features (8)."""
    n = phi.shape[-2]
    _, singular, directions = torch.linalg.svd(phi, full_matrices=False)
    counts = singular > RELATIVE_TOLERANCE * singular[..., :1]
    scale = torch.where(counts, n**0.5 / torch.where(counts, singular, 1.0), 0.0)

    def whiten(vectors: Tensor) -> Tensor:
        whitened: Tensor = ((vectors @ directions.transpose(-1, -2)) * scale[..., None, :]) @ directions
        return whitened

    return whiten(phi), whiten(psi[..., None, :])[..., 0, :]


def naive_rewards(phi: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    """Alignment and diversity [..., n] of `variant_i` (9), from the whitened features [..., n, d] themselves."""
    samples, target = naive_whitened(phi, psi)
    alignment = F.cosine_similarity(samples, target[..., None, :], dim=-1)
    pairs = samples @ samples.transpose(-1, -2)
    others = pairs.sum(dim=-1) - pairs.diagonal(dim1=-2, dim2=-1)
    return 2.0 * alignment, 2.0 * others / (phi.shape[-2] - 1)


def naive_logits(model: nn.Module, batch: Batch, anchors: Anchors, completions: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 logits before every token of completions [S, B, n, G] and of the ground truth: [S, B, n, G, V] and
    [S, T - 1, V], cut out of the logits of all tokens."""
    copies = _Copies.of(batch, anchors, completions.shape[2])
    logits = copies.run(model, copies.spread(completions)).logits.float()
    later = copies.of_blocks(logits, completions.shape[3])[:, :, :-1]
    sampled = torch.cat([copies.first_logits(logits)[:, :, None], later], dim=2)
    return copies.gather(sampled), logits[:: copies.n_samples, : batch.tokens.shape[1] - 1]


def naive_log_probs(
    model: nn.Module, batch: Batch, anchors: Anchors, completions: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of completions [S, B, n, G] at `temperature`, and of the ground truth [S, T - 1] at 1."""
    sampled, truth = naive_logits(model, batch, anchors, completions)
    sampled, truth = (sampled / temperature).log_softmax(dim=-1), truth.log_softmax(dim=-1)
    return (
        sampled.gather(-1, completions[..., None])[..., 0],
        truth.gather(-1, batch.tokens[:, 1:, None])[..., 0],
    )
