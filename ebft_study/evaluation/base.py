"""Evaluations of models that trials share, measured once per machine: of the base model, and of one warm start.

A cache, not a result: losing an entry costs a new measurement; any input that could change the numbers is in its key.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

import ebft_study
from ebft_study import plugins
from ebft_study.config import RunConfig
from ebft_study.data import TextDataset, TokenDataset
from ebft_study.errors import StorageError
from ebft_study.evaluation import Evaluator, Measured, Scores
from ebft_study.evaluation.downstream.benchmarks import Benchmark
from ebft_study.paths import cache_folder
from ebft_study.storage import StoragePath, storage_errors, storage_path

CONTEXTS = {"completion_length", "stride", "first_context_length", "temperature", "anchor_region"}
"""Rollout settings that evaluation shares with training."""
VERIFIER_LIMITS = {"test_cpu_seconds", "test_memory_mib", "comet_python", "comet_model"}
"""Settings of verifiers that change what they say of an answer to a benchmark."""
Rows = dict[str, list[dict[str, Any]]]
"""Table -> rows."""
Pair = tuple[Measured, Measured]
"""Validation and held-out measurements."""


def key(config: RunConfig, base: Any, evaluator: Evaluator, text: TextDataset, data: dict[str, TokenDataset]) -> str:
    """Hash of everything that a model's numbers depend on.

    Args:
        base: a `LoadedModel`, with the fingerprint of the weights that are evaluated.
    """
    networks = [network for network in (evaluator.features, evaluator.judge) if network is not None]
    inputs = {
        **_of_model(config, base),
        "features": [[each.fingerprint, each.indices, each.pooling, each.normalize] for each in networks],
        "text": text.fingerprint,
        "rows": {split: len(rows) for split, rows in data.items()},
        "data": config.data.model_dump(),
        "rollout": config.rollout.model_dump(include=CONTEXTS)
        | ({"temperature": None} if config.evaluation.evaluation_temperature else {}),
        "extra_metrics": [plugins.fingerprint(each.entry.plugin) for each in evaluator.extra],
        "evaluation": {k: v for k, v in config.evaluation if k != "eval_every_steps" and not k.startswith("benchmark")},
    }
    return _hash(inputs)


def benchmark_key(config: RunConfig, base: Any, benchmark: Benchmark, *, engine: str) -> str:
    """Hash of everything that a model's scores on a benchmark depend on.

    Args:
        engine: what samples the answers (`RolloutBackend.engine`): its draws are not those of another one.
    """
    inputs = {
        **_of_model(config, base),
        "benchmark": benchmark.fingerprint,
        "engine": engine,
        "seed": config.evaluation.evaluation_seed,
        "evaluation": config.evaluation.of_benchmarks,
        "verifier": config.verifier.model_dump(include=VERIFIER_LIMITS),
    }
    return _hash(inputs)


def overlap_key(benchmark: Benchmark, text: TextDataset) -> str:
    """Hash of everything that the overlap of a benchmark with training data depends on."""
    return _hash({"version": ebft_study.__version__, "benchmark": benchmark.fingerprint, "text": text.fingerprint})


def _of_model(config: RunConfig, base: Any) -> dict[str, Any]:
    return {
        "version": ebft_study.__version__,
        "torch": torch.__version__,
        "device": str(next(base.model.parameters()).device),
        "precision": config.training.precision,
        "model": base.fingerprint,
    }


def _hash(inputs: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]


def get_rows(entry: str) -> Rows | None:
    """Rows of tables stored under a key; None if there are none or they cannot be read."""
    try:
        stored = json.loads(_path(entry).read_bytes())
        return {table: list(stored[table]) for table in ("evaluations", "scores", "samples")}
    except (StorageError, OSError, ValueError, TypeError, KeyError):
        return None


def put_rows(entry: str, rows: Rows) -> None:
    """Store rows of tables, atomically."""
    _path(entry).write_bytes(json.dumps(rows).encode())


def get(entry: str) -> Pair | None:
    """Measurements stored under a key; None if there are none or they cannot be read."""
    try:
        stored = json.loads(_path(entry).read_bytes())
        validation, heldout = (
            {
                (metric, position): Scores(torch.tensor(rows), *torch.tensor([sums, counts], dtype=torch.float64))
                for metric, position, (rows, sums, counts) in part
            }
            for part in stored
        )
    except (StorageError, OSError, ValueError, TypeError):
        return None
    return validation, heldout


def put(entry: str, measured: Pair) -> None:
    """Store measurements, atomically."""
    content = [
        [
            [*name, [scores.sequences.tolist(), scores.sums.tolist(), scores.counts.tolist()]]
            for name, scores in part.items()
        ]
        for part in measured
    ]
    _path(entry).write_bytes(json.dumps(content).encode())


def _path(entry: str) -> StoragePath:
    folder = cache_folder() / "base_evaluations"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return storage_path(folder / f"{entry}.json")
