"""The processes beside a trial that it may use, by the names that they have in its study.

Imported by every process of a trial, most of which need no model: what does is imported where it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ebft_study.config import RunConfig

if TYPE_CHECKING:
    import torch

    from ebft_study.features import FeatureBackend
    from ebft_study.networks.loading import LoadedModel
    from ebft_study.rollouts import RolloutBackend


@dataclass(frozen=True)
class Services:
    """Backends as configured, for one worker of a trial. Ray is imported only for those that need it."""

    owner: str
    """Trial and attempt."""
    rank: int = 0

    def rollouts(self, config: RunConfig, device: torch.device) -> RolloutBackend:
        """Where training samples; evaluation has its own, whose noise is the same for all models."""
        if not config.uses_engine:
            from ebft_study.rollouts.strided import StridedRollouts

            return StridedRollouts()
        from ebft_study.networks.loading import source_of
        from ebft_study.rollouts import vllm

        shared = config.vllm.engine_scope == "study"
        options = vllm.options_of(config, source=source_of(config.model), device=device)
        return vllm.VllmRollouts(
            options,
            policy=self.owner,
            engine_name=vllm.shared_name(options) if shared else f"engine-{self.owner}",
            shared=shared,
            sync_every_steps=config.rollout.sync_every_steps,
            timeout_seconds=config.vllm.engine_timeout_seconds,
            rank=self.rank,
        )

    def features(self, config: RunConfig, base: LoadedModel) -> FeatureBackend:
        """Where training and evaluation embed."""
        if config.features.backend != "service":
            from ebft_study.features.local import load_feature_network

            return load_feature_network(config, base)
        from ebft_study.features import NetworkOptions
        from ebft_study.features.keys import FeatureSpec
        from ebft_study.features.service import ServiceFeatures

        device = next(base.model.parameters()).device
        spec = FeatureSpec(config.features.depths, config.features.pooling, config.features.normalize)
        return ServiceFeatures(
            NetworkOptions.from_config(config, device=device),
            spec,
            timeout_seconds=config.features.service_timeout_seconds,
        )
