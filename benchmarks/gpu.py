"""Check the GPU path of the package on this machine: one command, below ten minutes, one JSON file and one page.

    python -m benchmarks.gpu [--out bench] [--only step kernels]     with a GPU
    python -m benchmarks.gpu --tiny                                  the same parts, tiny, on a CPU

Needs torch, transformers, peft, pytest, psutil, pyarrow and PyYAML, and no other package of the project. Every part
(`gpu_parts.py`) runs in a process of its own with a time limit: whatever fails, hangs or runs out of memory leaves the
others alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from benchmarks.gpu_page import one_line, page
from benchmarks.gpu_parts import FULL, PARTS, ROOT, TINY, Facts, Sizes
from ebft_study.errors import EbftError

LIMIT_SECONDS = 560
"""Of the whole check."""
UNFINISHED = "unfinished"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; 0 if every part was measured or does not fit, and nothing is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of gpu.json and gpu.txt")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"any of {', '.join(PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU: shows only that the check runs")
    parser.add_argument("--child", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        print("error: gpu: this machine has no usable GPU. Use --tiny to run the check's parts on the CPU")
        return 2
    sizes = TINY if options.tiny else FULL
    if options.child:
        (name,) = options.only
        measure(name, sizes, keep=lambda record: _write(options.child, json.dumps(record)))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    run = _here if options.tiny else isolated
    return check(options.only or list(PARTS), sizes, options.out, run)


def check(names: Sequence[str], sizes: Sizes, out: Path, run: Callable[[str, Sizes, float], Facts]) -> int:
    """Run parts and write what is known after each of them."""
    started, records = time.monotonic(), dict[str, Facts]()
    result = {"machine": machine(), "parts": records}
    for name in names:
        left = LIMIT_SECONDS - (time.monotonic() - started)
        limit = min(PARTS[name].limit_seconds, left)
        _say(started, f"{name}: starts, at most {limit:.0f} s")
        began = time.monotonic()
        record = run(name, sizes, limit) if left > 0 else {"state": "skipped", "why": "no time is left", "facts": {}}
        records[name] = {**record, "part_seconds": time.monotonic() - began}
        _say(started, one_line(name, records[name]))
        _write(out / "gpu.json", json.dumps(result, indent=1) + "\n")
        _write(out / "gpu.txt", page(result))
    print(page(result), flush=True)
    failed = (r["state"] == "failed" or r["facts"].get("wrong") for r in records.values())
    return int(any(failed))


def _write(file: Path, text: str) -> None:
    """Replace a file, so that whoever is ended meanwhile leaves the old one."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


def _say(started: float, text: str) -> None:
    print(f"[{time.monotonic() - started:4.0f} s] {text}", flush=True)


def measure(name: str, sizes: Sizes, keep: Callable[[Facts], object]) -> Facts:
    """Measure a part and `keep` its record whenever there are new facts."""
    record: Facts = {"state": UNFINISHED, "why": "", "facts": {}}
    keep(record)
    try:
        for facts in PARTS[name].measure(sizes):
            record["facts"] |= facts
            keep(record)
        record["state"] = "done"
    except EbftError as error:
        record |= {"state": "skipped", "why": str(error)}
    except torch.OutOfMemoryError as error:
        record |= {"state": "failed", "why": f"out of memory: {' '.join(str(error).split())[:300]}"}
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        record |= {"state": "failed", "why": why, "traceback": traceback.format_exc()[-4000:]}
    keep(record)
    return record


def _here(name: str, sizes: Sizes, _limit: float) -> Facts:
    return measure(name, sizes, keep=lambda _record: None)


def isolated(name: str, sizes: Sizes, limit: float, command: Sequence[str] = ()) -> Facts:
    """A part's record from a process group of its own, which is ended after `limit` seconds."""
    tiny = ("--tiny",) if sizes is TINY else ()
    program = command or (sys.executable, "-m", "benchmarks.gpu", *tiny, "--only", name, "--child")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.json"
        process = subprocess.Popen([*program, str(file)], cwd=ROOT, process_group=0)
        why = f"more than {limit:.0f} s"
        try:
            why = f"its process ended with {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):  # compilers that it has started, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        try:
            record: Facts = json.loads(file.read_text())
        except (OSError, ValueError):
            record = {"state": UNFINISHED, "facts": {}}
    return {**record, "state": "failed", "why": why} if record["state"] == UNFINISHED else record


def machine() -> Mapping[str, Any]:
    """The machine and its software."""
    facts: Facts = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "cpus": os.cpu_count(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        asked = ["git", "rev-parse", "HEAD"]
        facts["commit"] = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    if not torch.cuda.is_available():
        return {"device": "cpu", **facts}
    properties = torch.cuda.get_device_properties(0)
    of_gpu = {"processors": properties.multi_processor_count, "memory_bytes": properties.total_memory}
    return {"device": properties.name, "cuda": torch.version.cuda, **of_gpu, **facts}


if __name__ == "__main__":
    sys.exit(main())
