"""Programs in other languages than Python (MultiPL-E), in bubblewrap: no network, nothing of the user's files.

The tests are part of the program, so a program can end before them with success: for evaluation, never as a reward.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ebft_study.config import VerifierConfig
from ebft_study.errors import ConfigError
from ebft_study.evaluation.downstream.items import Item
from ebft_study.verifiers import Judgement, Problem

SYSTEM = Path("/usr")
FOLDERS = ("/bin", "/sbin", "/lib", "/lib64", "/etc/alternatives", "/etc/ld.so.cache", "/etc/java-*")
STARTUP_SECONDS = 20.0
"""Added to the limit on processor time: compilers, and machines that are busy."""
PROCESSES, MEMORY_KIB, FILE_BLOCKS, TEMPORARY_BYTES = 256, 2 * 2**20, 2**16, 2**28
FAILED = "sandbox"
"""Beginning of the reason where bubblewrap did not start the program."""


@dataclass(frozen=True)
class Toolchain:
    """How programs of a language run: a shell command in a folder with `file`, after `compile`."""

    program: str
    file: str
    run: str
    compile: str = "true"


TOOLCHAINS: Mapping[str, Toolchain] = {
    "cpp": Toolchain("g++", "program.cpp", "/tmp/program", "g++ -std=c++17 -o /tmp/program program.cpp"),
    "rs": Toolchain("rustc", "program.rs", "/tmp/program", "rustc -o /tmp/program program.rs"),
    "js": Toolchain("node", "program.js", "node program.js"),
    "sh": Toolchain("bash", "program.sh", "bash program.sh"),
    "pl": Toolchain("perl", "program.pl", "perl program.pl"),
    "lua": Toolchain("lua", "program.lua", "lua program.lua"),
    "rb": Toolchain("ruby", "program.rb", "ruby program.rb"),
    "php": Toolchain("php", "program.php", "php program.php"),
    "r": Toolchain("Rscript", "program.r", "Rscript program.r"),
    "jl": Toolchain("julia", "program.jl", "julia program.jl"),
    "rkt": Toolchain("racket", "program.rkt", "racket program.rkt"),
}
"""Language as MultiPL-E calls it -> its toolchain. Others need libraries beside the compiler, or projects."""


def obstacle(language: str) -> str | None:
    """The reason why programs of a language cannot be run here; None: they can."""
    toolchain = TOOLCHAINS.get(language)
    if toolchain is None:
        return f"there is no way to run {language!r}; known: {', '.join(TOOLCHAINS)}"
    path = shutil.which(toolchain.program)
    if path is None:
        return f"{toolchain.program} is not installed"
    if SYSTEM not in Path(path).resolve().parents:
        return f"{toolchain.program} is {path}, and programs see {SYSTEM} alone"
    if shutil.which("bwrap") is None:
        return "bwrap (bubblewrap), which programs are locked up with, is not installed"
    return None


class ForeignTests:
    """1 where the program of an answer and its tests ends with success, else 0."""

    lowest, highest = 0.0, 1.0

    def __init__(self, language: str, items: Sequence[Item], config: VerifierConfig) -> None:
        self.name = f"{language} in bubblewrap"
        self._toolchain, self._seconds = TOOLCHAINS[language], config.test_cpu_seconds
        self._suffixes = {item.problem.prompt: item.suffix for item in items}
        self._pool = ThreadPoolExecutor(config.verifier_workers)
        with tempfile.TemporaryDirectory() as folder:
            tried = _run(Path(folder), "true", seconds=STARTUP_SECONDS)
        if tried != "passed":
            raise ConfigError(f"benchmark multipl_e: programs cannot be locked up here ({tried}). Leave it out")

    def judge(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Judgement]:
        """See `Verifier.judge`."""
        return list(self._pool.map(self._judge, problems, completions))

    def _judge(self, problem: Problem, completion: str) -> Judgement:
        if not completion.strip():
            return Judgement(self.lowest, False, "unparsed")
        limits = f"ulimit -t {max(1, round(self._seconds))}"
        command = f"{self._toolchain.compile} && {limits} && exec {self._toolchain.run}"
        with tempfile.TemporaryDirectory() as folder:
            program = f"{problem.prompt}{completion}{self._suffixes[problem.prompt]}"
            (Path(folder) / self._toolchain.file).write_text(program, encoding="utf-8", errors="replace")
            reason = _run(Path(folder), command, seconds=STARTUP_SECONDS + self._seconds)
        if reason.startswith(FAILED):
            return Judgement(None, True, reason)
        return Judgement(float(reason == "passed"), True, reason)

    def close(self) -> None:
        """See `Verifier.close`."""
        self._pool.shutdown()


def _run(folder: Path, command: str, *, seconds: float) -> str:
    """Run a shell command in a read-only copy of a folder, locked up; returns `passed`, or what happened."""
    limits = f"ulimit -u {PROCESSES} -d {MEMORY_KIB} -f {FILE_BLOCKS} -c 0"
    arguments = [
        *("bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"),
        *("--setenv", "PATH", "/usr/local/bin:/usr/bin:/bin", "--setenv", "HOME", "/tmp"),
        *("--ro-bind", str(SYSTEM), str(SYSTEM)),
        *(part for place in _existing() for part in ("--ro-bind", place, place)),
        *("--proc", "/proc", "--dev", "/dev", "--size", str(TEMPORARY_BYTES), "--tmpfs", "/tmp"),
        *("--ro-bind", str(folder), "/program", "--chdir", "/program"),
        *("/bin/bash", "-c", f"{limits} && echo began && exec >/dev/null && {command}"),
    ]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        try:
            done = subprocess.run(arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, timeout=seconds)
        except subprocess.TimeoutExpired:
            return "timeout"
        if done.returncode == 0:
            return "passed"
        began = os.fstat(output.fileno()).st_size > 0
        errors.seek(max(os.fstat(errors.fileno()).st_size - 500, 0))
        words = errors.read().decode(errors="replace").strip().splitlines()[-1:]
    return f"{'failed' if began else FAILED}: {words[0] if words else f'exit code {done.returncode}'}"


def _existing() -> list[str]:
    """The folders besides /usr that programs need; links into it are resolved by bwrap."""
    return [str(path) for pattern in FOLDERS for path in Path("/").glob(pattern.removeprefix("/")) if path.exists()]
