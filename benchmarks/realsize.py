"""Real sizes through the front door: Qwen2.5-1.5B with random weights, and its memory against the plan's prediction.

    python -m benchmarks.realsize [--out bench] [--only lora full study engine]
    python -m benchmarks.realsize --tiny      the same commands with a tiny model

lora      ebft-study train: adapters on all linear layers
full      ebft-study train: all weights in bfloat16, with activation checkpointing, where there is room for it
study     ebft-study study: the adapters again, in a worker of Ray Train
engine    the study with `backend: vllm`, where vLLM is installed

The plan (`cost/memory.py`) counts tensors; weights in shared memory, which trainer and engine map, are counted apart.
What libraries, tokenizer and data take is measured: the same command with a small model of the same vocabulary, less
the plan of that. The sum is the prediction. It is compared with the largest resident memory of the training process
(`VmHWM`), mapped files included. Exit code 1 if a ratio is beyond 15 %.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from benchmarks.gpu import machine
from benchmarks.measure import in_fresh_process
from benchmarks.settings import MODELS
from ebft_study import api
from ebft_study.config import read_run
from ebft_study.errors import ConfigError
from ebft_study.pretraining.ladder import END_OF_TEXT
from ebft_study.training.checkpoint import RECORD
from ebft_study.training.engine_memory import engine_memory
from ebft_study.training.memory import free_memory, plan_micro_batches, shapes

Facts = dict[str, Any]
TOLERANCE = 0.15
POLL_SECONDS, LOOK_SECONDS = 0.2, 2.0
"""Between two readings of memory, and between two looks for new processes."""
LIMIT_SECONDS = 1800
"""Of one command."""
TOKENS = 151_665
"""Of Qwen2.5's tokenizer."""
RUN: Facts = {
    "text_column": "text",
    "sequence_length": 64,
    "n_samples": 4,
    "completion_length": 8,
    "stride": 8,
    "batch_size": 1,
    "gamma": 0.03,
    "precision": "bfloat16",
    "steps": 2,
    "log_every_steps": 1,
    "eval_every_steps": 100,
    "sample_every_steps": 100,
    "validation_sequences": 1,
    "heldout_sequences": 1,
    "profile_lengths": [8],
    "cfm_samples": 2,
    "checkpoint_every_steps": 1,
    "keep_checkpoints": 1,
    "keep_best": 0,
}
LORA: Facts = {"lora_rank": 16, "learning_rate": 1e-4}


@dataclass(frozen=True)
class Way:
    """A command, and the settings of its run besides `RUN`."""

    settings: Facts
    trainer: str = ""
    """A part of the name of the training process; '': the command's own process trains."""


WAYS = {
    "lora": Way(LORA),
    "full": Way({"weight_dtype": "bfloat16", "activation_checkpointing": True, "learning_rate": 1e-4}),
    "study": Way(LORA, trainer="RayTrainWorker"),
    "engine": Way({**LORA, "rollout.backend": "vllm", "kv_cache_gib": 0.25}, trainer="RayTrainWorker"),
}


@dataclass(frozen=True)
class Sizes:
    """The measured model, and the small one for what is no tensor of a model."""

    model: Facts
    small: Facts
    n_tokens: int


def _shrunk(vocabulary_size: int, **sizes: int) -> Facts:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**MODELS["1.5b"], **small, "num_key_value_heads": 1, "vocab_size": vocabulary_size, **sizes}


FULL = Sizes(MODELS["1.5b"], _shrunk(MODELS["1.5b"]["vocab_size"]), TOKENS)
TINY = Sizes(_shrunk(512, hidden_size=128), _shrunk(512), 512)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ways; 0 if every ratio is within the tolerance, or there is no room for its way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of realsize.json and realsize.txt")
    parser.add_argument("--only", nargs="+", choices=WAYS, metavar="WAY", help=f"any of {', '.join(WAYS)}")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows only that the commands run")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and with it what runs
    with tempfile.TemporaryDirectory(prefix="ebft-realsize-", dir=options.out) as folder:
        return check(options.only or list(WAYS), TINY if options.tiny else FULL, options.out, Path(folder).resolve())


