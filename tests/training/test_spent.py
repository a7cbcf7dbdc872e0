"""What a run costs: FLOPs by phase against counting token by token, tokens, parameters, counters of devices."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ebft_study.config import RunConfig
from ebft_study.cost import Limits
from ebft_study.results.metrics import COST
from ebft_study.training import checkpoint, energy
from ebft_study.training.energy import EnergyMeter
from ebft_study.training.spent import CostMeter
from ebft_study.training.update import Run
from tests.tiny_run import MemoryRecorder, keep_checkpoints, run_tiny, tiny_config

PHASES = ("rollout_flops", "feature_flops", "scoring_flops")
CPU = torch.device("cpu")
# The model of `tiny_run.write_model`: two layers, grouped queries, tied embeddings.
L, H, INNER, HEADS, KV, HEAD = 2, 32, 48, 4, 2, 8
MATRICES = H * (2 * HEADS * HEAD + 2 * KV * HEAD) + 3 * H * INNER
"""Parameters in the matrices of one layer."""


def attention(keys: float) -> float:
    """Forward, one layer: scores and their products with the values, over all heads."""
    return 2 * 2 * HEADS * HEAD * keys


class Counted:
    """FLOPs of the passes of one sequence, token by token."""

    def __init__(self, config: RunConfig, vocabulary: int) -> None:
        self.T, self.G, self.n = config.data.sequence_length, config.rollout.completion_length, config.rollout.n_samples
        first, stride = config.rollout.context_length, config.rollout.stride
        self.anchors = [a for a in range(first, self.T, stride) if a + self.G <= self.T]
        self.head = 2 * vocabulary * H

    def prefix(self) -> float:
        """Keys that the tokens of the sequence meet."""
        return sum(position + 1 for position in range(self.T))

    def decoded(self) -> Iterator[int]:
        """For each token that is decoded, the keys that it meets: all before it, and its own."""
        for anchor in self.anchors:
            for _ in range(self.n):
                yield from (anchor + k + 1 for k in range(self.G - 1))

    def rollouts(self) -> float:
        rows = len(self.anchors) + len(list(self.decoded()))
        return L * sum(2 * MATRICES + attention(keys) for keys in self.decoded()) + rows * self.head

    def features(self, layers: int) -> float:
        blocks = sum(
            2 * MATRICES * layers + layers * attention(a + k + 1)
            for a in self.anchors
            for _ in range(self.n)
            for k in range(self.G)
        )
        # The deepest layer's MLP runs at the last token of a completion alone.
        spared = 2 * 3 * H * INNER * len(self.anchors) * self.n * (self.G - 1)
        return layers * (2 * MATRICES * self.T + attention(self.prefix())) + blocks - spared

    def scoring(self, *, sft: bool, gamma: float = 0.0) -> float:
        forward = L * (2 * MATRICES * self.T + attention(self.prefix())) + (self.T - 1) * self.head
        decoded = [] if sft else list(self.decoded())
        tokens, keys = self.T + len(decoded), self.prefix() + sum(decoded)
        truth = self.T - 1 if sft or gamma > 0 else 0
        rows = truth + (0 if sft else len(self.anchors) + len(decoded))
        return forward + L * (4 * MATRICES * tokens + 2.5 * attention(keys)) + 2 * rows * self.head


@pytest.mark.parametrize(
    "changes",
    [{}, {"gamma": 0.3, "depths": [1.0]}, {"warm_start_steps": 2}, {"method": "sft"}, {"method": "sft", "steps": 2}],
)
def test_flops_of_a_run_are_those_of_its_passes(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(tmp_path, **changes)
    _, recorder = run_tiny(config)
    run = Run(config)
    counted, sft = Counted(config, run.model.config.vocab_size), config.method == "sft"
    layers = max(1, math.floor(max(config.features.depths) * L))
    warm, batch = config.training.warm_start_steps, config.training.batch_size
    for step in range(config.total_steps + 1):
        n_warm, n_own = min(step, warm), max(step - warm, 0)
        own = (0, 0) if sft else (counted.rollouts(), counted.features(layers))
        scoring = n_warm * counted.scoring(sft=True) + n_own * counted.scoring(sft=sft, gamma=config.loss.gamma)
        expected = [batch * n_own * own[0], batch * n_own * own[1], batch * scoring]
        assert [recorder.rows[step][name] for name in PHASES] == pytest.approx(expected)
        assert recorder.rows[step]["flops"] == pytest.approx(sum(expected))


def test_logits_that_a_plan_computes_twice_count_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ten rows of logits at a time, three samples of all anchors at once do not fit, those of one anchor do."""
    runs = [Run(tiny_config(tmp_path, micro_batch_size=1, anchors_at_once=size)) for size in (1, 100)]
    config, vocabulary = runs[0].config, runs[0].model.config.vocab_size
    monkeypatch.setattr(Limits, "on", lambda device: Limits(logits_at_once=10 * vocabulary))
    part, whole = (
        CostMeter(config, run.parts.memory_plan, CPU, world_size=1).update(samples=True).scoring.flops for run in runs
    )
    counted = Counted(config, vocabulary)
    assert 3 < 10 < 3 * len(counted.anchors)
    assert part == pytest.approx(config.training.batch_size * counted.scoring(sft=False))
    again = len(list(counted.decoded())) * counted.head
    assert whole - part == pytest.approx(config.training.batch_size * again)


