"""One trial: a Ray Tune function that runs a Ray Train TorchTrainer and passes its reports on to Tune.

    Tune driver            trial (this module)                 Train controller          workers
    -----------            -------------------                 ----------------          -------
    starts the trial  -->  fit() in a thread  ---------------> starts the workers  ----> training loop
                           waits for the relay <-- put -------- ReportForwarder     <--- ray.train.report
    decides       <------  ray.tune.report

The loop waits in `ray.train.report` until the controller has polled it, the controller in `put` until the trial has
taken the item before, the trial in `ray.tune.report` until Tune has decided. A crash anywhere ends `fit`, the trial
raises, and Tune starts it again, as a new attempt from the newest checkpoint, until `tune_hooks.Observer` has counted
too many crashes. An error of the user (`EbftError`) is not a crash: the trial ends normally and reports the failure.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.tune
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback

from ebft_study.errors import EbftError, StorageError
from ebft_study.results import Fence
from ebft_study.storage import StoragePath, storage_errors, storage_path
from ebft_study.study.driver import relay
from ebft_study.study.folder import attempts
from ebft_study.study.population import exploit
from ebft_study.study.spec.study_spec import ResourcesSpec
from ebft_study.study.spec.trial_task import TrialTask
from ebft_study.training import checkpoint
from ebft_study.training.recorded import Attempt, train_recorded
from ebft_study.training.worker import train_worker

Report = Callable[[dict[str, Any], StoragePath | None], None]

_POINTER = "pointer.json"
_END = "end"
_POLL_SECONDS = 10.0


class ReportForwarder(ray.train.UserCallback):  # type: ignore[misc]
    """Lives in the Train controller; hands rank 0's report to the trial."""

    def __init__(self, box: str) -> None:
        self._box = box

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: ray.train.Checkpoint | None
    ) -> None:
        path = checkpoint.path if checkpoint else None
        ray.get(relay.find().put.remote(self._box, (metrics[0], path)))


def run_trial(config: dict[str, Any]) -> None:
    """The Tune trainable; `config` is a `TrialTask`. The last report holds `outcome`."""
    task = TrialTask.from_config(config)
    if task.failed:
        ray.tune.report({"step": 0, "attempt": 0, "outcome": {"status": "failed", "reason": task.failed}})
        return
    try:
        _run_attempt(task)
    except StorageError as error:
        ray.tune.report({"step": 0, "attempt": 0, "outcome": _failed(error)})


def _run_attempt(task: TrialTask) -> None:
    study_folder, trial_id = storage_path(task.study_folder), task.trial_id
    fence = Fence(study_folder, task.generation)
    fence.check()
    start_from = _checkpoint_to_start_from(study_folder, task)
    number = attempts.begin(study_folder, trial_id, generation=task.generation)
    attempt = Attempt(
        study=task.study,
        study_folder=task.study_folder,
        trial_id=trial_id,
        label=task.label,
        attempt=number,
        start_from=str(start_from) if start_from else None,
        loop=task.loop,
        gpu_fraction=task.resources_spec.gpu_fraction,
        generation=task.generation,
        plugins=task.plugins,
    )
    fit = _fit_workers if task.resources_spec.workers_per_trial else _fit_in_process
    keep, objective = task.run_config.checkpoint, task.objective_spec
    # This attempt may write no other checkpoint before it ends.
    last: dict[str, Any] = {
        "best_checkpoint": attempts.best(study_folder, trial_id, objective, since=task.since_attempt)
    }

    def report(metrics: dict[str, Any], kept: StoragePath | None) -> None:
        fence.check()
        last.update(metrics)
        if kept is not None:
            last["best_checkpoint"] = attempts.prune(
                study_folder, trial_id, keep, objective, since=task.since_attempt, until=number
            )
        with storage_errors(study_folder):
            _report({**last, "attempt": number}, kept)

    try:
        outcome = fit(task, attempt, report)
    except Exception:
        fence.check()  # what Ray makes of a study that is gone says less
        raise
    ray.tune.report({**last, "attempt": number, "outcome": outcome})


def tune_resources(resources: ResourcesSpec, slot: Mapping[str, float]) -> ray.tune.PlacementGroupFactory:
    """The resources that Tune reserves for a trial: one `slot`, and everything that no worker group reserves."""
    bundle = dict(slot)
    if not resources.workers_per_trial:
        bundle["CPU"] = resources.cpus_per_worker
        if resources.gpus_per_worker:
            bundle["GPU"] = resources.gpus_per_worker
    return ray.tune.PlacementGroupFactory([bundle])


# --- training in the trial's own process -----------------------------------------------------------------------


