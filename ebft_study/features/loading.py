"""The frozen feature network of a run, from its configuration."""

from __future__ import annotations

from typing import Any

import torch

from ebft_study.config import FeaturesConfig, RunConfig
from ebft_study.errors import ModelError
from ebft_study.features.local import LocalFeatures
from ebft_study.networks.loading import LoadedModel, frozen_copy, load_model


def load_feature_network(config: RunConfig, base: LoadedModel) -> LocalFeatures:
    """The frozen feature network of a run; 'base' is the generator before any training, a warm start included.

    Raises:
        ModelError: the network has another vocabulary than the generator, so token ids mean other things to it.
    """
    features: FeaturesConfig = config.features
    shared = features.is_base and config.lora.lora_rank > 0
    if features.is_base:
        network, identity = base.model if shared else frozen_copy(config, base), base.fingerprint
    else:
        other = _other_network(config, base)
        network, identity = other.model, other.fingerprint
    return LocalFeatures(
        network,
        depths=features.depths,
        pooling=features.pooling,
        normalize=features.normalize,
        backend=config.training.attention,
        shared=shared,
        fingerprint=identity,
    )


def _other_network(config: RunConfig, base: LoadedModel) -> LoadedModel:
    name, revision = config.feature_model
    other = load_model(
        name,
        revision=revision,
        random_weights=config.features.random_weights,
        device=next(base.model.parameters()).device,
        dtype=getattr(torch, config.training.precision),
        attention=config.training.attention,
    )
    check_vocabulary(base.tokenizer, other.tokenizer, base.name, other.name)
    return other


def check_vocabulary(ours: Any, theirs: Any, our_name: str, their_name: str) -> None:
    """Refuse a feature network that reads token ids differently."""
    if ours.get_vocab() != theirs.get_vocab():
        raise ModelError(
            f"features.feature_network={their_name!r}: its vocabulary ({len(theirs)} tokens) differs from that of "
            f"model {our_name!r} ({len(ours)} tokens). Use a network with the same tokenizer, such as one of its family"
        )
