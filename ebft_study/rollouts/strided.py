"""Strided block-parallel sampling in process, with a shared prefix (appendix F).

A decoded token never changes earlier keys and values, and the prefix is the same for all samples. So the sequence is
run once, its keys and values are kept, and each of the G - 1 further passes advances all n * B blocks by one token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ebft_study.algorithm.anchors import Anchors
from ebft_study.algorithm.sampling import draw
from ebft_study.block_model import BlockPass, decode, prefill
from ebft_study.data import Batch
from ebft_study.rollouts import Rollouts


class StridedRollouts:
    """The default backend: exact, in process, nothing recomputed."""

    @torch.no_grad()
    def sample(
        self, model: nn.Module, batch: Batch, anchors: Anchors, *, noise: Tensor, temperature: float
    ) -> Rollouts:
        """See `RolloutBackend.sample`. A batch without any anchor gives empty tensors."""
        S, B, n, G = noise.shape
        if B == 0:
            empty = torch.empty(S, 0, n, G, device=batch.tokens.device)
            return Rollouts(empty.long(), empty)
        head = model.get_output_embeddings()  # type: ignore[operator]
        block_pass = BlockPass(batch.document_ids, anchors, n_samples=n)
        noise = noise.to(batch.tokens.device)
        states = prefill(model, batch.tokens, block_pass)
        # The token before an anchor predicts the first completion token, one distribution for all n samples.
        before = (anchors.positions - 1).clamp(min=0)[..., None].expand(-1, -1, states.shape[-1])
        tokens, log_probs = draw(head(states.gather(1, before)), noise[..., 0], temperature=temperature)
        drawn, scored = [tokens], [log_probs]
        for t in range(1, G):
            states = decode(model, drawn[-1].flatten(1), block_pass, step=t - 1)
            tokens, log_probs = draw(head(states), noise[..., t].flatten(1)[..., None], temperature=temperature)
            drawn.append(tokens.view(S, B, n))
            scored.append(log_probs.view(S, B, n))
        return Rollouts(torch.stack(drawn, dim=-1), torch.stack(scored, dim=-1))
