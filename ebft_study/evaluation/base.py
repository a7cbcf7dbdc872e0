"""The base model's evaluation, measured once per machine and shared by all trials that start from it.

A memo, not a result: losing an entry costs a new measurement; any input that could change the numbers is in its key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

import ebft_study
from ebft_study.config import RunConfig
from ebft_study.data import TextDataset, TokenDataset
from ebft_study.evaluation import Measured, Moments
from ebft_study.paths import cache_folder
from ebft_study.storage import atomic_write

CONTEXTS = {"completion_length", "stride", "first_context_length", "temperature", "anchor_region"}
"""Settings of rollouts that evaluation shares with training."""
Pair = tuple[Measured, Measured]
"""Validation and held-out measurements."""


def key(config: RunConfig, base: Any, features: Any, text: TextDataset, data: dict[str, TokenDataset]) -> str:
    """Hash of everything that the base model's numbers depend on.

    Args:
        base: the loaded base model (`models.LoadedModel`). features: the run's `FeatureBackend`.
    """
    inputs = {
        "version": ebft_study.__version__,
        "torch": torch.__version__,
        "device": str(next(base.model.parameters()).device),
        "precision": config.training.precision,
        "model": base.fingerprint,
        "features": [features.fingerprint, features.indices, features.pooling, features.normalize],
        "text": text.fingerprint,
        "rows": {split: len(rows) for split, rows in data.items()},
        "data": config.data.model_dump(),
        "rollout": config.rollout.model_dump(include=CONTEXTS),
        "evaluation": config.evaluation.model_dump(exclude={"eval_every_steps"}),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]


def recall(entry: str) -> Pair | None:
    """Measurements stored under a key; None if there are none or they cannot be read."""
    try:
        stored = json.loads(_path(entry).read_text())
        validation, heldout = (
            {(metric, position): Moments(**moments) for metric, position, moments in part} for part in stored
        )
    except (OSError, ValueError, TypeError):
        return None
    return validation, heldout


def remember(entry: str, measured: Pair) -> None:
    """Store measurements, in place at once or not at all."""
    content = [[[*name, dataclasses.asdict(moments)] for name, moments in part.items()] for part in measured]
    with atomic_write(_path(entry)) as temporary:
        temporary.write_text(json.dumps(content))


def _path(entry: str) -> Path:
    return cache_folder() / "base_evaluations" / f"{entry}.json"
