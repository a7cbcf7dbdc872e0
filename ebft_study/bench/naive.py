"""The published way of computing an EBFT step, to compare with: correct, and wasteful.

Every pass calls the whole model, logits of all tokens included, on the whole sequence with all its blocks, repeated
for each of the n samples, behind a dense mask; sampling does so at each of the G decoding steps; the feature network
likewise; features are whitened by a batched SVD. Two things flatter it: the mask is built by tensor operations rather
than loops, and attention is PyTorch's fused one rather than matrices of probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ebft_study.algorithm.advantages import feature_matching_advantages
from ebft_study.algorithm.anchors import Anchors, completions_at, document_positions
from ebft_study.algorithm.features import feature_map, layer_indices
from ebft_study.algorithm.losses import cross_entropy_loss, next_token_mask, policy_gradient_loss
from ebft_study.algorithm.rewards import feature_matching_rewards
from ebft_study.algorithm.sampling import draw
from ebft_study.algorithm.whitening import RELATIVE_TOLERANCE
from ebft_study.data import Batch


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
        return values.unflatten(0, (-1, self.n_samples)).transpose(1, 2)


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


def _run(model: nn.Module, copies: _Copies, blocks: Tensor, *, hidden: bool = False) -> Any:
    """The model's output for `[x ; blocks]`, [S * n, T + B * L] tokens."""
    length = blocks.shape[2]
    position = document_positions(copies.document_ids)
    first = position.gather(1, copies.anchors.positions)
    positions = torch.cat([position, (first[..., None] + torch.arange(length, device=first.device)).flatten(1)], dim=1)
    return model(
        input_ids=torch.cat([copies.tokens, blocks.flatten(1)], dim=1),
        attention_mask=dense_mask(copies.document_ids, copies.anchors, length),
        position_ids=positions,
        use_cache=False,
        output_hidden_states=hidden,
    )


def _predicting(logits: Tensor, copies: _Copies, length: int) -> Tensor:
    """Logits of completion tokens 0 .. length, [S * n, B, length + 1, V]."""
    T, V = copies.tokens.shape[1], logits.shape[-1]
    before = (copies.anchors.positions - 1).clamp(min=0)[..., None].expand(-1, -1, V)
    first = logits.gather(1, before)[:, :, None]
    return torch.cat([first, logits[:, T:].unflatten(1, (-1, length))], dim=2) if length else first


@torch.no_grad()
def naive_rollouts(model: nn.Module, batch: Batch, anchors: Anchors, noise: Tensor, temperature: float) -> Tensor:
    """Completions [S, B, n, G], the whole of `[x ; tokens so far]` run again for every token."""
    n, G = noise.shape[2:]
    copies = _Copies.of(batch, anchors, n)
    each = copies.spread(noise.to(batch.tokens.device))
    drawn = torch.empty(*each.shape[:2], 0, dtype=torch.long, device=batch.tokens.device)
    for t in range(G):
        logits = _predicting(_run(model, copies, drawn).logits, copies, t)[:, :, -1]
        token = draw((logits.float() / temperature).softmax(dim=-1), each[..., t : t + 1])
        drawn = torch.cat([drawn, token], dim=-1)
    return copies.gather(drawn)


@torch.no_grad()
def naive_features(
    network: nn.Module, batch: Batch, anchors: Anchors, completions: Tensor, depths: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """phi [S, B, n, d] and psi [S, B, d] with `last_token` pooling, from all layers of the whole network."""
    copies, T = _Copies.of(batch, anchors, completions.shape[2]), batch.tokens.shape[1]
    states = _run(network, copies, copies.spread(completions), hidden=True).hidden_states
    layers = [states[i] for i in layer_indices(depths, len(states) - 1)]
    G = completions.shape[3]
    sampled = [h[:, T:].unflatten(1, (-1, G)) for h in layers]
    index = torch.arange(T, device=batch.tokens.device).expand_as(copies.tokens)
    at = completions_at(index, copies.anchors, G)
    real = [
        h.gather(1, at.flatten(1)[..., None].expand(-1, -1, h.shape[-1])).unflatten(1, at.shape[1:]) for h in layers
    ]
    phi, psi = (feature_map(parts, pooling="last_token", normalize="per_layer") for parts in (sampled, real))
    return copies.gather(phi), copies.gather(psi)[:, :, 0]


def naive_whitened(phi: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    """`(Sigma^+)^(1/2)` applied to phi [..., n, d] and psi [..., d], from an SVD of each context's features (8)."""
    n = phi.shape[-2]
    _, singular, directions = torch.linalg.svd(phi, full_matrices=False)
    counts = singular > RELATIVE_TOLERANCE * singular[..., :1]
    scale = torch.where(counts, n**0.5 / torch.where(counts, singular, 1.0), 0.0)

    def whiten(vectors: Tensor) -> Tensor:
        return ((vectors @ directions.transpose(-1, -2)) * scale[..., None, :]) @ directions

    return whiten(phi), whiten(psi[..., None, :])[..., 0, :]


def naive_log_probs(
    model: nn.Module, batch: Batch, anchors: Anchors, completions: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of completions [S, B, n, G] and of the ground truth [S, T - 1], from logits of every token."""
    copies, T = _Copies.of(batch, anchors, completions.shape[2]), batch.tokens.shape[1]
    logits = _run(model, copies, copies.spread(completions)).logits.float()
    predicting = _predicting(logits, copies, completions.shape[3])[:, :, :-1]
    tempered = (predicting / temperature).log_softmax(dim=-1)
    sampled = tempered.gather(-1, copies.spread(completions)[..., None])[..., 0]
    truth = logits[:: copies.n_samples, : T - 1].log_softmax(dim=-1)
    return copies.gather(sampled), truth.gather(-1, batch.tokens[:, 1:, None])[..., 0]


def naive_step(
    model: nn.Module,
    network: nn.Module,
    batch: Batch,
    anchors: Anchors,
    noise: Tensor,
    *,
    temperature: float,
    alpha: float,
    gamma: float,
    depths: tuple[float, ...],
) -> float:
    """Rollouts, features, rewards and the gradient of one unwhitened RLOO step; returns the loss."""
    completions = naive_rollouts(model, batch, anchors, noise, temperature)
    phi, psi = naive_features(network, batch, anchors, completions, depths)
    rewards = feature_matching_rewards(phi, psi, alpha=alpha, whitening="none")
    advantages = feature_matching_advantages(rewards.alignment, rewards.diversity, alpha=alpha, baseline="rloo")
    log_probs, truth = naive_log_probs(model, batch, anchors, completions, temperature)
    mask = next_token_mask(batch.document_ids)
    pairs = float(anchors.valid.sum()) * noise.shape[2]
    loss = policy_gradient_loss(log_probs, advantages, anchors.valid, aggregation="token_mean", denominator=pairs)
    loss = loss + gamma * cross_entropy_loss(truth, mask, denominator=float(mask.sum()))
    loss.backward()
    return float(loss.detach())
