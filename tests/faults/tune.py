"""Tune's part of a study without Ray: trials are processes of their own, which report through sockets.

The driver's code is the real one but for `session._tune`, and a trial's but for `ray.tune.report` and `TorchTrainer`.
Trials are forked by a process that was forked before the driver opened anything: what a library does not survive a fork
with (connections of an object store) is not there yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import socket
import tempfile
import traceback
from collections import ChainMap, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray.tune
from ray.tune import TuneError
from ray.tune.schedulers import TrialScheduler

from ebft_study import results
from ebft_study.errors import EbftError
from ebft_study.storage import StoragePath
from ebft_study.study.driver import session, trial
from ebft_study.study.driver.monitor import Monitor
from ebft_study.study.driver.tune_hooks import Observer, StudySearcher, StudyStopper
from ebft_study.study.folder.history import History
from ebft_study.study.resolving.resolved import ResolvedStudy
from ebft_study.study.search.listed import Search

_LONGEST = 2**17  # bytes of a message


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class TrialStarter:
    """Forks processes of trials. `begin` is called in each with the trial's identifier; what it returns, at its end."""

    def __init__(self, begin: Callable[[str], Callable[[], None]]) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket, driver = ours, os.getpid()
        if os.fork():
            its.close()
            return
        ours.close()
        die_with_parent()
        if os.getppid() != driver:
            os._exit(0)
        while True:
            message, descriptors, _, _ = socket.recv_fds(its, _LONGEST, 1)
            if not message:
                os._exit(0)
            if not os.fork():
                die_with_parent()
                its.close()
                channel = socket.socket(fileno=descriptors[0])
                config, pointer, error_file = pickle.loads(message)
                finish = begin(config["trial_id"])
                run_trial(config, pointer, Path(error_file), channel, finish)
            os.close(descriptors[0])

    def start(self, config: dict[str, Any], pointer: str | None, error_file: Path) -> socket.socket:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        socket.send_fds(self._socket, [pickle.dumps((config, pointer, str(error_file)))], [its.fileno()])
        its.close()
        return ours


def run_trial(
    config: dict[str, Any], pointer: str | None, error_file: Path, channel: socket.socket, finish: Callable[[], None]
) -> None:
    """The life of a trial's process."""

    def report(metrics: dict[str, Any], checkpoint: Any = None) -> None:
        path = None
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                path = Path(folder, trial._POINTER).read_text()
        channel.send(pickle.dumps((metrics, path)))
        if not channel.recv(8):
            os._exit(0)

    def get_checkpoint() -> Any:
        if pointer is None:
            return None
        folder = tempfile.mkdtemp()
        Path(folder, trial._POINTER).write_text(pointer)
        return ray.tune.Checkpoint.from_directory(folder)

    ray.tune.report, ray.tune.get_checkpoint = report, get_checkpoint
    trial.TorchTrainer = _LocalTrainer
    try:
        channel.send(pickle.dumps(os.getpid()))
        trial.run_trial(config)
        finish()
        channel.send(pickle.dumps("over"))
    except BaseException:
        with error_file.open("a") as file:  # as Tune does
            file.write(f"\nFailure # 1 (occurred at now)\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)


class _LocalTrainer:
    """A TorchTrainer that runs the loop where it is."""

    def __init__(self, train: Callable[[], Any], **_: Any) -> None:
        self._train = train

    def fit(self) -> Any:
        return SimpleNamespace(return_value=self._train())


class _Trial:
    """As much of Tune's trial as our hooks look at, and its process."""

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        self.config, self.trial_id = config, config["trial_id"]
        self.last_result: dict[str, Any] = {}
        self.error_file = str(folder / f"{self.trial_id}.errors")
        self.pointer: str | None = None
        self.process = 0
        self.channel: socket.socket | None = None

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config

    def start(self, starter: TrialStarter) -> None:
        self.channel = starter.start(self.config, self.pointer, Path(self.error_file))
        first = self.channel.recv(_LONGEST)
        self.process = pickle.loads(first) if first else 0

    def next(self) -> Any:
        """What it reports, 'over', or None where its process has died."""
        assert self.channel
        with contextlib.suppress(ConnectionError):
            if message := self.channel.recv(_LONGEST):
                return pickle.loads(message)
        return None

    def resume(self) -> None:
        assert self.channel
        with contextlib.suppress(OSError):
            self.channel.send(b"on")

    def end(self) -> None:
        assert self.channel
        self.channel.close()
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process, signal.SIGKILL)


def play(
    starter: TrialStarter,
    errors: Path,
    folder: StoragePath,
    study: ResolvedStudy,
    past: History,
    search: Search,
    monitor: Monitor,
    stopper: StudyStopper,
    fence: results.Fence,
) -> None:
    """In place of `session._tune`."""
    scheduler = session._scheduler(folder, study, past, monitor, lambda trial_id, attempt: None, stopper.request_stop)
    observer = Observer(
        search,
        monitor,
        lambda trial_id, attempt: None,
        ChainMap(stopper.rule_reasons, getattr(scheduler, "reasons", {})),
        lambda reason: stopper.request_stop(session._storage_failed(fence, reason)),
        max_failures=study.spec.resources.max_failures,
    )
    searcher = StudySearcher(
        search,
        monitor,
        lambda each: session.trial_task(folder, study, each, None, fence.generation),
        give_up=stopper.request_stop,
    )
    running: deque[_Trial] = deque()
    again: deque[_Trial] = deque()
    try:
        while True:
            while len(running) < study.concurrency:
                if again:
                    each = again.popleft()
                elif isinstance(config := searcher.suggest(""), dict):
                    each = _Trial(config, errors)
                else:
                    break
                observer.on_trial_start(0, [], each)
                each.start(starter)
                running.append(each)
            if not running:
                return
            each = running.popleft()
            with _as_tune_raises():
                state = _one_event(each, observer, scheduler, stopper)
            if state == "running":
                running.append(each)
            elif state == "again":
                again.append(each)
            elif state == "over":
                with contextlib.suppress(EbftError, OSError):  # as in the background
                    results.compact(folder)
            if stopper.stop_all():
                return
    finally:
        for each in running:
            each.end()


@contextlib.contextmanager
def _as_tune_raises() -> Any:
    """Tune replaces an error of its callbacks by one of its own that has the traceback for a message."""
    try:
        yield
    except Exception:
        raise TuneError(traceback.format_exc()) from None


def _one_event(each: _Trial, observer: Observer, scheduler: Any, stopper: Any) -> str:
    message = each.next()
    if message is None:
        each.end()
        observer.on_trial_recover(0, [], each)
        return "again"
    if message == "over":
        each.end()
        observer.on_trial_complete(0, [], each)
        return "over"
    metrics, pointer = message
    each.pointer = pointer or each.pointer
    result = {**metrics, "config": each.config}
    stop = stopper(each.trial_id, result)
    stop = stop or scheduler.on_trial_result(None, each, result) == TrialScheduler.STOP
    observer.on_trial_result(0, [], each, result)
    each.last_result = result
    if stop:
        each.end()
        observer.on_trial_complete(0, [], each)
        return "over"
    each.resume()
    return "running"