def _fit_in_process(task: TrialTask, attempt: Attempt, report: Report) -> dict[str, Any]:
    """TorchTrainer's local mode: no controller and no workers to start, for models that are small compared to these."""
    attempt_folder = attempts.folder(attempt.study_folder, attempt.trial_id, attempt.attempt)

    def on_report(metrics: dict[str, float], written: Path | None) -> None:
        kept = attempts.keep_checkpoint(attempt_folder, written, step=int(metrics["step"])) if written else None
        report({**metrics, "host": socket.gethostname()}, kept)

    def train() -> dict[str, Any]:
        torch.set_num_threads(task.resources_spec.cpus_per_worker)
        return train_recorded(task.run_config, attempt, on_report=on_report)

    trainer = TorchTrainer(
        train,
        scaling_config=ray.train.ScalingConfig(num_workers=0),
        run_config=ray.train.RunConfig(
            name=attempt_folder.name, storage_path=str(storage_path(attempt.study_folder).local_dir / "train")
        ),
    )
    try:
        return dict(trainer.fit().return_value)
    except EbftError as error:
        return _failed(error)


# --- training in a worker group --------------------------------------------------------------------------------


def _fit_workers(task: TrialTask, attempt: Attempt, report: Report) -> dict[str, Any]:
    """`trainer.fit()` in a thread, while its reports arrive through the relay."""
    attempt_folder = attempts.folder(attempt.study_folder, attempt.trial_id, attempt.attempt)
    fit = _FitThread(_trainer(task, attempt), attempt.name)
    for metrics, path in fit.reports():
        report(metrics, attempt_folder / Path(path).name if path else None)
    return fit.outcome()


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """A TorchTrainer without Ray Data, whose manager would be one more process for every trial."""

    def _create_default_callbacks(self) -> list[Any]:
        return [c for c in super()._create_default_callbacks() if not isinstance(c, DatasetsCallback)]


def _trainer(task: TrialTask, attempt: Attempt) -> TorchTrainer:
    resources = task.resources_spec
    gpus = resources.gpus_per_worker
    per_worker = {"CPU": resources.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    return _Trainer(
        train_worker,
        train_loop_config={
            "run": task.run,
            "threads": resources.cpus_per_worker,
            "attempt": dataclasses.asdict(attempt),
        },
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers_per_trial, use_gpu=bool(gpus), resources_per_worker=per_worker
        ),
        run_config=ray.train.RunConfig(
            name=attempt.name,
            **(storage_path(attempt.study_folder) / "train").for_ray,
            callbacks=[ReportForwarder(attempt.name)],
            # All checkpoints stay for Ray, which supports one order only; `attempts` prunes them.
            # Retries are Tune's alone: with both, a trial would be tried (a+1)(b+1) times. A group that cannot
            # start is tried three times, and not for ever.
            failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=3),
        ),
    )


class _FitThread:
    """`trainer.fit()` in a thread; its reports arrive through the relay."""

    def __init__(self, trainer: TorchTrainer, box: str) -> None:
        self._trainer, self._box, self._relay = trainer, box, relay.find()
        self._error: BaseException | None = None
        self._returned: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._fit, daemon=True, name="fit")

    def reports(self) -> Iterator[tuple[dict[str, Any], str | None]]:
        """Yield (metrics, checkpoint path or None) until the workers have ended."""
        self._thread.start()
        while True:
            item = ray.get(self._relay.take.remote(self._box, _POLL_SECONDS))
            if item == (_END,) or (item is None and not self._thread.is_alive()):
                self._thread.join()
                return
            if item is not None:
                yield item[0]

    def outcome(self) -> dict[str, Any]:
        """The loop's result; an error of the user counts as an outcome, a crash is raised."""
        if self._error is None:
            return self._returned
        user_error = _user_error(self._error)
        if user_error is None:
            raise self._error
        return _failed(user_error)

    def _fit(self) -> None:
        try:
            self._returned = self._trainer.fit().return_value
        except BaseException as error:
            self._error = error
        finally:
            ray.get(self._relay.put.remote(self._box, _END))


def _failed(error: EbftError) -> dict[str, Any]:
    """The outcome of a user's error: trying again would fail the same way.

    Full or failing storage is no fault of the trial: it is interrupted, and so is its study.
    """
    return {"status": "interrupted" if isinstance(error, StorageError) else "failed", "reason": str(error)}


def _user_error(error: BaseException) -> EbftError | None:
    """The user's error among the errors of the workers, if there is one."""
    for failure in getattr(error, "worker_failures", {}).values():
        if isinstance(failure, EbftError):
            return failure
    return None


def _report(metrics: dict[str, Any], kept: StoragePath | None) -> None:
    """Report to Tune; its checkpoint is a pointer to the one that Train keeps."""
    if kept is None:
        ray.tune.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, _POINTER).write_text(json.dumps({"path": str(kept)}))
        ray.tune.report(metrics, checkpoint=ray.tune.Checkpoint.from_directory(folder))


def _checkpoint_to_start_from(study_folder: StoragePath, task: TrialTask) -> StoragePath | None:
    """The checkpoint that Tune's pointer names (a retry), else the newest complete one (a resumed study).

    After an exploit the checkpoint is on disk; Tune's pointer may lead to an earlier one.
    """
    pointer = ray.tune.get_checkpoint() if task.lineage is None else None
    if pointer is not None:
        with pointer.as_directory() as folder:
            target = storage_path(json.loads(Path(folder, _POINTER).read_text())["path"])
        if checkpoint.step_of(target) is not None:
            return target
    return exploit.start_from(study_folder, task.trial_id, task.lineage)
