"""From a configuration to a method."""

from __future__ import annotations

import copy

from ebft_study.config import RunConfig
from ebft_study.features import FeatureBackend
from ebft_study.methods import Method
from ebft_study.methods.ebft import Ebft
from ebft_study.methods.sft import Sft
from ebft_study.models import LoadedModel
from ebft_study.rollouts.strided import StridedRollouts


def build_method(config: RunConfig, *, base: LoadedModel, features: FeatureBackend) -> Method:
    """The configured method; `base` still holds the weights before any training."""
    if config.method == "sft":
        return Sft(config.loss)
    frozen = None
    if config.loss.kl_coefficient > 0:
        frozen = copy.deepcopy(base.model).eval().requires_grad_(False)
    return Ebft(config, rollouts=StridedRollouts(), features=features, base=frozen)
