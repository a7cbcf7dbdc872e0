"""Real sizes, tiny: the commands run, memory is read where it is taken, and what is beyond the prediction fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import realsize
from benchmarks.realsize import TINY, Process, Watch
from ebft_study.config import read_run
from ebft_study.errors import ConfigError
from ebft_study.study.resolving.study_file import load_study
from ebft_study.training.memory import fit_memory

GIB = 2**30


def test_a_tiny_model_runs_by_the_same_command(tmp_path: Path) -> None:
    assert realsize.main(["--tiny", "--only", "lora", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "realsize.json").read_text())["ways"]["lora"]
    assert (record["state"], record["why"]) == ("done", "")
    facts = record["facts"]
    assert facts["predicted_bytes"] == facts["plan_bytes"] + facts["base_bytes"] > facts["base_bytes"] > GIB / 8
    assert 0 < facts["file_bytes"] < facts["peak_bytes"]
    assert all(facts[f"{name}_seconds"] > 0 for name in ("start", "step", "checkpoint"))
    # Adapters and their two moments in float32, of rank 16: 16 (in + out) for each of seven matrices of two layers.
    trained = 2 * 16 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 128))
    assert 12 * trained < facts["checkpoint_bytes"] < 12 * trained + 2e5
    assert "lora" in (tmp_path / "realsize.txt").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"realsize.json", "realsize.txt"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    realsize.write_inputs(folder, TINY)
    return folder


@pytest.mark.parametrize("name", realsize.WAYS)
def test_every_command_has_valid_settings(name: str, inputs: Path) -> None:
    command = realsize.command_of(name, inputs, "model", inputs / f"{name}-model")
    file = Path(command[4])
    if name in ("lora", "full"):
        run = read_run(realsize.settings_of(name, inputs, "model"), source=name)
        assert command[3] == "train"
    else:
        (trial,) = load_study(file, None).trials
        run = trial.run
        assert command[3] == "study"
        assert trial.resources.workers_per_trial == 1
    assert run.uses_engine is (name == "engine")
    assert run.lora.lora_rank == (0 if name == "full" else 16)
    assert run.training.weight_dtype == ("bfloat16" if name == "full" else "float32")
    assert bool(run.training.activation_checkpointing) is (name == "full")
    planned = realsize.planned(name, inputs, "model")
    assert planned["plan_bytes"] == fit_memory(run, "cpu", world_size=1, budget_bytes=4 * GIB).peak_bytes


def test_weights_that_an_engine_maps_are_counted(inputs: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    assert realsize.planned("engine", inputs, "model")["segment_bytes"] == 2 * model.num_parameters()
    assert realsize.planned("study", inputs, "model")["segment_bytes"] == 0


def test_model_and_tokenizer_are_those_of_their_sizes(inputs: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.hidden_size == 128
    weight = model.model.layers[0].mlp.gate_proj.weight.detach().float()
    assert float(weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(model.model.norm.weight.detach().min()) == 1.0
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    text = json.loads((inputs / "data.jsonl").read_text().splitlines()[0])["text"]
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert len(tokens) > 2 * realsize.RUN["sequence_length"]
    assert max(tokens) < len(tokenizer) == 512


def test_a_tokenizer_has_as_many_tokens_as_asked_for() -> None:
    assert len(realsize.tokenizer(5000)) == 5000


def test_the_large_model_is_qwen() -> None:
    with torch.device("meta"):
        model = realsize.Qwen2ForCausalLM(realsize.Qwen2Config(**realsize.FULL.model))
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_543_714_304


# --- memory ------------------------------------------------------------------------------------------------------

HOLDING = """
import mmap, subprocess, sys
held = bytearray(int(sys.argv[1]) << 20)
shared = mmap.mmap(-1, int(sys.argv[2]) << 20)
shared.write(bytes(len(shared)))
del held
if sys.argv[3:]:
    child = subprocess.Popen([sys.executable, "-c", sys.argv[3], "32", "1"], stdout=subprocess.PIPE)
    child.stdout.readline()
