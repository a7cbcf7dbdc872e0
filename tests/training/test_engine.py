"""Training with rollouts of an engine, pretended in process: several workers, and what they do when it is wrong."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from ebft_study.config import RunConfig
from ebft_study.errors import ServiceError
from ebft_study.features import FeatureBackend
from ebft_study.features.local import load_networks
from ebft_study.networks.loading import LoadedModel
from ebft_study.rollouts import RolloutBackend, Rollouts
from tests.rollout_backends import WithoutGraph
from tests.tiny_run import MemoryRecorder, keep_checkpoints, run_tiny, tiny_config


class Engine(WithoutGraph):
    """Samples as the trainer does, knows its weights' version, and may err in what it reports."""

    def __init__(self, error: float, late: int) -> None:
        super().__init__()
        self.error, self.late, self.version = error, late, -1
        self.followed: list[int] = []

    def update_weights(self, model: nn.Module, version: int) -> None:
        self.version = version - min(self.late, version)
        self.followed.append(version)

    def sample(self, *arguments: Any, **keywords: Any) -> Rollouts:
        drawn = super().sample(*arguments, **keywords)
        return replace(drawn, log_probs=drawn.log_probs + self.error, policy_version=self.version, sync_seconds=0.5)


@dataclass
class Pretended:
    """Stands in for `Services`."""

    engine: Engine
    gpu_fraction: float = 1.0

    def rollouts(self, config: RunConfig, device: torch.device) -> RolloutBackend:
        return self.engine

    def networks(self, config: RunConfig, base: LoadedModel) -> tuple[FeatureBackend, FeatureBackend | None]:
        return load_networks(config, base)


def engine_config(folder: Path, **changes: Any) -> RunConfig:
    return tiny_config(folder, **{"rollout.backend": "vllm", "warm_start_steps": 2, **changes})


def run(config: RunConfig, *, error: float = 0.0, late: int = 0, **keywords: Any) -> tuple[Any, Any, Engine]:
    engine = Engine(error, late)
    outcome, recorder = run_tiny(config, services=Pretended(engine), **keywords)
    return outcome, recorder, engine


def test_an_exact_engine_trains_what_strided_rollouts_train(tmp_path: Path) -> None:
    outcome, served, engine = run(engine_config(tmp_path))
    _, strided = run_tiny(tiny_config(tmp_path, warm_start_steps=2))
    assert outcome.status == "finished"
    assert engine.followed == [2, 3, 4, 5]
    for name in ("loss", "reward", "grad_norm", "cfm_loss"):
        assert served.curve(name) == pytest.approx(strided.curve(name), rel=1e-3, abs=1e-5)
    assert served.curve("sync_seconds") == {3: 0.5, 4: 0.5, 5: 0.5, 6: 0.5}
    assert not strided.curve("importance_ratio")


def test_a_resumed_run_follows_from_its_step_on(tmp_path: Path) -> None:
    config = engine_config(tmp_path)
    _, whole, _ = run(config, on_report=keep_checkpoints(tmp_path))
    _, rest, engine = run(config, start_from=tmp_path / "step-4")
    assert engine.followed == [4, 5]
    for step in (5, 6):
        assert rest.rows[step]["reward"] == whole.rows[step]["reward"]


def test_weights_that_are_too_old_end_the_attempt(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"rollouts of policy version 1 at version 2: max_policy_lag=0"):
        run(engine_config(tmp_path, steps=3), late=1, error=0.0)


class Stale(Engine):
    """Samples from the first weights that it was sent, and reports the newest version."""

    def update_weights(self, model: nn.Module, version: int) -> None:
        self.first = getattr(self, "first", None) or copy.deepcopy(model)
        super().update_weights(model, version)

    def sample(self, model: nn.Module, *arguments: Any, prefix: Any = None, **keywords: Any) -> Rollouts:
        return super().sample(self.first, *arguments, **keywords)


def in_bfloat16(folder: Path, engine: Engine) -> tuple[Any, Any]:
    config = engine_config(folder, precision="bfloat16", warm_start_steps=0, learning_rate=1e-2, log_every_steps=3)
    return run_tiny(config, services=Pretended(engine))


def test_in_bfloat16_rounding_is_told_from_weights_that_are_wrong(tmp_path: Path) -> None:
    """Measured by the trainer at the first step and at logged ones, judged at all."""
    right, recorder = in_bfloat16(tmp_path, Engine(0.0, 0))
    assert right.status == "finished"
    assert min(recorder.curve("rechunk_mean_difference").values()) > 0
    assert list(recorder.curve("rechunk_off_fraction")) == [3]
    for wrong in (Stale(0.0, 0), Engine(1.0, 0)):
        stopped, _ = in_bfloat16(tmp_path, wrong)
        assert (stopped.status, stopped.step) == ("stopped", 1 if isinstance(wrong, Stale) else 0)
        assert "two passes of the trainer itself" in stopped.reason


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    error = 0.01 if rank == 0 else 0.0
    outcome, recorder, _ = run(engine_config(Path(folder)), error=error, rank=rank, world_size=2)
    said = {"status": outcome.status, "reason": outcome.reason, "step": outcome.step}
    Path(folder, f"outcome-{rank}.json").write_text(json.dumps(said))
    assert isinstance(recorder, MemoryRecorder)
    dist.destroy_process_group()


def test_workers_come_to_the_same_end_when_the_engine_disagrees_with_one_of_them(tmp_path: Path) -> None:
    engine_config(tmp_path)  # writes model and data
    multiprocessing.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    first, second = (json.loads(Path(tmp_path, f"outcome-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert (first["status"], first["step"]) == ("stopped", 2)
    # One of two workers errs by 0.01, with as many tokens as the other, or nearly so.
    assert "rollout.parity_threshold" in first["reason"]
