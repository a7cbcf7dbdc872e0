"""What readers of a large study cost: the commands `status` and `report`, and its files before they are merged.

    make scale          (or: python -m tests.scale.readers --trials 1000 --reports 200 --files 10000)

Each command is a process of its own: its seconds are those of the processor, imports included, and its memory is the
most that it had at a time. The exit code is 1 where an aim of issue 16 is missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np

from ebft_study import results
from ebft_study.study.folder import study_yaml
from tests import synthetic_study
from tests.studies import SOURCE, resolved

RATES = [round(1e-5 * 1.5**k, 8) for k in range(10)]
AXES = {"alpha": [0.0, 0.25, 0.5, 0.75, 1.0], "gamma": [0.0, 0.03, 0.1, 0.3], "completion_length": [1, 2, 4, 8, 16]}
LOAD = ("-c", "import sys, ebft_study.results as r; print(len(r.load(sys.argv[1]).metrics))")
COMMANDS = {"status": ("-m", "ebft_study", "status"), "report": ("-m", "ebft_study", "report"), "load": LOAD}
AIMS = {
    ("merged", "status"): (2.0, math.inf),
    ("merged", "report"): (10.0, math.inf),
    ("unmerged", "load"): (math.inf, 1.0),
}
"""Most seconds of the processor, and most GiB."""
_MEASURED = """
import json, os, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, done.stdout, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20]))
"""


def write_merged(folder: Path, n_trials: int, n_reports: int) -> None:
    """A finished study: a configuration per trial, a file per trial, all other files merged."""
    axes = {"learning_rate": RATES[: max(1, math.ceil(n_trials / 100))], **AXES}
    keys = list(itertools.product(*axes.values()))[:n_trials]
    names, random = list(axes), np.random.default_rng(0)
    effects = {key: (0.1 * key[1] - 0.2 * key[2], -0.01 * key[3] * random.random()) for key in keys}
    statuses = {(key, 0): "stopped" for key in keys[::25]} | {(key, 0): "failed" for key in keys[13::100]}
    synthetic_study.write_study(
        folder,
        effects=effects,
        settings=lambda key: dict(zip(names, key, strict=True)),
        seeds=(0,),
        steps=10 * (n_reports - 1),
        log_every=10,
        statuses=statuses,
        with_scores=True,
    )
    run = {"steps": 10 * (n_reports - 1), "eval_every_steps": 10}
    content = {"study": folder.name, "question": "How large can a study be?", "run": run, "axes": axes}
    study_yaml.write(folder, resolved(content).spec, SOURCE, provenance={})
    rows = results.read_table(folder, "trials")
    hidden = [*(folder / "results/trials").iterdir()]
    recorder = results.StudyRecorder(folder, study=folder.name)
    settings = {column.name for column in results.schema.hyperparameters()}
    with mock.patch("os.fsync"):
        for row in rows.to_dict("records"):
            cells = {name: plain(value) for name, value in row.items()}
            state = {name: value for name, value in cells.items() if name not in settings}
            recorder.trial({**state, "hyperparameters": {name: cells[name] for name in settings}})
    assert not any(path.exists() for path in hidden)


def plain(cell: object) -> object:
    value = results.cell_value(cell)
    return value.item() if isinstance(value, np.generic) else value


def write_unmerged(folder: Path, n_files: int, n_reports: int) -> None:
    """A running study: a file per report, of trials that have not ended."""
    synthetic_study.write_spec(folder)
    values = {f"{name}": 1.0 for name in list(results.METRICS)[:1]}
    names = [c.name for c in results.schema.columns("metrics") if c.type == "float64"][:30]
    values = {name: 1.0 + 0.1 * i for i, name in enumerate(names)}
    with mock.patch("os.fsync"):
        for number in range(math.ceil(n_files / n_reports)):
            trial_id = f"t{number:04d}"
            recorder = results.TrialRecorder(folder, study=folder.name, trial_id=trial_id, attempt=1)
            for step in range(min(n_reports, n_files - number * n_reports)):
                recorder.metrics(10 * step, values)
