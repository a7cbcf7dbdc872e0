"""From a configuration to a method."""

from __future__ import annotations

from ebft_study.config import RunConfig
from ebft_study.features import FeatureBackend
from ebft_study.methods import Method
from ebft_study.methods.ebft import Ebft
from ebft_study.methods.sft import Sft
from ebft_study.networks.loading import LoadedModel, frozen_base
from ebft_study.rollouts import RolloutBackend
from ebft_study.rollouts.strided import StridedRollouts


def build_method(
    config: RunConfig,
    *,
    base: LoadedModel,
    features: FeatureBackend,
    rollouts: RolloutBackend | None = None,
    anchors_at_once: int | None = None,
) -> Method:
    """The configured method; `base` still holds the weights before any training. `rollouts`: by default in process."""
    if config.method == "sft":
        return Sft(config.loss)
    frozen = frozen_base(config, base) if config.loss.kl_coefficient > 0 else None
    return Ebft(
        config,
        rollouts=rollouts or StridedRollouts(),
        features=features,
        base=frozen,
        anchors_at_once=anchors_at_once,
    )
