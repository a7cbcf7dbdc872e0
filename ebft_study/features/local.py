"""The feature network in the training process: loading it, and embedding with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ebft_study.algorithm.anchors import (
    Anchors,
    Contexts,
    completion_positions,
    contexts_of,
    distinct_completions,
    gather_rows,
)
from ebft_study.algorithm.features import Normalization, Pooling, feature_map, layer_indices
from ebft_study.data import Batch
from ebft_study.errors import ModelError
from ebft_study.features import Features
from ebft_study.features.keys import FeatureSpec
from ebft_study.networks.blocks import (
    Backend,
    Blocks,
    Prefix,
    captured_layers,
    decoder_names,
    mlp_only_at,
    run_blocks,
    run_prefix,
)
from ebft_study.networks.loading import LoadedModel, frozen_copy, load_model
from ebft_study.networks.lora import base_weights
from ebft_study.networks.sharding import unsharded

if TYPE_CHECKING:
    from ebft_study.config import RunConfig

TOKENS_PER_PASS = {"cpu": 2**10, "cuda": 2**17}
"""Completion tokens per pass; more are embedded in several passes, with the same result."""


class LocalFeatures:
    """A frozen network, run up to the deepest requested layer: no logits, nothing embedded twice."""

    def __init__(
        self,
        network: nn.Module,
        *,
        depths: Sequence[float],
        pooling: Pooling,
        normalize: Normalization,
        backend: Backend = "auto",
        shared: bool = False,
        fingerprint: str = "",
    ):
        """
        Args:
            network: frozen, put in evaluation mode and shortened in place, unless it is `shared`.
            shared: the network is the generator, which has adapters; features are those of its base weights.
            fingerprint: identifies the network's weights.
        """
        self.network, self.pooling, self.normalize, self.backend = network, pooling, normalize, backend
        self.shared, self.fingerprint = shared, fingerprint
        self.names = decoder_names(network)
        n_layers = len(getattr(network.get_decoder(), self.names.layers))  # type: ignore[operator]
        self.indices = layer_indices(depths, n_layers)
        self._last: tuple[Batch, Prefix, list[Tensor]] | None = None
        # hidden_states[L] is the state after the final norm; below it no norm applies.
        self.after_norm = self.indices[-1] == n_layers
        if not shared:
            network.eval().requires_grad_(False)
            self._shorten()

    @torch.no_grad()
    def embed(
        self, batch: Batch, anchors: Anchors, completions: Tensor, *, lengths: Sequence[int] | None = None
    ) -> list[Features]:
        """See `FeatureBackend.embed`. One prefix serves samples, ground truth and all lengths."""
        G = completions.shape[-1]
        lengths = lengths or [G]
        with self._running() as captured:
            prefix, layers = self._prefix(batch, captured)
            positions = completion_positions(anchors, G, batch.tokens.shape[1])
            psi = self._map([gather_rows(states, positions) for states in layers], lengths)
            contexts = contexts_of(batch.document_ids, anchors)
            chosen, inverse = distinct_completions(completions, anchors.valid)
            per_pass = max(1, TOKENS_PER_PASS[completions.device.type] // (len(completions) * G))
            parts = [
                self._samples(captured, prefix, contexts, completions, part, lengths)
                for part in chosen.split(per_pass, dim=1)
            ]
        phi = [gather_rows(torch.cat(distinct, dim=1), inverse) for distinct in zip(*parts, strict=True)]
        return [Features(*pair) for pair in zip(phi, psi, strict=True)]

    @torch.no_grad()
    def embed_answers(self, batch: Batch, anchors: Anchors, answers: Tensor, lengths: Tensor) -> Features:
        """Embed whole answers, each pooled over its own tokens, and the data's answers.

        Args:
            anchors: one per sequence, where its answer begins.
            answers: [S, n, L] tokens. lengths: [S, n], 0 where the anchor is not valid.

        Returns:
            phi [S, 1, n, d] and psi [S, 1, d]; 0 where the anchor is not valid.
        """
        S, n, L = answers.shape
        starts, truth_lengths = anchors.positions[:, 0].tolist(), batch.answer_mask.sum(dim=1).tolist()
        with self._running() as captured:
            prefix, layers = self._prefix(batch, captured)
            truths = [
                self._pooled([states[s, a : a + length] for states in layers])
                for s, (a, length) in enumerate(zip(starts, truth_lengths, strict=True))
                if anchors.valid[s, 0]
            ]
            parts = []
            for part in torch.arange(n).split(max(1, TOKENS_PER_PASS[answers.device.type] // (S * L))):
                blocks = Blocks.of(batch.document_ids, anchors, len(part))
                states = run_blocks(self.network, prefix, blocks, answers[:, part], backend=self.backend)
                hidden = [layer.unflatten(1, (len(part), L)) for layer in self._layers(captured, states.flatten(1, 2))]
                own = lengths[:, part].tolist()
                parts += [
                    (s, int(j), self._pooled([layer[s, k, : own[s][k]] for layer in hidden]))
                    for s in range(S)
                    for k, j in enumerate(part)
                    if own[s][k]
                ]
        size = len(self.indices) * layers[0].shape[-1]
        phi, psi = layers[0].new_zeros(S, 1, n, size).float(), layers[0].new_zeros(S, 1, size).float()
        for s, j, feature in parts:
            phi[s, 0, j] = feature
        psi[anchors.valid] = torch.stack(truths) if truths else psi[anchors.valid]
        return Features(phi, psi)

    def _pooled(self, layers: Sequence[Tensor]) -> Tensor:
        """The features [d] of one completion from its states [length, H] of every layer."""
        return feature_map(layers, pooling=self.pooling, normalize=self.normalize)

    def free_prefix(self) -> None:
        """Free the keys and values of the batch that was run last."""
        self._last = None

    def drain_usage(self) -> dict[str, tuple[float, float]]:
        """Return nothing: the phases of a step show the cost."""
        return {}

    def _shorten(self) -> None:
        if not self.after_norm:
            body = self.network.get_decoder()  # type: ignore[operator]
            setattr(body, self.names.layers, getattr(body, self.names.layers)[: self.indices[-1]])
            setattr(body, self.names.norm, nn.Identity())

    @contextmanager
    def _running(self) -> Iterator[dict[int, Tensor]]:
        """Context of the passes, with all weights; the states of the requested layers are collected in its value."""
        with unsharded(self.network), self._shortened(), captured_layers(self.network, self.indices) as captured:
            yield captured

    @contextmanager
    def _shortened(self) -> Iterator[None]:
        """Turn a shared network into the feature network inside the context, and back into the generator after it."""
        if not self.shared:
            yield
            return
        body = self.network.get_decoder()  # type: ignore[operator]
        before = {name: getattr(body, name) for name in self.names}
        with base_weights(self.network):
            self._shorten()
            try:
                yield
            finally:
                for name, module in before.items():
                    setattr(body, name, module)

    def _prefix(self, batch: Batch, captured: dict[int, Tensor]) -> tuple[Prefix, list[Tensor]]:
        """Run the batch's sequences; the last batch's are reused, because its next call may have other anchors."""
        if self._last is None or self._last[0] is not batch:
            self._last = None
            prefix = run_prefix(self.network, batch.tokens, batch.document_ids)
            self._last = (batch, prefix, self._layers(captured, prefix.states))
        return self._last[1:]

    def _samples(
        self,
        captured: dict[int, Tensor],
        prefix: Prefix,
        contexts: Contexts,
        completions: Tensor,
        part: Tensor,
        lengths: Sequence[int],
    ) -> list[Tensor]:
        """Return phi [S, M', d] at every length, of the completions with the indices `part` [S, M']."""
        blocks = Blocks(Contexts(*(bound.gather(1, part // completions.shape[2]) for bound in contexts)))
        tokens = gather_rows(completions.flatten(1, 2), part)
        with self._last_tokens_only(part.shape[1], completions.shape[3], lengths):
            states = run_blocks(self.network, prefix, blocks, tokens, backend=self.backend)
        layers = self._layers(captured, states.flatten(1, 2))
        return self._map([layer.unflatten(1, tokens.shape[1:]) for layer in layers], lengths)

    def _last_tokens_only(self, n_blocks: int, G: int, lengths: Sequence[int]) -> AbstractContextManager[None]:
        """Restrict the deepest layer's MLP to the tokens that `last_token` reads, one per block and length."""
        if self.pooling != "last_token":
            return nullcontext()
        device = next(self.network.parameters()).device
        last = torch.tensor([length - 1 for length in lengths], device=device)
        rows = (torch.arange(n_blocks, device=device)[:, None] * G + last).flatten()
        layers = getattr(self.network.get_decoder(), self.names.layers)  # type: ignore[operator]
        return mlp_only_at(layers[self.indices[-1] - 1], rows)

    def _layers(self, captured: dict[int, Tensor], last: Tensor) -> list[Tensor]:
        states = [captured[i] for i in self.indices]
        return [*states[:-1], last] if self.after_norm else states

    def _map(self, layers: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        return [
            feature_map([h[..., :length, :] for h in layers], pooling=self.pooling, normalize=self.normalize)
            for length in lengths
        ]


def over_same_weights(network: nn.Module) -> nn.Module:
    """A network of modules of its own, which can be shortened, over the weights of another one."""
    weights = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
    return copy.deepcopy(network, weights)


def load_networks(config: RunConfig, base: LoadedModel) -> tuple[LocalFeatures, LocalFeatures | None]:
    """Load the frozen feature network of a run, and its judge if it has one.

    The same network is loaded once for both.

    Args:
        base: the generator before any training, a warm start included.

    Raises:
        ModelError: a vocabulary is not the generator's, so token ids have another meaning for the network.
    """
    features, judge = config.features, load_judge(config, base)
    shared = features.is_base and config.lora.lora_rank > 0
    network: nn.Module = base.model
    fingerprint = base.fingerprint
    if not features.is_base:
        network, fingerprint = _load(
            config, base, "features.feature_network", *config.feature_model, random_weights=features.random_weights
        )
    elif not shared:
        network = frozen_copy(config, base)
    if config.judge_is_feature_network:
        same = network if shared else over_same_weights(network)
        judge = _local(config, FeatureSpec.of_judge(config), same, fingerprint, shared=shared)
    return _local(config, FeatureSpec.from_config(config), network, fingerprint, shared=shared), judge


def load_judge(config: RunConfig, base: LoadedModel) -> LocalFeatures | None:
    """Load the judge of a run; None where it has none, and where the judge is its feature network.

    Raises:
        ModelError: see `load_networks`.
    """
    name = config.evaluation.judge
    if name is None or config.judge_is_feature_network:
        return None
    return _local(config, FeatureSpec.of_judge(config), *_load(config, base, "evaluation.judge", name))


def _load(
    config: RunConfig,
    base: LoadedModel,
    key: str,
    name: str,
    revision: str | None = None,
    *,
    random_weights: bool = False,
) -> tuple[nn.Module, str]:
    """A network that is not the generator, and its fingerprint; `key` is the setting that names it."""
    loaded = load_model(
        name,
        revision=revision,
        random_weights=random_weights,
        device=next(base.model.parameters()).device,
        dtype=getattr(torch, config.training.precision),
        attention=config.training.attention,
        n_tokens=config.data.sequence_length,
        completion_length=config.longest_completion,
        is_first=bool(base.fingerprint),
        needs_head=False,
    )
    if loaded.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise ModelError(
            f"{key}={name!r}: its vocabulary ({len(loaded.tokenizer)} tokens) differs from that of model "
            f"{base.name!r} ({len(base.tokenizer)} tokens). Use a network with the same tokenizer, such as one of its "
            "family"
        )
    return loaded.model, loaded.fingerprint


def _local(
    config: RunConfig, spec: FeatureSpec, network: nn.Module, fingerprint: str, *, shared: bool = False
) -> LocalFeatures:
    return LocalFeatures(
        network,
        depths=spec.depths,
        pooling=spec.pooling,
        normalize=spec.normalize,
        backend=config.training.attention,
        shared=shared,
        fingerprint=fingerprint,
    )
