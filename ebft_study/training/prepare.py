"""Find every mistake that needs files, and fill the caches, once before a study or run starts.

Afterwards every trial finds its data tokenised, its models on disk and, as far as one process on a CPU can measure it
for others, the base model's evaluation.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ebft_study.config import RunConfig
from ebft_study.cost import ModelShape
from ebft_study.data import load_text
from ebft_study.errors import ConfigError, DataError
from ebft_study.evaluation.base import CONTEXTS, VERIFIER_LIMITS
from ebft_study.networks.loading import base_dtype, digest_of_files, read_config, source_of
from ebft_study.paths import cache_folder
from ebft_study.plugins import is_path
from ebft_study.pretraining import ladder
from ebft_study.training import Workers, downstream
from ebft_study.training.inputs import Inputs, read_inputs
from ebft_study.training.memory import free_memory, plan_for, plan_micro_batches, total_memory
from ebft_study.training.setup import choose_device
from ebft_study.training.tracking import check_login
from ebft_study.training.update import Run
from ebft_study.training.validation import evaluate_shared, shared_model
from ebft_study.verifiers import check_verifiers

NETWORK = {"feature_network", "random_weights", "depths", "pooling", "normalize"}
"""Settings that determine the features; the others decide where they are computed."""


def prepare(
    configs: Iterable[RunConfig], *, workers: Callable[[RunConfig], Workers] = lambda _: Workers()
) -> dict[str, Any]:
    """Check everything that `configs` need, and measure the base models that trials can share.

    Weights are read only to measure, in this process: where trials are on GPUs, have several workers or a model for
    which there is no room here, the first of them measures it, if any.

    Args:
        workers: of the trials with a configuration.

    Returns:
        Provenance: `data` (data set name -> versions, sizes, hash), `models` (name -> parameters, hash of files,
        fingerprint of weights that were read and, for the tiny ladder, perplexities of pretraining; feature networks
        and judges, too) and, if there are any, `benchmarks` (name -> hash).

    Raises:
        EbftError: the first thing that a user must repair.
    """
    configs = list(configs)
    check_login(configs)
    check_verifiers(configs)
    data: dict[str, Any] = {}
    models: dict[str, Any] = {}
    benchmarks: dict[str, Any] = {}
    for config in _distinct(configs, workers):
        _check_memory(config, workers(config))
        inputs = read_inputs(config)
        inputs.close()
        if is_path(config.data.dataset) and load_text(config.data).fingerprint != inputs.text.fingerprint:
            raise DataError(
                f"data.dataset={config.data.dataset!r}: returns other examples each time that it is called, and every "
                "trial calls it. Fix its seed, and sort what it reads"
            )
        data[inputs.text.name] = _describe_data(inputs)
        benchmarks |= {each.name: {"fingerprint": each.fingerprint} for each in inputs.benchmarks}
        for name, revision in _networks(config).items():
            if name not in models:
                models[name] = _describe_model(name, revision)
        if _is_measured_here(config, workers(config)):
            models[config.model]["fingerprint"] = _measure(config)
    gc.collect()  # trials need the memory
    return {"data": data, "models": models, **({"benchmarks": benchmarks} if benchmarks else {})}


def _check_memory(config: RunConfig, workers: Workers) -> None:
    """Refuse what cannot fit, where the memory of the workers is known."""
    device = torch.device(workers.device)
    if config.training.memory_budget_gib is not None:
        total = math.inf  # which leaves the budget
    elif workers.are_here and (device.type == "cpu" or torch.cuda.is_available()):
        total = total_memory(device)
    else:
        return
    plan_for(config, device.type, total_bytes=total, world_size=workers.number, gpu_fraction=workers.gpu_fraction)


def _is_measured_here(config: RunConfig, workers: Workers) -> bool:
    """Whether trials can use a measurement of this process, and it has room for the model."""
    if workers.device != "cpu" or workers.number > 1 or choose_device(config).type != "cpu":
        return False
    device = torch.device("cpu")
    try:
        return plan_micro_batches(config, device, world_size=1).peak_bytes <= free_memory(device)
    except ConfigError:
        return False


def _measure(config: RunConfig) -> str:
    """Evaluate the base model, or find that it was; returns its fingerprint."""
    run = Run(config)
    try:
        base_model = shared_model(run)
        evaluate_shared(run, base_model)
        if not config.uses_engine:  # the first trials have the engine that samples for them
            downstream.measure_shared(run, base_model)
    finally:
        run.parts.close()
    return run.parts.base.fingerprint


def _distinct(configs: Iterable[RunConfig], workers: Callable[[RunConfig], Workers]) -> list[RunConfig]:
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
            "workers": workers(config),
        }
        seen.setdefault(json.dumps(parts, sort_keys=True), config)
    return list(seen.values())


def _describe_data(inputs: Inputs) -> dict[str, Any]:
    splits = inputs.data.items()
    return {
        **inputs.text.provenance,
        "fingerprint": inputs.text.fingerprint,
        "sequences": {split: len(rows) for split, rows in splits},
        "tokens": {split: int((rows.document_ids >= 0).sum()) for split, rows in splits},
        "dropped": {split: rows.dropped for split, rows in splits},
        "truncated": {split: rows.truncated for split, rows in splits},
    }


def _networks(config: RunConfig) -> dict[str, str | None]:
    """Names of all models of a run, with their revisions."""
    others = (config.features.feature_network, config.evaluation.judge)
    return {name: None for name in others if name not in (None, "base")} | {config.model: config.model_revision}


def _describe_model(name: str, revision: str | None) -> dict[str, Any]:
    model = read_config(name, revision=revision)
    described: dict[str, Any] = {"parameters": ModelShape.from_config(model).n_parameters}
    described["files"] = digest_of_files(name, revision=revision)
    record = cache_folder() / "models" / Path(source_of(name)).name / ladder.RECORD
    if record.exists():
        pretraining = json.loads(record.read_text())
        described |= {key: pretraining[key] for key in ("perplexity", "trigram_perplexity", "train_tokens")}
        described["pretraining_seconds"] = pretraining["seconds"]
    return described
