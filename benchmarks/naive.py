"""The published way of computing an EBFT step, to compare with: correct, and wasteful.

Every pass calls the whole model, logits of all tokens included, on the whole sequence with all its blocks, repeated
for each of the n samples, behind a dense mask; sampling does so at each of the G decoding steps; the feature network
likewise; features are whitened by a batched SVD. Two things flatter it: the mask is built by tensor operations rather
than loops, and attention is PyTorch's fused one rather than matrices of probabilities (`attending` gives these).

Letters as in `algorithm`; M = T + B * L tokens of a sequence with L tokens per block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ebft_study.algorithm.advantages import feature_matching_advantages
from ebft_study.algorithm.anchors import Anchors, completion_positions, document_positions, gather_rows
from ebft_study.algorithm.features import feature_map, layer_indices
from ebft_study.algorithm.losses import cross_entropy_loss, next_token_mask, policy_gradient_loss
from ebft_study.algorithm.sampling import draw
from ebft_study.algorithm.whitening import RELATIVE_TOLERANCE
from ebft_study.config import RunConfig
from ebft_study.data import Batch
from ebft_study.methods import LossDenominators, differentiate

Attention = Literal["sdpa", "eager"]


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


def dense_mask(document_ids: Tensor, anchors: Anchors, length: int) -> Tensor:
    """Who may attend to whom in `[x ; B blocks of `length` tokens]`, [S, 1, M, M] bool with M = T + B * length."""
    T, B = document_ids.shape[1], anchors.positions.shape[1]
    index = torch.arange(T + B * length, device=document_ids.device)
    in_block = index >= T
    block = torch.where(in_block, (index - T) // max(length, 1), 0)
    # For a prefix token, what it sees of the prefix ends with itself; for a block token, before its anchor.
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
    """Inside, the models attend as named; `eager` is with matrices of probabilities, as in the published code."""
    before = [model.config._attn_implementation for model in models]
    for model in models:
        if attention == "eager":
            model.config._attn_implementation = attention
    try:
        yield
    finally:
        for model, own in zip(models, before, strict=True):
            model.config._attn_implementation = own


def _mask(model: Any, copies: _Copies, length: int) -> Tensor:
    mask = dense_mask(copies.document_ids, copies.anchors, length)
    if model.config._attn_implementation != "eager":
        return mask
    dtype = next(model.parameters()).dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _run(model: nn.Module, copies: _Copies, blocks: Tensor, *, hidden: bool = False) -> Any:
    """The model's output for `[x ; blocks]`, [S * n, T + B * L] tokens."""
    length = blocks.shape[2]
    position = document_positions(copies.document_ids)
    first = position.gather(1, copies.anchors.positions)
    positions = torch.cat([position, (first[..., None] + torch.arange(length, device=first.device)).flatten(1)], dim=1)
    return model(
        input_ids=torch.cat([copies.tokens, blocks.flatten(1)], dim=1),
        attention_mask=_mask(model, copies, length),
        position_ids=positions,
        use_cache=False,
        output_hidden_states=hidden,
    )


def _first_logits(logits: Tensor, copies: _Copies) -> Tensor:
    """Logits before the first token of every completion, [S * n, B, V]."""
    return gather_rows(logits, (copies.anchors.positions - 1).clamp(min=0))


def _of_blocks(values: Tensor, copies: _Copies, length: int) -> Tensor:
    """The part of [S * n, T + B * L, X] that belongs to the blocks, [S * n, B, L, X]."""
    blocks: Tensor = values[:, copies.tokens.shape[1] :].unflatten(1, (copies.anchors.positions.shape[1], length))
    return blocks


@torch.no_grad()
def naive_rollouts(model: nn.Module, batch: Batch, anchors: Anchors, noise: Tensor, temperature: float) -> Tensor:
    """Completions [S, B, n, G], the whole of `[x ; tokens so far]` run again for every token."""
    n, G = noise.shape[2:]
    copies = _Copies.of(batch, anchors, n)
    each = copies.spread(noise.to(batch.tokens.device))
    drawn = torch.empty(*each.shape[:2], 0, dtype=torch.long, device=batch.tokens.device)
    for t in range(G):
        logits = _run(model, copies, drawn).logits
        last = _of_blocks(logits, copies, t)[:, :, -1] if t else _first_logits(logits, copies)
        token = draw((last.float() / temperature).softmax(dim=-1), each[..., t : t + 1])
        drawn = torch.cat([drawn, token], dim=-1)
    return copies.gather(drawn)


@torch.no_grad()
def naive_features(
    network: nn.Module, batch: Batch, anchors: Anchors, completions: Tensor, depths: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """phi [S, B, n, d] and psi [S, B, d] with `last_token` pooling, from all layers of the whole network."""
    copies = _Copies.of(batch, anchors, completions.shape[2])
    states = _run(network, copies, copies.spread(completions), hidden=True).hidden_states
    layers = [states[i] for i in layer_indices(depths, len(states) - 1)]
    G = completions.shape[3]
    sampled = [_of_blocks(h, copies, G) for h in layers]
    at = completion_positions(copies.anchors, G, batch.tokens.shape[1])
    real = [gather_rows(h, at) for h in layers]
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
    logits = _run(model, copies, copies.spread(completions)).logits.float()
    later = _of_blocks(logits, copies, completions.shape[3])[:, :, :-1]
    sampled = torch.cat([_first_logits(logits, copies)[:, :, None], later], dim=2)
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


def naive_backward(
    model: nn.Module,
    network: nn.Module,
    batch: Batch,
    anchors: Anchors,
    *,
    noise: Tensor,
    denominators: LossDenominators,
    config: RunConfig,
    completions: Tensor | None = None,
) -> float:
    """Add the gradient of these sequences' share of the loss to the parameters; returns that share.

    Args:
        network: the whole feature network; features are pooled and normalised as the paper does.
        config: whitening is `variant_i` and there is no KL term, whatever it says; n_samples >= 2.
        completions: [S, B, n, G] to be scored instead of what `noise` [S, B, n, G] would draw.
    """
    temperature, alpha = config.rollout.temperature, config.reward.alpha
    if completions is None:
        completions = naive_rollouts(model, batch, anchors, noise, temperature)
    phi, psi = naive_features(network, batch, anchors, completions, config.features.depths)
    with torch.autocast(phi.device.type, enabled=False):
        rewards = naive_rewards(phi, psi)
    advantages = feature_matching_advantages(*rewards, alpha=alpha, baseline=config.reward.baseline)
    sampled, truth = naive_log_probs(model, batch, anchors, completions, temperature)
    policy = policy_gradient_loss(
        sampled,
        advantages,
        anchors.valid,
        aggregation=config.loss.aggregation,
        denominator=denominators.contexts * advantages.shape[-1],
    )
    mask = next_token_mask(batch.document_ids)
    cross_entropy = cross_entropy_loss(truth, mask, denominator=denominators.ce_tokens)
    return differentiate(policy + config.loss.gamma * cross_entropy)
