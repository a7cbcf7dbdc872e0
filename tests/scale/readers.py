"""What readers of a large study cost: the commands `status` and `report`, and result files before they are merged.

    make scale          (or: python -m tests.scale.readers --trials 1000 --reports 200 --files 10000)

Each command is a process of its own: its seconds are those of the processor, imports included, and its memory is the
most that it had. The exit code is 1 where an aim is missed; a busy machine takes more seconds of the processor, too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from ebft_study import results
from ebft_study.results import schema
from ebft_study.study.folder import study_yaml
from tests import synthetic_study
from tests.studies import SOURCE, resolved

AXES: dict[str, list[Any]] = {
    "learning_rate": [round(1e-5 * 1.5**k, 8) for k in range(10)],
    "alpha": [0.0, 0.25, 0.5, 0.75, 1.0],
    "gamma": [0.0, 0.03, 0.1, 0.3],
    "completion_length": [1, 2, 4, 8, 16],
}
COMMANDS = {
    "status": ("-m", "ebft_study", "status"),
    "report": ("-m", "ebft_study", "report"),
    "load": ("-c", "import sys, ebft_study.results as r; print(len(r.load(sys.argv[1]).metrics), 'rows')"),
}
AIMS = {("merged", "status"): (2, None), ("merged", "report"): (10, None), ("unmerged", "load"): (None, 1)}
"""Most seconds of the processor, and most GiB."""
_MEASURED = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, done.stdout, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20]))
"""


def write_merged(folder: Path, n_trials: int, n_reports: int) -> None:
    """A study that has ended: a configuration per trial, a file per row of `trials`, and one of each other table."""
    keys = list(itertools.islice(itertools.product(*AXES.values()), n_trials))
    random, steps = np.random.default_rng(0), 10 * (n_reports - 1)
    synthetic_study.write_study(
        folder,
        effects={key: (0.1 * key[1] - 0.2 * key[2], -0.01 * key[3] * random.random()) for key in keys},
        settings=lambda key: dict(zip(AXES, key, strict=True)),
        seeds=(0,),
        steps=steps,
        log_every=10,
        statuses={(key, 0): "stopped" for key in keys[::25]} | {(key, 0): "failed" for key in keys[13::100]},
        with_scores=True,
    )
    run = {"steps": steps, "eval_every_steps": 10}
    content = {"study": folder.name, "question": "How large can a study be?", "run": run, "axes": AXES}
    study_yaml.write(folder, resolved(content).spec, SOURCE, provenance={})
    settings = {column.name for column in schema.hyperparameters()}
    rows, recorder = results.read_table(folder, "trials"), results.StudyRecorder(folder, study=folder.name)
    with mock.patch("os.fsync"):
        for row in rows.to_dict("records"):
            cells = {str(name): _plain(value) for name, value in row.items()}
            state = {name: value for name, value in cells.items() if name not in settings}
            recorder.trial({**state, "hyperparameters": {name: cells[name] for name in settings}})


def _plain(cell: Any) -> Any:
    value = results.cell_value(cell)
    return value.item() if isinstance(value, np.generic) else value


def write_unmerged(folder: Path, n_files: int, n_reports: int) -> None:
    """A study that runs: a file per report."""
    synthetic_study.write_spec(folder)
    measured = [c.name for c in schema.columns("metrics") if c.type == "float64"][:30]
    values = {name: 1.0 + 0.1 * number for number, name in enumerate(measured)}
    with mock.patch("os.fsync"):
        for number, first in enumerate(range(0, n_files, n_reports)):
            recorder = results.TrialRecorder(folder, study=folder.name, trial_id=f"t{number:04d}", attempt=1)
            for step in range(min(n_reports, n_files - first)):
                recorder.metrics(10 * step, values)


def measure(folder: Path, command: str) -> tuple[float, float]:
    """CPU seconds and peak GiB of a command on a study."""
    called = [sys.executable, *COMMANDS[command], str(folder)]
    done = subprocess.run([sys.executable, "-c", _MEASURED, *called], stdout=subprocess.PIPE, text=True, check=True)
    code, printed, seconds, gib = json.loads(done.stdout)
    if code:
        raise SystemExit(f"{command} of {folder.name} ended with {code}: {printed}")
    return seconds, gib


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="at most 1000")
    parser.add_argument("--reports", type=int, default=200, help="of each trial")
    parser.add_argument("--files", type=int, default=10_000, help="unmerged ones")
    options = parser.parse_args()
    missed = 0
    with tempfile.TemporaryDirectory(prefix="ebft-readers-") as place:
        merged, unmerged = Path(place, "merged"), Path(place, "unmerged")
        write_merged(merged, options.trials, options.reports)
        write_unmerged(unmerged, options.files, options.reports)
        print(f"merged: {options.trials} trials of {options.reports} reports; unmerged: {options.files} files")
        for folder, command in itertools.product((merged, unmerged), COMMANDS):
            seconds, gib = measure(folder, command)
            most_seconds, most_gib = AIMS.get((folder.name, command), (None, None))
            missed += seconds > (most_seconds or math.inf) or gib > (most_gib or math.inf)
            aim = f"   aim: {most_seconds} s" if most_seconds else f"   aim: {most_gib} GiB" if most_gib else ""
            print(f"{folder.name:9} {command:7} {seconds:7.1f} s of the processor {gib:6.2f} GiB{aim}", flush=True)
        size = (merged / "report.html").stat().st_size
        print(f"report.html of the merged study: {size / 2**20:.1f} MiB")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
