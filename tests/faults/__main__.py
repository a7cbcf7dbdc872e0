"""Faults over the whole life of a study, and what they leave of it: `make faults`.

    python -m tests.faults --seed 7 --kinds enospc_write --faults 20

Each fault happens to a small study of its own: its file calls fail, its processes are killed or stopped, its files are
damaged, its clock steps, its storage vanishes. Then the study is resumed without faults and compared with one that was
left alone. The last line printed is JSON: faults by kind, and what went wrong. The exit code is 1 if anything did, or
if a kind never happened.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fnmatch
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow

from tests.faults import ordeal, studies
from tests.faults.kinds import KINDS
from tests.s3_server import s3_server

_PR_SET_CHILD_SUBREAPER = 36


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=["*"], help="names, or patterns such as 'flip_*'")
    parser.add_argument("--index", type=int, help="only this one of each kind, as named by a line of problems")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="studies at a time")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no fault after this time")
    parser.add_argument("--keep", action="store_true", help="leave the folders of the studies, and say where they are")
    parser.add_argument("--folder", type=Path, help="where they are written; default: the temporary folder")
    options = parser.parse_args(arguments)
    chosen = [name for name in KINDS if any(fnmatch.fnmatch(name, pattern) for pattern in options.kinds)]
    if not chosen:
        parser.error(f"--kinds: none of these is one of {', '.join(KINDS)}")
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    root = Path(tempfile.mkdtemp(prefix="ebft-faults-", dir=options.folder))
    try:
        needs_store = any(name.startswith("s3_") for name in chosen)
        with s3_server() if needs_store else contextlib.nullcontext("") as query:
            return conduct(root, chosen, query, options)
    finally:
        if options.keep:
            say(f"left in {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)


def conduct(root: Path, chosen: list[str], query: str, options: argparse.Namespace) -> int:
    began = time.monotonic()
    options.until = began + 60 * options.minutes
    pyarrow.set_cpu_count(1)  # no threads: processes are forked from here
    studies.imitate()
    studies.warm_up(root / "warm")
    calm = {name: ordeal.undisturbed(root, name) for name in ("grid", "optuna")}
    if query:
        calm["store"] = ordeal.undisturbed(root, "store", query)
    say(f"prepared in {time.monotonic() - began:.0f} s")
    plan = [(chosen[number % len(chosen)], number // len(chosen)) for number in range(options.faults)]
    if options.index is not None:
        plan = [(name, options.index) for name in chosen]
    reports = []
    for each in in_processes(root, calm, plan, query, options):
        reports.append(each)
        if each["problems"] or not each["fired"]:
            say(f"{each['run']} ({each['study']}): {each['problems'] or 'did not happen'} {each['damaged']}")
            for note in each["notes"][:4]:
                say(f"    {note}")
    return conclude(reports, chosen, options, time.monotonic() - began)


def in_processes(
    root: Path, calm: dict[str, ordeal.Calm], plan: list[tuple[str, int]], query: str, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Reports of the ordeals of a plan, a few at a time, as they end."""
    reading, writing = os.pipe()
    for part in range(options.processes):
        if os.fork() == 0:
            os.close(reading)
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
            try:
                with os.fdopen(writing, "w") as file:
                    for kind, index in plan[part :: options.processes]:
                        if time.monotonic() > options.until:
                            break
                        each = ordeal.run(root, calm, kind, index, options.seed, query=query, keep=options.keep)
                        file.write(json.dumps(each) + "\n")
                        file.flush()
            except BaseException:
                studies.traceback.print_exc()
                os._exit(1)
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        for line in file:
            yield json.loads(line)
    for _ in range(options.processes):
        _, status = os.wait()
        assert status == 0, "the harness itself failed"


def conclude(reports: list[dict[str, Any]], chosen: list[str], options: argparse.Namespace, seconds: float) -> int:
    fired = Counter(each["kind"] for each in reports if each["fired"])
    problems = Counter[str]()
    for each in reports:
        problems.update(each["problems"])
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    tried = {each["kind"] for each in reports}
    never = [name for name in chosen if name in tried and not fired[name]]
    counts = {
        "faults": sum(fired.values()),
        "kinds": len(fired),
        "seconds": round(seconds),
        "processor_seconds": round(used.ru_utime + used.ru_stime),
        "seed": options.seed,
        "by_kind": dict(fired),
        "never_happened": never,
        "harmless_and_not_named": dict(Counter(each["kind"] for each in reports if each["unnamed"])),
        "problems": {name: problems[name] for name in ordeal.PROBLEMS},
    }
    print(json.dumps(counts))
    return int(any(problems.values()) or bool(never))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
