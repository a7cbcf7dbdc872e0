"""What a study checks and measures in its driver, and what it leaves to its trials."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ebft_study.errors import ConfigError, DataError
from ebft_study.networks.loading import digest_of_files, load_model
from ebft_study.paths import cache_folder
from ebft_study.study.cluster.capacity import ClusterCapacity, Node
from ebft_study.study.driver import runner
from ebft_study.training import Workers, memory
from ebft_study.training import prepare as preparing
from ebft_study.training.memory import fit_memory, plan_micro_batches
from ebft_study.training.prepare import prepare
from tests.studies import resolved
from tests.tiny_run import run_tiny, tiny_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EBFT_STUDY_CACHE", str(tmp_path / "cache"))


def measured() -> int:
    """The number of evaluations that trials will find."""
    return len(list((cache_folder() / "base_evaluations").glob("*.json")))


def without_weights(folder: Path) -> None:
    """From now on who reads weights fails."""
    for file in (folder / "model").glob("*.safetensors"):
        file.unlink()


def test_trials_in_one_process_on_this_cpu_find_the_base_model_measured(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=0)
    described = prepare([config])["models"][config.model]
    assert measured() == 1
    base = load_model(config.model)
    files = digest_of_files(config.model)
    assert described == {"parameters": base.n_parameters, "files": files, "fingerprint": base.fingerprint}
    run_tiny(config)
    assert measured() == 1


@pytest.mark.parametrize("workers", [Workers("cuda"), Workers("cpu", 2), Workers("cuda", 8)])
def test_other_trials_measure_it_themselves_and_nothing_reads_weights_here(tmp_path: Path, workers: Workers) -> None:
    config = tiny_config(tmp_path)
    n_parameters = load_model(config.model).n_parameters
    without_weights(tmp_path)
    prepared = prepare([config], workers=lambda _: workers)
    assert measured() == 0
    assert prepared["models"] == {config.model: {"parameters": n_parameters, "files": digest_of_files(config.model)}}
    assert next(iter(prepared["data"].values()))["sequences"]["train"] > 0


def test_settings_are_checked_wherever_trials_run(tmp_path: Path) -> None:
    bad = tiny_config(tmp_path, packing=False, sequence_length=120, first_context_length=110)
    without_weights(tmp_path)
    with pytest.raises(DataError, match="has room for one anchor"):
        prepare([tiny_config(tmp_path), bad], workers=lambda _: Workers("cuda", 8))


def test_what_fits_only_sharded_is_left_to_its_workers(tmp_path: Path) -> None:
    """Finding 1: with one worker it does not fit, with two it does."""
    alone, shared = (
        least_bytes(tiny_config(tmp_path, sharding="fsdp"), world_size=world_size) for world_size in (1, 2)
    )
    assert shared < alone
    gib = (alone + shared) / 2 / 2**30
    config = tiny_config(tmp_path, sharding="fsdp", memory_budget_gib=gib)
    with pytest.raises(ConfigError):
        plan_micro_batches(config, CPU, world_size=1)
    prepare([config], workers=lambda _: Workers("cpu", 2))
    with pytest.raises(ConfigError, match="one optimizer step needs"):
        prepare([config], workers=lambda _: Workers("cpu", 1))


def least_bytes(config: Any, *, world_size: int) -> float:
    """Peak of the smallest plan."""
    sized = config.training.model_copy(update={"micro_batch_size": 1, "anchors_at_once": 1})
    smallest = config.model_copy(update={"training": sized})
    return fit_memory(smallest, "cpu", world_size=world_size, budget_bytes=2**40).peak_bytes


def test_a_driver_that_is_too_small_leaves_the_base_model_to_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path)
    peak = plan_micro_batches(config, CPU, world_size=1).peak_bytes
    monkeypatch.setattr(preparing, "free_memory", lambda _: peak - 1)
    prepare([config])
    assert measured() == 0
    monkeypatch.setattr(preparing, "free_memory", lambda _: peak)
    prepare([config])
    assert measured() == 1


def test_memory_of_machines_that_are_not_this_one_is_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "total_memory", lambda _: 1000.0)
    monkeypatch.setattr(preparing, "total_memory", lambda _: 1000.0)
    elsewhere = Workers("cpu", are_here=False)
    prepare([tiny_config(tmp_path)], workers=lambda _: elsewhere)
    with pytest.raises(ConfigError, match="one optimizer step needs"):
        prepare([tiny_config(tmp_path)])
    with pytest.raises(ConfigError, match="one optimizer step needs"):
        prepare([tiny_config(tmp_path, memory_budget_gib=1e-6)], workers=lambda _: elsewhere)


def test_nothing_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []

    class Run(preparing.Run):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            self.parts.base.model.circle = [self.parts.base.model]  # reference counts do not end it
            built.append(weakref.ref(self.parts.base.model))

    monkeypatch.setattr(preparing, "Run", Run)
    gc.disable()
    try:
        prepare([tiny_config(tmp_path)])
        assert [reference() for reference in built] == [None]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({"workers_per_trial": 4, "gpus_per_worker": 0.5}, Workers("cuda", 4, 0.5)),
        ({"workers_per_trial": 0}, Workers("cpu", 1)),
        ({"workers_per_trial": 1, "by": {"n_samples": {3: {"workers_per_trial": 2}}}}, Workers("cpu", 2)),
    ],
)
def test_a_study_prepares_for_the_workers_of_its_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resources: dict[str, Any], expected: Workers
) -> None:
    run = tiny_config(tmp_path, device="auto").model_dump(mode="json", exclude={"name", "seed"})
    content = {"study": "s", "question": "?", "run": run, "resources": resources}
    passed: list[Workers] = []

    def prepare(runs: Any, *, workers: Any) -> dict[str, Any]:
        passed.extend(workers(run) for run in runs)
        return {}

    monkeypatch.setattr(preparing, "prepare", prepare)
    study = resolved(content)
    runner._prepare(study, Console())
    runner._prepare(study.on(ClusterCapacity((Node(64, 8),), is_existing=True)), Console())
    assert passed == [expected, expected._replace(are_here=False)]
