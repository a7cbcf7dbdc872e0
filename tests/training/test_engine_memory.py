"""Memory of engines besides the trainer's: counted as it is made, and refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from ebft_study.config import RunConfig
from ebft_study.errors import ConfigError
from ebft_study.networks.loading import load_model
from ebft_study.rollouts.vllm.weights import Layout, policy_weights
from ebft_study.study.cluster import own
from ebft_study.study.driver import runner, single_run
from ebft_study.study.folder.study_yaml import StudySource
from ebft_study.training import engine_memory as rules
from ebft_study.training import memory, setup
from ebft_study.training.engine_memory import EngineMemory, check_room, engine_memory
from ebft_study.training.memory import MemoryPlan, budgets, own_fraction, shapes
from ebft_study.training.recorded import Services
from tests.studies import resolved
from tests.tiny_run import tiny_config

GIB = 2**30


def served(folder: Path, **changes: Any) -> RunConfig:
    return tiny_config(folder, **{"rollout.backend": "vllm", **changes})


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_segment_is_as_large_as_the_plan_says(tmp_path: Path, precision: str, lora_rank: int) -> None:
    config = served(tmp_path, precision=precision, lora_rank=lora_rank)
    model = load_model(config.model).model
    layout = Layout.from_weights(policy_weights(model), getattr(torch, precision))
    planned = engine_memory(config, "cpu", shapes(config)[0]).segment_bytes
    padding = 64 * len(layout.names)
    assert layout.n_bytes - padding <= planned <= layout.n_bytes


def test_an_engine_takes_weights_cache_and_libraries_on_a_cpu_and_shared_memory_anywhere(tmp_path: Path) -> None:
    config = served(tmp_path, kv_cache_gib=0.5, tensor_parallel_size=2)
    shape = shapes(config)[0]
    weights = 4 * shape.n_parameters
    assert engine_memory(config, "cpu", shape) == EngineMemory(weights, weights + 0.5 * GIB + 2 * rules.PROCESS_BYTES)
    assert engine_memory(config, "cuda", shape) == EngineMemory(weights, 0.0)
    assert engine_memory(tiny_config(tmp_path), "cpu", shape) == EngineMemory()
    asked = served(tmp_path, benchmarks=["mini"], benchmark_max_tokens=8)
    assert engine_memory(asked, "cuda", shape).segment_bytes == 2 * weights  # the policy's, and those of the benchmarks


def test_a_trainer_on_a_cpu_has_what_its_engine_leaves(tmp_path: Path) -> None:
    config, without = served(tmp_path), tiny_config(tmp_path)
    engine = engine_memory(config, "cpu", shapes(config)[0]).total_bytes
    *_, limit = budgets(config, "cpu", total_bytes=16 * GIB)
    *_, alone = budgets(without, "cpu", total_bytes=16 * GIB)
    assert limit == pytest.approx(alone - engine)
    with pytest.raises(ConfigError, match=r"memory=1\.5 GiB, and the engine takes 1\.7.*kv_cache_gib"):
        budgets(config, "cpu", total_bytes=1.5 * GIB)


def room(monkeypatch: pytest.MonkeyPatch, n_bytes: float) -> None:
    monkeypatch.setattr(rules.os, "statvfs", lambda _: SimpleNamespace(f_bavail=n_bytes / 4096, f_frsize=4096))


def test_too_little_shared_memory_is_refused_with_the_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    room(monkeypatch, 2 * GIB)
    check_room(2 * GIB, policies=4)
    with pytest.raises(ConfigError, match=r"4 trials at a time.*need 3 GiB in /dev/shm, and 2 GiB are free.*shm-size"):
        check_room(3 * GIB, policies=4)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"not usable here .*backend=strided"):
        check_room(1.0, policies=1, folder=tmp_path / "missing")


def test_studies_and_runs_look_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One segment for each trial at a time, and the object store of Ray."""
    config = served(tmp_path)
    segment = engine_memory(config, "cpu", shapes(config)[0]).segment_bytes
    settings = config.model_dump(mode="json", exclude={"name", "seed"})
    study = resolved({"study": "s", "question": "?", "run": settings, "seeds": [0, 1]})
    needed = study.concurrency * segment + own.object_store_bytes(study.service_plan.travelling_bytes)

    def start() -> None:
        with runner._cluster_and_lock(runner._folder(study, tmp_path), study, None, print):
            pass

    room(monkeypatch, needed)
    start()
    room(monkeypatch, needed - 4096)
    with pytest.raises(ConfigError, match="/dev/shm"):
        start()
    room(monkeypatch, 0)
    with pytest.raises(ConfigError, match=r"1 trial at a time.*/dev/shm"):
        single_run.run_single(
            config, StudySource("run.yaml"), folder=tmp_path / "run", resume=False, console=Console(quiet=True)
        )
    assert not (tmp_path / "run").exists()


def test_a_process_may_take_its_part_of_a_gpu_and_no_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Set before anything is loaded; an engine on the same GPU has a part of it."""
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    plan = MemoryPlan(1, 1, 1.0, 1.0)
    device = torch.device("cuda")
    monkeypatch.setattr(setup, "planned", lambda *_, **__: (device, plan))

    class NothingReadError(Exception):
        pass

    def read(_config: RunConfig) -> None:
        raise NothingReadError

    monkeypatch.setattr(setup, "read_inputs", read)
    colocated = served(tmp_path, **{"vllm.placement": "colocated", "vllm.gpu_memory_utilization": 0.1})

    def start(config: RunConfig, services: Services | None) -> None:
        with pytest.raises(NothingReadError):
            setup.build_parts(config, services=services)

    start(tiny_config(tmp_path), Services("t", gpu_fraction=0.25))
    start(colocated, Services("t", gpu_fraction=0.5))
    assert limits == [0.25, 0.4]
    start(tiny_config(tmp_path), Services("t"))
    start(tiny_config(tmp_path), None)
    device = torch.device("cpu")
    start(tiny_config(tmp_path), Services("t", gpu_fraction=0.25))
    assert limits == [0.25, 0.4]
    assert own_fraction(colocated, 0.5) == 0.4
    (budget,) = budgets(colocated, "cuda", total_bytes=80.0, gpu_fraction=0.5)
    assert budget == pytest.approx(memory.USABLE * 0.4 * 80)
