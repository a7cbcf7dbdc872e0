"""The feature network in the training process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ebft_study.algorithm.anchors import Anchors, completions_at
from ebft_study.algorithm.features import Normalization, Pooling, feature_map, layer_indices
from ebft_study.block_model import BlockPass, captured_layers, score
from ebft_study.data import Batch
from ebft_study.features import Features


class LocalFeatures:
    """Frozen copy of a network, cut off above the deepest layer asked for: no logits, nothing run in vain."""

    def __init__(self, network: nn.Module, *, depths: Sequence[float], pooling: Pooling, normalize: Normalization):
        """`network` is taken over: frozen, put in evaluation mode, and shortened in place."""
        self.network, self.pooling, self.normalize = network, pooling, normalize
        body = network.get_decoder()  # type: ignore[operator]
        n_layers = len(body.layers)
        self.indices = layer_indices(depths, n_layers)
        network.eval().requires_grad_(False)
        # hidden_states[L] is the state after the final norm; below it no norm applies.
        self.after_norm = self.indices[-1] == n_layers
        if not self.after_norm:
            body.layers = body.layers[: self.indices[-1]]
            body.norm = nn.Identity()

    @torch.no_grad()
    def embed(
        self, batch: Batch, anchors: Anchors, completions: Tensor, *, lengths: Sequence[int] | None = None
    ) -> list[Features]:
        """See `FeatureBackend.embed`. One pass serves samples, ground truth and all lengths."""
        G = completions.shape[-1]
        block_pass = BlockPass(batch.document_ids, anchors, n_samples=completions.shape[2])
        with captured_layers(self.network, self.indices) as captured:
            prefix, blocks = score(self.network, batch.tokens, completions, block_pass)
        T = batch.tokens.shape[1]
        sampled = [captured[i][:, T:].unflatten(1, completions.shape[1:]) for i in self.indices]
        real = [captured[i][:, :T] for i in self.indices]
        if self.after_norm:
            sampled[-1], real[-1] = blocks, prefix
        index = torch.arange(T, device=batch.tokens.device).expand_as(batch.tokens)
        at = completions_at(index, anchors, G)
        truth = [states.gather(1, at.flatten(1)[..., None].expand(-1, -1, states.shape[-1])) for states in real]
        truth = [states.unflatten(1, at.shape[1:]) for states in truth]
        return [Features(self._map(sampled, length), self._map(truth, length)) for length in (lengths or [G])]

    def _map(self, hidden: Sequence[Tensor], length: int) -> Tensor:
        return feature_map([h[..., :length, :] for h in hidden], pooling=self.pooling, normalize=self.normalize)
