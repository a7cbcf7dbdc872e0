"""What Ray Tune's own snapshot of a large study costs its driver: `python -m tests.scale.snapshot --trials 2000`.

Tune saves the state of its trials once an hour and at the end; nothing here ever reads it. Every trial has reported
once. No process is started for a trial.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray.train._internal.storage import StorageContext
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.registry import register_trainable

from ebft_study.study.spec.trials import Trial as StudyTrial
from tests.scale.simulate import study_of
from tests.studies import task_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    options = parser.parse_args()
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    register_trainable("nothing", lambda settings: None)
    with tempfile.TemporaryDirectory(prefix="ebft-snapshot-") as folder:
        measure(Path(folder), options.trials)


def measure(folder: Path, n_trials: int) -> None:
    storage = StorageContext(storage_path=str(folder), experiment_dir_name="train")
    controller = TuneController(storage=storage)
    for trial in study_of(n_trials, 50).trials:
        controller.add_trial(_as_tune_has_it(trial, storage))
    for name in ("first", "second"):
        begun, processor = time.perf_counter(), time.process_time()
        controller.checkpoint(force=True, wait=True)
        seconds, processor = time.perf_counter() - begun, time.process_time() - processor
        print(f"{name} snapshot of {n_trials} trials: {seconds:.2f} s, of which processor {processor:.2f} s")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"on disk: {size / 2**20:.1f} MiB")


def _as_tune_has_it(trial: StudyTrial, storage: StorageContext) -> Any:
    settings = task_of(trial).to_config()
    stub = Trial("nothing", config=settings, stub=True, storage=storage)
    stub.update_last_result({"step": 10, "ce_loss": 3.0, "cfm_loss": 2.0, "config": settings, "training_iteration": 1})
    return stub


if __name__ == "__main__":
    main()