def test_evaluations_have_flops_of_their_own(tmp_path: Path) -> None:
    """Of the validation split at steps 0, 2 and 4, and of the held-out split, at length 3, before and after."""
    config = tiny_config(tmp_path, cfm_samples=2)
    _, recorder = run_tiny(config)
    run = Run(config)
    counted = Counted(config, run.model.config.vocab_size)
    counted.n = 2
    forward = L * (2 * MATRICES * counted.T + attention(counted.prefix())) + (counted.T - 1) * counted.head
    of_one = forward + counted.rollouts() + counted.features(1)
    per_step = {step: value / of_one for step, value in recorder.curve("evaluation_flops").items()}
    validation, heldout = (min(4, len(run.parts.data[split])) for split in ("validation", "heldout"))
    first = validation + heldout
    expected = {0: first, 1: first, 2: first + validation, 3: first + validation, 4: 2 * first + validation}
    assert per_step == pytest.approx(expected)


def test_an_evaluation_of_the_base_model_that_another_trial_made_costs_nothing(tmp_path: Path) -> None:
    _, first = run_tiny(tiny_config(tmp_path))
    _, second = run_tiny(tiny_config(tmp_path, learning_rate=2e-3))
    assert first.curve("evaluation_flops")[0] > 0
    assert second.curve("evaluation_flops")[0] == 0


def test_sampled_tokens_are_those_of_contexts_in_updates_by_ebft(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, warm_start_steps=2)
    run, expected = Run(config), 0.0
    for step in range(5):
        contexts = int(run.batch()[1].valid.sum())
        expected += (step >= 2) * contexts * config.rollout.n_samples * config.rollout.completion_length
        run.update()
        assert run.spent.sampled_tokens == expected
    assert expected > 0
    _, sft = run_tiny(tiny_config(tmp_path, method="sft"))
    assert set(sft.curve("sampled_tokens").values()) == {0.0}


def test_seconds_of_updates_add_up_those_of_the_steps(tmp_path: Path) -> None:
    _, recorder = run_tiny(tiny_config(tmp_path))
    total = 0.0
    for step, seconds in recorder.curve("update_seconds").items():
        total += recorder.rows[step].get("step_seconds", 0.0)
        assert seconds == pytest.approx(total)
    assert recorder.curve("cpu_seconds")[4] > recorder.curve("cpu_seconds")[0] > 0


def test_a_resumed_run_continues_its_cost(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, warm_start_steps=1)
    _, whole = run_tiny(config, on_report=keep_checkpoints(tmp_path))
    saved = checkpoint.load(tmp_path / "step-2")["spent"]
    reports: list[dict[str, float]] = []
    _, rest = run_tiny(config, start_from=tmp_path / "step-2", on_report=lambda m, _: reports.append(m))
    for name in (*PHASES, "flops", "evaluation_flops", "sampled_tokens"):
        assert rest.curve(name) == {step: value for step, value in whole.curve(name).items() if step > 2}
    assert {name: reports[0][name] for name in COST if name in saved and name != "energy_joules"} == {
        name: value for name, value in saved.items() if name != "energy_joules"
    }
    for name in ("update_seconds", "cpu_seconds"):
        assert rest.curve(name)[3] > saved[name]


