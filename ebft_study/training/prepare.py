"""Find every mistake that needs files, and fill the caches, once before a study or run starts.

Afterwards every trial finds its data tokenised, its models on disk and the base model's evaluation measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ebft_study.config import RunConfig
from ebft_study.evaluation.base import CONTEXTS, VERIFIER_LIMITS
from ebft_study.networks.loading import base_dtype
from ebft_study.paths import cache_folder
from ebft_study.training import downstream
from ebft_study.training.setup import Parts
from ebft_study.training.tracking import check_login
from ebft_study.training.update import Run
from ebft_study.training.validation import evaluate_shared, shared_model
from ebft_study.verifiers import check_verifiers

NETWORK = {"feature_network", "random_weights", "depths", "pooling", "normalize"}
"""Settings that determine the features; the others decide where they are computed."""


def prepare(configs: Iterable[RunConfig]) -> dict[str, Any]:
    """Load and check everything that `configs` need.

    Returns:
        Provenance: `data` (data set name -> versions, sizes, hash) and `models` (name -> parameters, fingerprint and,
        for the tiny ladder, perplexities of pretraining).

    Raises:
        EbftError: the first thing that a user must repair.
    """
    configs = list(configs)
    check_login(configs)
    check_verifiers(configs)
    data: dict[str, Any] = {}
    models: dict[str, Any] = {}
    for config in _distinct(configs):
        run = Run(config)
        base_model = shared_model(run)
        evaluate_shared(run, base_model)
        if not config.uses_engine:  # the first trials have the engine that samples for them
            downstream.measure_shared(run, base_model)
        run.parts.close()
        data[run.parts.text.name] = _describe_data(run.parts)
        models[config.model] = _describe_model(run.parts)
    return {"data": data, "models": models}


def _distinct(configs: Iterable[RunConfig]) -> list[RunConfig]:
    """One configuration per combination of settings that data, models or the base evaluation depend on."""
    seen: dict[str, RunConfig] = {}
    for config in configs:
        parts = config.model_dump(include={"model", "model_revision", "data", "evaluation"}) | {
            "rollout": config.rollout.model_dump(include=CONTEXTS),
            "features": config.features.model_dump(include=NETWORK),
            "precision": config.training.precision,
            "verifier": config.verifier.model_dump(include=VERIFIER_LIMITS) if config.evaluation.benchmarks else None,
            "engine": config.uses_engine if config.evaluation.benchmarks else None,
            "dtype": str(base_dtype(config)),
            "answers": [config.max_answer_tokens, config.verifier.model_dump()] if config.samples_answers else None,
            "adapters": config.lora.lora_targets if config.lora.lora_rank > 0 else None,
        }
        seen.setdefault(json.dumps(parts, sort_keys=True), config)
    return list(seen.values())


def _describe_data(parts: Parts) -> dict[str, Any]:
    splits = parts.data.items()
    return {
        **parts.text.provenance,
        "fingerprint": parts.text.fingerprint,
        "sequences": {split: len(rows) for split, rows in splits},
        "tokens": {split: int((rows.document_ids >= 0).sum()) for split, rows in splits},
        "dropped": {split: rows.dropped for split, rows in splits},
        "truncated": {split: rows.truncated for split, rows in splits},
    }


def _describe_model(parts: Parts) -> dict[str, Any]:
    base = parts.base
    described: dict[str, Any] = {"parameters": base.n_parameters, "fingerprint": base.fingerprint}
    record = Path(cache_folder() / "models" / base.folder / "pretraining.json")
    if record.exists():
        pretraining = json.loads(record.read_text())
        described |= {key: pretraining[key] for key in ("perplexity", "trigram_perplexity", "train_tokens")}
        described["pretraining_seconds"] = pretraining["seconds"]
    return described
