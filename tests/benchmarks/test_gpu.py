"""The check of a GPU runs on a bare machine, and outlives whatever its parts do. No test looks at a time."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import gpu, gpu_page, gpu_parts
from benchmarks.contenders import Networks, Ours
from benchmarks.gpu_parts import PARTS, TINY, Part, PhaseKernels, PhasePeaks, n_parts
from ebft_study.cost import MicroBatchPlan
from ebft_study.errors import ConfigError

ABSENT = ("pydantic", "pydantic_core", "platformdirs", "ray", "vllm", "datasets", "optuna", "wandb", "duckdb")
"""Packages that a machine with a GPU need not have (of the project's own, or of its tests)."""
BARE = f"""
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
absent = lambda name: name.partition('.')[0] in {ABSENT}
PathFinder.find_spec = classmethod(lambda cls, name, *rest: None if absent(name) else find(name, *rest))
from benchmarks.gpu import main
code = main(['--tiny', '--out', sys.argv[1]])
import tests.gpu.test_cuda, tests.conftest  # which a process of its own has run, with all packages of this machine
assert not set(filter(absent, sys.modules)), 'imported in spite of all'
sys.exit(code)
"""


def test_every_part_runs_tiny_on_a_bare_machine(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", BARE, str(tmp_path)], capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: record["state"] for name, record in result["parts"].items()} == dict.fromkeys(PARTS, "done")
    facts = {name: record["facts"] for name, record in result["parts"].items()}
    assert sum(facts["tests"]["outcomes"].values()) > 10
    assert set(facts["architectures"]["outcomes"]) == {"qwen2"}
    for name in ("step", "checkpointed", "lora_3b", "lora_7b"):
        assert all(facts[name]["seconds"][phase] > 0 for phase in (*gpu_page.PHASES, "step"))
        assert all(facts[name]["predicted_bytes"][phase] > 0 for phase in (*gpu_page.PHASES, "peak"))
    assert facts["checkpointed"]["flops"]["total"] > facts["step"]["flops"]["total"] > facts["step"]["flops"]["scoring"]
    assert facts["lora_7b"]["settings"]["lora_rank"] == 2
    assert set(facts["published"]["seconds_per_sequence"]) == {"sdpa", "eager"}
    for name in ("kernels", "kernels_checkpointed"):
        assert len(facts[name]["longest"]) == gpu_parts.LONGEST_KERNELS
    assert facts["kernels_checkpointed"]["kernels"] > facts["kernels"]["kernels"]
    page = (tmp_path / "gpu.txt").read_text()
    assert page in ended.stdout
    assert all(f"\n{name}: done" in page for name in PARTS)


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().out == (
        "error: gpu: this machine has no usable GPU. Use --tiny to run the check's parts on the CPU\n"
    )


# --- parts that do not come to an end ----------------------------------------------------------------------------


def ending(error: Exception | None) -> Part:
    def measure(_sizes: Any) -> Iterator[dict[str, Any]]:
        yield {"known": 1}
        if error:
            raise error

    return Part(measure, 100)


def test_a_part_that_fails_leaves_its_facts_and_the_other_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {
        "large": ending(ConfigError("memory=1 GiB: too little")),
        "memory": ending(torch.OutOfMemoryError("CUDA out of memory")),
        "defect": ending(RuntimeError("an illegal\naddress")),
        "last": ending(None),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.check(list(parts), TINY, tmp_path, gpu._here) == 1
    records = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {name: (record["state"], record["why"]) for name, record in records.items()} == {
        "large": ("skipped", "memory=1 GiB: too little"),
        "memory": ("failed", "out of memory: CUDA out of memory"),
        "defect": ("failed", "RuntimeError: an illegal address"),
        "last": ("done", ""),
    }
    assert all(record["facts"] == {"known": 1} for record in records.values())
    assert "in measure" in records["defect"]["traceback"]
    assert "defect: failed" in (tmp_path / "gpu.txt").read_text()
    assert gpu.check(["large", "last"], TINY, tmp_path, gpu._here) == 0


def test_something_wrong_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, code in ((1, 1), (0, 0)):
        found = {"outcomes": {"passed": 1}, "failures": {}, "wrong": wrong}
        monkeypatch.setattr(gpu, "PARTS", {"tests": Part(lambda _sizes, found=found: iter([found]), 100)})
        assert gpu.check(["tests"], TINY, tmp_path, gpu._here) == code


def test_parts_without_time_are_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.LIMIT_SECONDS < 600
    monkeypatch.setattr(gpu, "LIMIT_SECONDS", 0)
    assert gpu.check(["step"], TINY, tmp_path, lambda *_: pytest.fail("started")) == 0
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"]["step"]["state"] == "skipped"


def unfinished(known: int) -> str:
    return json.dumps({"state": gpu.UNFINISHED, "why": "", "facts": {"known": known}})


def test_a_part_runs_in_a_process_of_its_own() -> None:
    record = gpu.isolated("published", TINY, 600)
    assert (record["state"], record["why"]) == ("done", "")
    assert set(record["facts"]["seconds_per_sequence"]) == {"sdpa", "eager"}


def test_a_process_that_ends_leaves_what_it_knew() -> None:
    script = f"import os, sys; open(sys.argv[1], 'w').write('{unfinished(3)}'); os.abort()"
    record = gpu.isolated("step", TINY, 100, [sys.executable, "-c", script])
    assert record == {"state": "failed", "why": "its process ended with -6", "facts": {"known": 3}}
    record = gpu.isolated("step", TINY, 100, ["false"])
    assert record == {"state": "failed", "why": "its process ended with 1", "facts": {}}


def test_a_process_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    record = gpu.isolated("step", TINY, 2, ["sh", "-c", f"exec 3> {fifo}; sleep 500 & sleep 500"])
    assert record == {"state": "failed", "why": "more than 2 s", "facts": {}}
    ended, _, _ = select.select([reader], [], [], 100)  # it comes to its end when nobody holds the other side
    assert ended
    assert os.read(reader, 1) == b""
    os.close(reader)


# --- what is measured --------------------------------------------------------------------------------------------


def test_outcomes_of_a_report(tmp_path: Path) -> None:
    tests = tmp_path / "test_it.py"
    tests.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'not so'\n"
        "@pytest.fixture\ndef broken(): raise ValueError('no fixture')\n"
        "def test_error(broken): pass\n"
        "@pytest.mark.skip\ndef test_left_out(): pass\n"
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", str(tmp_path), str(tests)]
    subprocess.run([*command, "-p", "no:cacheprovider", f"--junitxml={report}"], capture_output=True, timeout=600)
    found = gpu_parts.outcomes(report)
    assert found["outcomes"] == {"passed": 1, "failure": 1, "error": 1, "skipped": 1}
    assert found["wrong"] == 2
    assert "not so" in found["failures"]["test_bad"]
    assert "no fixture" in found["failures"]["test_error"]


def test_the_phases_of_a_step_have_all_its_operations() -> None:
    settings = replace(TINY.step, batch_size=1)
    ours, observed = Ours(settings, Networks.from_settings(settings)), PhaseKernels()
    ours.step()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        ours.step()
    whole = [event.name() for event in profiler.profiler.kineto_results.events()]  # type: ignore[union-attr]
    ours.step(observed)
    for name in ("aten::mm", "aten::bmm", "aten::embedding", "_TokenLogProbsBackward"):
        assert observed.calls[name] == whole.count(name) > 0
    assert sum(counts["kernels"] for counts in observed.counts.values()) == sum(observed.calls.values())
    assert set(observed.counts) == set(gpu_parts.PHASES.values())


def test_the_peak_of_a_phase_is_that_of_all_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    readings, resets = iter([5, 9, 7, 3]), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: next(readings))
    peaks, device = PhasePeaks(), torch.device("cuda")
    for name in ("rollout_seconds", "scoring_seconds", "rollout_seconds", "scoring_seconds"):
        with peaks.seconds(name, device):
            pass
    assert peaks.peaks == {"rollout_seconds": 7, "scoring_seconds": 9}
    assert resets == [device] * 4


def test_parts_are_counted_as_a_step_cuts_them() -> None:
    settings = replace(TINY.step, sequence_lengths=(24,), batch_size=5)
    assert [len(settings.shape.anchors)] == [5]
    counts = {(2, 2): 9, (5, 5): 1, (1, 5): 5, (5, 4): 2}
    assert {plan: n_parts(settings, MicroBatchPlan(*plan)) for plan in counts} == counts


def test_the_page_compares_with_the_prediction_and_the_published_way() -> None:
    gib = 2.0**30
    phases = {"rollouts": 1.0, "features": 1.0, "scoring": 1.5, "optimizer": 0.5}
    step = {
        "settings": {**vars(TINY.step), "batch_size": 16},
        "ceiling_flops_per_second": 8e14,
        "flops": {"total": 8e14},
        "plan": {"micro_batch_size": 16, "anchors_at_once": 16},
        "parts": 8,
        "predicted_bytes": {**dict.fromkeys(phases, 10 * gib), "peak": 10 * gib},
        "measured_bytes": {**dict.fromkeys(phases, 5 * gib), "peak": 12 * gib},
        "first_step_seconds": 30.0,
        "seconds": {**phases, "step": 4.0},
        "utilisation": {"step": 0.25},
    }
    published = {"seconds_per_sequence": {"sdpa": 2.1875}}
    records = {
        name: {"state": "done", "why": "", "facts": facts, "part_seconds": 1.0}
        for name, facts in (("step", step), ("published", published))
    }
    lines = gpu_page.page({"machine": {"device": "H"}, "parts": records}).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("  ") and line.split()}
    assert rows["all"] == ["4", "0.25", "12", "10", "1.2"]
    assert rows["rollouts"] == ["1", "5", "10", "0.5"]
    assert "6.94 h an epoch of 100k sequences" in "\n".join(lines)  # 4 s for 16 of them
    assert any("35 s a batch; our gradient is 10 times as fast" in line for line in lines)  # 35 s, against 4 - 0.5