def test_the_cost_before_a_checkpoint_of_version_0_1_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path)
    run_tiny(config, on_report=keep_checkpoints(tmp_path))
    load = checkpoint.load

    def load_old(folder: Path, **options: bool) -> dict[str, Any]:
        return {name: value for name, value in load(folder, **options).items() if name != "spent"}

    monkeypatch.setattr(checkpoint, "load", load_old)
    outcome, rest = run_tiny(config, start_from=tmp_path / "step-2")
    assert outcome.status == "finished"
    assert not set(COST) & {name for row in rest.rows.values() for name in row}


@pytest.mark.parametrize("changes", [{}, {"depths": [0.5, 1.0]}, {"lora_rank": 2}])
def test_parameters_are_those_of_the_networks(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = Run(tiny_config(tmp_path, **changes))
    embeddings = run.model.config.vocab_size * H
    layer = MATRICES + (HEADS + 2 * KV) * HEAD + 2 * H
    base, adapters = (
        embeddings + L * layer + H,
        2 * L * (3 * (H + INNER) + 2 * (H + HEADS * HEAD) + 2 * (H + KV * HEAD)),
    )
    lora = "lora_rank" in changes
    features = base if 1.0 in run.config.features.depths else embeddings + layer
    assert run.parameters == {
        "parameters": base + adapters * lora,
        "trainable_parameters": adapters if lora else base,
        "feature_parameters": features,
    }
    if not lora:  # with adapters the generator itself is the feature network
        assert sum(p.numel() for p in run.parts.features.network.get_decoder().parameters()) == features


# --- energy ----------------------------------------------------------------------------------------------------


def write_package(folder: Path, name: str, microjoules: int, limit: int = 10_000_000) -> None:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "energy_uj").write_text(f"{microjoules}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{limit}\n")


def test_the_energy_of_processors_is_that_of_all_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    for package, start in (("intel-rapl:0", 9_000_000), ("intel-rapl:1", 0), ("intel-rapl:0:0", 0)):
        write_package(tmp_path, package, start)
    meter = EnergyMeter(CPU, world_size=1)
    write_package(tmp_path, "intel-rapl:0", 9_500_000)
    write_package(tmp_path, "intel-rapl:1", 2_000_000)
    write_package(tmp_path, "intel-rapl:0:0", 5_000_000)  # a part of package 0
    assert meter.lap() == pytest.approx(2.5)
    write_package(tmp_path, "intel-rapl:0", 1_000_000)  # began again at 10 J
    assert meter.lap() == pytest.approx(1.5)
    assert math.isnan(EnergyMeter(CPU, world_size=2).lap()), "workers of one machine would all count it"


def test_a_device_without_counters_has_no_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "RAPL", tmp_path / "none")
    assert math.isnan(EnergyMeter(CPU, world_size=1).lap())
    _, recorder = run_tiny(tiny_config(tmp_path, steps=2))
    assert recorder.curve("energy_joules") == {}
    assert set(recorder.curve("cpu_seconds")) == {0, 1, 2}


class FakeNvml:
    """NVML with one GPU, whose counter is in millijoules."""

    def __init__(self, *, broken: bool = False) -> None:
        self.millijoules, self.broken = 5_000, broken

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:  # noqa: N802
        return 0 if uuid == b"GPU-ab-cd" else 2

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, energy: Any) -> int:  # noqa: N802
        energy._obj.value = self.millijoules
        return 3 * self.broken


@pytest.mark.parametrize("broken", [False, True])
def test_the_energy_of_a_gpu_is_nvmls(monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    library = FakeNvml(broken=broken)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab-cd"))
    meter = EnergyMeter(torch.device("cuda"), world_size=4)
    library.millijoules += 2_500
    assert meter.lap() == 2.5 if not broken else math.isnan(meter.lap())


def test_without_nvml_a_gpu_has_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "NVML", "libno-such-library.so.1")
    assert math.isnan(EnergyMeter(torch.device("cuda"), world_size=1).lap())


def test_energy_is_in_the_rows_where_the_device_measures_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    laps = iter([7.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr(EnergyMeter, "lap", lambda self: next(laps))
    recorder: MemoryRecorder = run_tiny(tiny_config(tmp_path))[1]
    assert recorder.curve("energy_joules") == {0: 7.0, 1: 8.0, 2: 10.0, 3: 13.0, 4: 22.0}
