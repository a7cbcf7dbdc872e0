"""Strided rollouts as another backend would give them."""

from __future__ import annotations

from typing import Any

import torch

from ebft_study.rollouts import Rollouts
from ebft_study.rollouts.strided import StridedRollouts


class WithoutGraph(StridedRollouts):
    """A backend whose log-probabilities cannot be differentiated, as those of an engine."""

    @torch.no_grad()
    def sample(self, *args: Any, **kwargs: Any) -> Rollouts:
        return super().sample(*args, **kwargs)
