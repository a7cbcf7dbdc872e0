"""Mutate the package one line at a time and run the tests that should notice: `make mutants`.

`mutants.yaml` lists, by file, pairs of a text, which occurs once there, and its replacement, with the tests that must
fail. Everything happens in copies of the tree. The exit code is 1 if a mutant survived, 2 if one could not be tried.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
LONGEST_SECONDS = 1800.0
PROCESSES = multiprocessing.get_context("forkserver")
"""Processes that begin with the libraries loaded: that takes longer than most tests."""
LIBRARIES = ["torch", "transformers.models.auto.modeling_auto", "pandas", "pyarrow.parquet", "pydantic", "pytest"]
RAN = 100
"""Added to pytest's exit code, so that a process that ends for another reason is not taken for tests that failed."""
VERDICTS = {RAN: "survived", RAN + 1: "caught"}
"""Any other exit code is an error: the tests did not run."""


@dataclass(frozen=True)
class Mutant:
    """A change of one file, and the tests that must fail with it. Paths are relative to the tree."""

    file: str
    find: str
    replace: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {self.find!r} -> {self.replace!r}"

    def mutated(self, tree: Path) -> str:
        """The file's text with the change.

        Raises:
            ValueError: the text to find does not occur exactly once.
        """
        text = (tree / self.file).read_text()
        if text.count(self.find) != 1:
            raise ValueError(f"{self.file}: {self.find!r} occurs {text.count(self.find)} times, not once")
        return text.replace(self.find, self.replace)


def read_mutants() -> list[Mutant]:
    groups = yaml.safe_load((Path(__file__).parent / "mutants.yaml").read_text())
    return [
        Mutant(group["file"], find, replace, tuple(group["tests"].split()))
        for group in groups
        for find, replace in group["mutants"]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="try mutants with TEXT in their file or change")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    PROCESSES.set_forkserver_preload(LIBRARIES)
    mutants = [mutant for mutant in read_mutants() if options.only in str(mutant)]
    with tempfile.TemporaryDirectory(prefix="ebft-mutants-") as folder:
        original = Path(folder) / "original"
        copy_tree(original)
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        say(f"{len(mutants)} mutants; first {' '.join(tests)} without any")
        with ThreadPoolExecutor(options.jobs) as pool:
            shares = filter(None, (tests[job :: options.jobs] for job in range(options.jobs)))
            ran = list(pool.map(functools.partial(run_tests, original), shares))
        if not ran or any(code != RAN for code, _ in ran):
            say("\n".join([*(output for code, output in ran if code != RAN), "the tests fail without any mutation"]))
            return 2
        verdicts = try_all(mutants, original, jobs=options.jobs)
    counts = Counter(verdicts.values())
    for mutant, verdict in verdicts.items():
        if verdict != "caught":
            print(f"{verdict}: {mutant}")
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in ("caught", "survived", "error")))
    return 2 if counts["error"] else int(counts["survived"] > 0)


def copy_tree(target: Path) -> None:
    """Copy the files that git knows or would know, as they are in the working tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def try_all(mutants: list[Mutant], original: Path, *, jobs: int) -> dict[Mutant, str]:
    """Verdict of every mutant; each job has a copy of the tree."""
    trees: queue.Queue[Path] = queue.Queue()
    for job in range(jobs):
        trees.put(Path(shutil.copytree(original, original.parent / f"copy-{job}")))
    verdicts: dict[Mutant, str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(try_one, mutant, trees): mutant for mutant in mutants}
        for future in as_completed(futures):
            mutant = futures[future]
            verdicts[mutant], seconds, output = future.result()
            say(f"{len(verdicts):3d}/{len(mutants)} {verdicts[mutant]:8s} {seconds:4.0f} s  {mutant}")
            if verdicts[mutant] == "error":
                say(output)
    return {mutant: verdicts[mutant] for mutant in mutants}


def try_one(mutant: Mutant, trees: queue.Queue[Path]) -> tuple[str, float, str]:
    """Verdict, seconds and the end of the tests' output."""
    started, tree = time.monotonic(), trees.get()
    path = tree / mutant.file
    # With its old time, the restored file still matches its compiled one.
    before = shutil.copy2(path, tree.parent / f"{tree.name}-before")
    try:
        path.write_text(mutant.mutated(tree))
        code, output = run_tests(tree, mutant.tests)
    except ValueError as error:
        code, output = -1, str(error)
    finally:
        shutil.copy2(before, path)
        trees.put(tree)
    return VERDICTS.get(code, "error"), time.monotonic() - started, output


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit code of `pytest_in` and the end of its output; its temporary files are its own."""
    with tempfile.TemporaryDirectory(dir=tree.parent) as own:
        process = PROCESSES.Process(target=pytest_in, args=(tree, tests, Path(own)))
        process.start()
        process.join(LONGEST_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
        output = Path(own) / "output"
        code = -1 if process.exitcode is None else process.exitcode
        return code, output.read_text()[-3000:] if output.exists() else ""


def pytest_in(tree: Path, tests: Sequence[str], own: Path) -> None:
    """Run pytest on a copy of the tree and exit with `RAN` and its code; in a process of its own."""
    for descriptor in (1, 2):
        os.dup2(os.open(own / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    os.environ |= {"PYTHONPATH": str(tree), "EBFT_STUDY_CACHE": str(own / "cache")}
    # Compiled files come from the tests without a mutation alone.
    sys.dont_write_bytecode = tree.name != "original"
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # this module's own package, of the tree that is copied
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--basetemp", str(own / "tests")]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # a library with a plugin is loaded already
    sys.exit(RAN + int(pytest.main([*options, *tests])))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