def check(names: Sequence[str], sizes: Sizes, out: Path, folder: Path) -> int:
    """Measure ways and write what is known after each of them."""
    in_fresh_process(write_inputs, folder, sizes)
    result: Facts = {"machine": machine(), "ways": {}}
    for name in names:
        result["ways"][name] = record = measured(name, folder)
        print(f"{name}: {record['why'] or 'done'}", flush=True)
        (out / "realsize.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "realsize.txt").write_text(page(result))
    print(page(result), flush=True)
    return int(any(record["state"] in ("failed", "beyond") for record in result["ways"].values()))


def measured(name: str, folder: Path) -> Facts:
    """A way's facts: done, `beyond` the tolerance, skipped or failed; with the reason."""
    if name == "engine" and importlib.util.find_spec("vllm") is None:
        return {"state": "skipped", "why": "vLLM is not installed", "facts": {}}
    facts: Facts = {}
    try:
        small = run_way(name, folder, "small")
        facts |= planned(name, folder, "model")
        facts["base_bytes"] = small["peak_bytes"] - small["plan_bytes"] - small["segment_bytes"]
        facts["predicted_bytes"] = facts["plan_bytes"] + facts["segment_bytes"] + facts["base_bytes"]
        free = free_memory(torch.device("cpu"))
        needed = facts["predicted_bytes"] + facts["engine_bytes"]
        if needed > free:
            why = f"{_gib(needed)} GiB are needed, {_gib(free)} GiB are free"
            return {"state": "skipped", "why": why, "facts": facts}
        facts |= run_way(name, folder, "model")
    except ConfigError as error:
        return {"state": "skipped", "why": str(error), "facts": facts}
    except subprocess.SubprocessError as error:
        return {"state": "failed", "why": str(error), "facts": facts}
    facts["ratio"] = facts["peak_bytes"] / facts["predicted_bytes"]
    if abs(facts["ratio"] - 1) > TOLERANCE:
        return {"state": "beyond", "why": f"memory is {facts['ratio']:.2f} of the prediction", "facts": facts}
    return {"state": "done", "why": "", "facts": facts}


# --- a command ---------------------------------------------------------------------------------------------------


def settings_of(name: str, folder: Path, model: str) -> Facts:
    """Settings of a way's run with one of the models."""
    return {"model": str(folder / model), "dataset": str(folder / "data.jsonl"), **RUN, **WAYS[name].settings}


def planned(name: str, folder: Path, model: str) -> Facts:
    """Bytes of a step by the plan that the run makes, and of weights in shared memory.

    Raises:
        ConfigError: it cannot fit.
    """
    config = read_run(settings_of(name, folder, model), source=name)
    plan = plan_micro_batches(config, torch.device("cpu"), world_size=1)
    engine = engine_memory(config, "cpu", shapes(config)[0])
    own = {"segment_bytes": engine.segment_bytes, "engine_bytes": engine.process_bytes}
    return {"plan_bytes": plan.peak_bytes, **own, "plan": plan.describe()}


def command_of(name: str, folder: Path, model: str, results: Path) -> list[str]:
    """The command of a way, with a file of its settings."""
    file, settings = folder / f"{name}-{model}.yaml", settings_of(name, folder, model)
    program = [sys.executable, "-m", "ebft_study"]
    if not WAYS[name].trainer:
        file.write_text(yaml.safe_dump(settings))
        return [*program, "train", str(file), "--output", str(results)]
    study = {
        "study": results.name,
        "question": "Does a real size run?",
        "axes": {"alpha": [1.0]},
        "seeds": [0],
        "run": settings,
        "resources": {"cpus_per_worker": torch.get_num_threads()},
    }
    file.write_text(yaml.safe_dump(study))
    return [*program, "study", str(file), "--storage", str(results.parent)]


def run_way(name: str, folder: Path, model: str) -> Facts:
    """Run a way's command; its memory, the plan of it, and what its tables say.

    Raises:
        ConfigError: it cannot fit.
        SubprocessError: the command failed, or took too long.
    """
    plan, results = planned(name, folder, model), folder / f"{name}-{model}"
    watch = run_watched(command_of(name, folder, model, results), folder / f"{name}-{model}.log")
    trainer = watch.named(WAYS[name].trainer)
    others = {other.name: other.peak_bytes for other in watch.processes.values() if other is not trainer}
    found = tables_of(results)
    shutil.rmtree(results)  # the next way needs the disk
    return {
        **plan,
        **found,
        "peak_bytes": trainer.peak_bytes,
        "file_bytes": trainer.file_bytes,
        "shared_bytes": trainer.shared_bytes,
        "other_processes": dict(sorted(others.items(), key=lambda item: -item[1])[:4]),
    }


def tables_of(results: Path) -> Facts:
    """Seconds and bytes of a run by its own tables and files."""
    tables = api.read_results(results)
    steps = tables.metrics[tables.metrics["step"] > 0]
    names = {"step_seconds", "sync_seconds", "checkpoint_seconds"} & set(steps.columns)
    seconds = {name: steps[name].median() for name in sorted(names)}
    saved = max((path.parent for path in results.rglob(RECORD)), key=lambda folder: folder.name)  # not Tune's own
    return {
        **{name: float(value) for name, value in seconds.items() if value == value},
        "start_seconds": float(tables.trials["startup_seconds"].iloc[0]),
        "checkpoint_bytes": sum(file.stat().st_size for file in saved.iterdir()),
    }


@dataclass
class Process:
    """A process, and its memory when it was largest."""

    name: str
    peak_bytes: int = 0
    file_bytes: int = 0
    """Part of the largest resident memory that was read: pages of mapped files, which the system may take back."""
    shared_bytes: int = 0
    """Part of it that was shared memory."""
    largest_read: int = 0


@dataclass
class Watch:
    """The memory of a process and of all that it starts, read again and again."""

    root: psutil.Process
    processes: dict[int, Process] = field(default_factory=dict)
    looked: float = 0.0
    known: list[psutil.Process] = field(default_factory=list)

    def read(self) -> None:
        """Read all processes once."""
        if time.monotonic() - self.looked > LOOK_SECONDS:
            with contextlib.suppress(psutil.Error):
                self.known = [self.root, *self.root.children(recursive=True)]
            self.looked = time.monotonic()
        for process in self.known:
            with contextlib.suppress(psutil.Error, OSError, LookupError, ValueError):  # it has ended
                self._read(process)

    def _read(self, process: psutil.Process) -> None:
        text = Path(f"/proc/{process.pid}/status").read_text()
        lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        peak, now, files, shared = (
            int(lines[key].split()[0]) * 1024 for key in ("VmHWM", "VmRSS", "RssFile", "RssShmem")
        )
        seen = self.processes.setdefault(process.pid, Process(""))
        title = process.cmdline()[0]
        if "IDLE" not in title:  # Ray's processes have the name of what they run
            seen.name = Path(title).name if title.startswith("/") else title
        seen.peak_bytes = peak
        if now > seen.largest_read:
            seen.largest_read, seen.file_bytes, seen.shared_bytes = now, files, shared

    def named(self, part: str) -> Process:
        """The largest process with a name that contains `part`; the first one for ''."""
        if not part:
            return self.processes[self.root.pid]
        return max((p for p in self.processes.values() if part in p.name), key=lambda p: p.peak_bytes)


def run_watched(command: Sequence[str], log: Path, limit_seconds: float = LIMIT_SECONDS) -> Watch:
    """Run a command to its end.

    Raises:
        SubprocessError: it failed, or took too long; the end of what it said.
    """
    started = time.monotonic()
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, process_group=0)
        watch = Watch(psutil.Process(process.pid))
        try:
            while process.poll() is None and time.monotonic() - started < limit_seconds:
                watch.read()
                time.sleep(POLL_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    if code:
        ended = " ".join(log.read_text()[-600:].split())
        raise subprocess.SubprocessError(f"{' '.join(command[2:5])} ended with {code}: {ended}")
    return watch


# --- what it needs -----------------------------------------------------------------------------------------------


def write_inputs(folder: Path, sizes: Sizes) -> None:
    """Both models and the data."""
    for name, shape in (("model", sizes.model), ("small", sizes.small)):
        write_model(folder / name, shape, sizes.n_tokens)
    write_data(folder / "data.jsonl")


def write_model(folder: Path, shape: Mapping[str, Any], n_tokens: int) -> None:
    """Configuration, tokenizer, and weights in bfloat16: one block of random numbers over and over."""
    config = Qwen2Config(**shape)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    block = torch.randn(2**22 + 3, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    weights = {}
    for name, weight in model.named_parameters():
        fixed = torch.ones if name.endswith("norm.weight") else torch.zeros
        if weight.dim() == 1:
            weights[name] = fixed(weight.shape, dtype=torch.bfloat16)
        else:
            weights[name] = block.repeat(-(-weight.numel() // len(block)))[: weight.numel()].view(weight.shape)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    tokenizer(n_tokens).save_pretrained(folder)


def tokenizer(n_tokens: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer by the rules of Qwen2 with so many tokens: those of bytes, then words of all letters."""
    alphabet, letters = sorted(pre_tokenizers.ByteLevel.alphabet()), string.ascii_lowercase
    vocabulary = {token: number for number, token in enumerate([END_OF_TEXT, *alphabet])}
    merges: list[tuple[str, str]] = []
    words = list(letters)
    for word in words:  # which grows
        for letter in letters:
            if len(vocabulary) == n_tokens:
                break
            vocabulary[word + letter] = len(vocabulary)
            merges.append((word, letter))
            words.append(word + letter)
    bpe, rules = Tokenizer(models.BPE(vocab=vocabulary, merges=merges)), Qwen2Tokenizer().backend_tokenizer
    bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = rules.normalizer, rules.pre_tokenizer, rules.decoder
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def write_data(file: Path) -> None:
    """Rows of random words, each longer than a sequence."""
    letters = torch.randint(26, (200, 80, 4), generator=torch.Generator().manual_seed(0)).tolist()
    word = functools.partial(map, string.ascii_lowercase.__getitem__)
    rows = [" ".join("".join(word(each)) for each in row) for row in letters]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


# --- the page ----------------------------------------------------------------------------------------------------

_SIZES = ("plan", "segment", "base", "predicted", "peak", "file", "checkpoint")
_SECONDS = ("start", "step", "sync", "checkpoint")
_HEADS = (
    *("plan", "shared", "base", "predicted", "measured", "ratio", "files", "saved"),
    *("start", "step", "sent", "saving"),
)


def page(result: Mapping[str, Any]) -> str:
    """A row for each way."""
    about = " · ".join(f"{name} {value}" for name, value in result["machine"].items())
    lines = ["Real sizes", about, "", f"{'':8}" + "".join(f"{head:>10}" for head in _HEADS)]
    for name, record in result["ways"].items():
        facts = record["facts"]
        gib = [facts.get(f"{size}_bytes") for size in _SIZES]
        sizes = [None if size is None else size / 2**30 for size in gib]
        cells = [*sizes[:5], facts.get("ratio"), *sizes[5:], *(facts.get(f"{what}_seconds") for what in _SECONDS)]
        lines.append(f"{name:8}" + "".join(f"{'' if cell is None else f'{cell:.3g}':>10}" for cell in cells))
        if record["why"]:
            lines.append(f"  {record['state']}: {record['why']}")
        if others := facts.get("other_processes"):
            lines.append("  others: " + ", ".join(f"{other} {_gib(size)}" for other, size in others.items()))
    return "\n".join([*lines, "", LEGEND]) + "\n"


LEGEND = """\
GiB: plan + shared + base = predicted, against the measured peak of the training process; files are a part of that,
which the system may take back; saved: a checkpoint. Seconds: from the start to the first step; a step; weights sent to
the engine; a checkpoint. others: peaks of the largest other processes, GiB."""


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.3g}"


if __name__ == "__main__":
    sys.exit(main())