print("ready", flush=True)
sys.stdin.read()
"""


def test_the_peak_of_every_process_is_read_even_when_it_has_passed() -> None:
    command = [sys.executable, "-c", HOLDING, "64", "16", HOLDING]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    watch = Watch(psutil.Process(process.pid))
    watch.read()
    process.communicate()
    own = watch.named("")
    (child,) = (each for each in watch.processes.values() if each is not own)
    assert own.peak_bytes > child.peak_bytes + 20 * 2**20
    assert own.peak_bytes > own.largest_read + 20 * 2**20  # what is freed is in the peak only
    assert own.shared_bytes >= 16 * 2**20 > child.shared_bytes
    assert own.file_bytes > 2**20
    assert own.name.startswith("python")


def test_the_training_process_is_the_largest_of_its_name() -> None:
    watch = Watch(psutil.Process())
    watch.processes = {1: Process("ray::Engine", 9), 2: Process("ray::RayTrainWorker.execute", 5)}
    watch.processes[3] = Process("ray::RayTrainWorker", 7)
    assert watch.named("RayTrainWorker").peak_bytes == 7


def test_a_command_that_fails_or_hangs_says_so(tmp_path: Path) -> None:
    script = "import sys; sys.exit('no such\\nmodel')"
    with pytest.raises(subprocess.SubprocessError, match="ended with 1: no such model"):
        realsize.run_watched([sys.executable, "-c", script], tmp_path / "log")
    with pytest.raises(subprocess.SubprocessError, match="ended with -9"):
        realsize.run_watched(["sleep", "1000"], tmp_path / "log", limit_seconds=0.1)


# --- the comparison ----------------------------------------------------------------------------------------------


def test_a_checkpoint_is_ours_and_not_the_one_that_tune_links_to_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = {"t/checkpoint_00000001/checkpoint.json": 5, "t/checkpoint_00000002/checkpoint.json": 7}
    sizes |= {"t/checkpoint_00000002/state.safetensors": 11, "tune/trial/checkpoint_000001/link.json": 100}
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    tables = SimpleNamespace(
        metrics=pd.DataFrame({"step": [0, 1, 2], "step_seconds": [9.0, 1.0, 3.0]}),
        trials=pd.DataFrame({"startup_seconds": [4.0]}),
    )
    monkeypatch.setattr(realsize.api, "read_results", lambda _: tables)
    assert realsize.tables_of(tmp_path) == {"step_seconds": 2.0, "start_seconds": 4.0, "checkpoint_bytes": 18}


def pretend(monkeypatch: pytest.MonkeyPatch, *, peak: float, free: float = 100.0) -> None:
    """The small model takes 1 GiB, 0.2 of it by plan; the large one has a plan of 4 GiB and takes `peak`."""

    def planned(name: str, folder: Path, model: str) -> dict[str, Any]:
        return {
            "plan_bytes": (0.2 if model == "small" else 4.0) * GIB,
            "segment_bytes": 0,
            "engine_bytes": 0,
            "plan": "",
        }

    def run(name: str, folder: Path, model: str) -> dict[str, Any]:
        return {**planned(name, folder, model), "peak_bytes": (1.0 if model == "small" else peak) * GIB}

    monkeypatch.setattr(realsize, "planned", planned)
    monkeypatch.setattr(realsize, "run_way", run)
    monkeypatch.setattr(realsize, "free_memory", lambda _device: free * GIB)


@pytest.mark.parametrize(
    ("peak", "state"), [(4.8, "done"), (5.5, "done"), (4.1, "done"), (5.6, "beyond"), (4.0, "beyond")]
)
def test_memory_beyond_the_tolerance_is_found_on_both_sides(
    peak: float, state: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(monkeypatch, peak=peak)
    record = realsize.measured("lora", tmp_path)
    assert record["state"] == state
    assert record["facts"]["predicted_bytes"] == pytest.approx(4.8 * GIB)
    assert record["facts"]["ratio"] == pytest.approx(peak / 4.8)


def test_what_does_not_fit_is_not_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, peak=4.8, free=4.5)
    record = realsize.measured("full", tmp_path)
    assert (record["state"], record["why"]) == ("skipped", "4.8 GiB are needed, 4.5 GiB are free")
    monkeypatch.setattr(realsize, "planned", raising(ConfigError("memory=3 GiB: too little")))
    record = realsize.measured("full", tmp_path)
    assert (record["state"], record["why"]) == ("skipped", "memory=3 GiB: too little")


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_arguments: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(("state", "code"), [("done", 0), ("skipped", 0), ("beyond", 1), ("failed", 1)])
def test_one_way_beyond_fails_the_command_after_all_have_run(
    state: str, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(realsize, "in_fresh_process", lambda *_: None)
    states = iter([state, "done"])
    facts = {"plan_bytes": 3 * GIB, "ratio": 1.125, "step_seconds": 7.5, "other_processes": {"ray::Engine": 2 * GIB}}
    monkeypatch.setattr(realsize, "measured", lambda *_: {"state": next(states), "why": "", "facts": facts})
    assert realsize.check(["lora", "full"], TINY, tmp_path, tmp_path) == code
    lines = (tmp_path / "realsize.txt").read_text().splitlines()
    heads = next(line for line in lines if "predicted" in line and "ratio" in line)
    (row,) = (line for line in lines if line.startswith("full"))
    for head, value in (("plan", "3"), ("ratio", "1.12"), ("step", "7.5")):
        end = heads.index(f" {head}") + 1 + len(head)
        assert row[:end].split()[-1] == value
    assert "  others: ray::Engine 2" in lines


def test_failures_of_a_command_are_kept_and_vllm_is_not_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(realsize, "run_way", raising(subprocess.SubprocessError("train ended with 2: no")))
    assert realsize.measured("lora", tmp_path)["state"] == "failed"
    monkeypatch.setattr(realsize.importlib.util, "find_spec", lambda _name: None)
    assert realsize.measured("engine", tmp_path) == {"state": "skipped", "why": "vLLM is not installed", "facts": {}}
