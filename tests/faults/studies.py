"""The studies that faults happen to, a session of one in a process of its own, and what is right at its end."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import yaml

from ebft_study import __main__ as command
from ebft_study import results
from ebft_study.results import reader
from ebft_study.results.study_recorder import StudyRecorder
from ebft_study.results.writer import FileSequence
from ebft_study.storage import StoragePath, storage_path
from ebft_study.study.driver import runner, session
from ebft_study.study.folder import lock, study_yaml
from ebft_study.training import checkpoint, recorded
from tests.faults import tune
from tests.faults.calls import Calls, Fault, Shared, set_clock

NOTHING = Fault("")
_NOTE_MODULES = "EBFT_FAULTS_NOTE_MODULES"
PATIENCE_SECONDS = 120.0
"""A session that takes longer hangs; one takes less than a second on an idle machine."""
SLEEP_SECONDS = 2.0
ENDED = ("finished", "stopped", "failed")
TIMED = re.compile(r"study|written_at|attempt|generation|.*_at|.*_seconds|host|best_checkpoint")
"""Columns in which a study that was disturbed may differ."""
_RUN = {
    "steps": 6, "eval_every_steps": 2, "checkpoint_every_steps": 2, "log_every_steps": 1, "keep_best": 1,
    "features": {"backend": "local"},
}  # fmt: skip
_COMMON = {
    "question": "Does a study come to the same end, whatever happens to it?",
    "run": _RUN,
    "resources": {"workers_per_trial": 0, "max_failures": 3},
    "budget": {"max_concurrent_trials": 2},
}
RATES = [0.125, 0.25, 0.5]  # sums of powers of two, so that what is computed from them is exact
STUDIES: dict[str, dict[str, Any]] = {
    "grid": {"axes": {"learning_rate": RATES}, "seeds": [0]},
    "store": {"axes": {"learning_rate": RATES[:2]}, "seeds": [0], "run": {**_RUN, "steps": 4}},
    "optuna": {
        "axes": {"learning_rate": {"distribution": "uniform", "low": 0.0, "high": 1.0}},
        "seeds": [0],
        "search": {
            "algorithm": "optuna",
            "sampler": "random",
            "num_configurations": len(RATES),
            "known": [{"learning_rate": rate} for rate in RATES],
        },
    },
}


def write_study_file(path: Path, name: str) -> None:
    path.write_text(yaml.safe_dump({"study": name, **_COMMON, **STUDIES[name]}))


def imitate() -> None:
    """Put the imitations of training and Tune in place; in the process from which all sessions are forked."""
    recorded.LOOP = "tests.faults.loop:train"
    preparing = ModuleType("ebft_study.training.prepare")
    preparing.prepare = lambda *_, **__: {"data": {"fake": {"fingerprint": "0"}}}  # type: ignore[attr-defined]
    sys.modules[preparing.__name__] = preparing
    study_yaml.git_revision = lambda: None
    runner._report = lambda folder, console: None  # type: ignore[assignment]
    session.own.node_is_alive = lambda: True
    os.fsync = lambda descriptor: None
    # A driver of a store that sleeps is to be missed within seconds.
    lock.BEAT_SECONDS, lock.STALE_SECONDS = 0.2, SLEEP_SECONDS


def warm_up(home: Path) -> None:
    """Import what a session imports, so that sessions forked from this process find it there."""
    home.mkdir()
    write_study_file(home / "study.yaml", "optuna")
    os.environ[_NOTE_MODULES] = "1"
    session = Session(home, "study", str(home / "study.yaml"), "--storage", str(home / "storage"))
    del os.environ[_NOTE_MODULES]
    session.wait()
    assert session.code == 0, session.text
    for name in (home / "modules").read_text().splitlines():
        with contextlib.suppress(Exception):
            importlib.import_module(name)


class Session:
    """One command, such as `resume`, on the study in `home`, as a group of processes."""

    def __init__(self, home: Path, *arguments: str, fault: Fault = NOTHING, shared: Shared | None = None) -> None:
        self.home, self.shared = home, shared or Shared()
        self.output = home / f"output-{len(list(home.glob('output-*')))}"
        self.began = time.monotonic()
        self.code: int | None = None
        self._child = os.fork()
        if self._child == 0:
            _run_session(home, list(arguments), fault, self.shared, self.output)
        with contextlib.suppress(OSError):
            os.setpgid(self._child, self._child)

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def poll(self) -> int | None:
        if self.code is None:
            process, status = os.waitpid(self._child, os.WNOHANG)
            if process:
                self.code = os.waitstatus_to_exitcode(status)
                self.kill()
        return self.code

    def signal(self, number: int) -> None:
        os.killpg(self._child, number)

    def kill(self) -> None:
        """End what is left of the group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child, signal.SIGKILL)
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])
        with contextlib.suppress(ChildProcessError):
            while True:  # the harness adopts orphans
                os.waitpid(-self._child, 0)

    def wait(self, meanwhile: Callable[[], None] | None = None) -> bool:
        """Wait for its end; False where it hangs. `meanwhile` is called once, when one of its processes has stopped."""
        while self.poll() is None:
            if self.shared.stopped:
                process, self.shared.stopped = self.shared.stopped, 0
                _wait_until_stopped(process)
                if meanwhile:
                    meanwhile()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)
            if time.monotonic() - self.began > PATIENCE_SECONDS:
                self.kill()
                return False
            time.sleep(0.003)
        return True


def _wait_until_stopped(process: int) -> None:
    for _ in range(2000):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "TZ":
                return
        time.sleep(0.001)


def _run_session(home: Path, arguments: list[str], fault: Fault, shared: Shared, output: Path) -> None:
    code = 70
    try:
        os.setpgid(0, 0)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), write_through=True)
        acknowledged = os.open(home / "acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        temporary = home / "tmp"
        temporary.mkdir(exist_ok=True)
        errors = home.with_name(f"{home.name}-errors")  # Tune's own files do not fail here
        errors.mkdir(exist_ok=True)
        os.environ.update(TMPDIR=str(temporary), EBFT_STUDY_CACHE=str(home / "cache"))
        set_clock(shared)
        _acknowledge(acknowledged)

        def begin(process: str) -> Callable[[], None]:
            calls = Calls(home, process, fault, shared)
            write = Path.write_text
            calls.install()
            return lambda: write(home.parent / f"{home.name}-{process}.calls", json.dumps(calls.counts)) and None  # type: ignore[func-returns-value]

        starter = tune.TrialStarter(begin)
        session._tune = lambda *arguments: tune.play(starter, errors, *arguments)  # type: ignore[assignment]
        finish = begin("driver")
        sys.argv = ["ebft-study", *arguments]
        try:
            command.main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if os.environ.get(_NOTE_MODULES):
            (home / "modules").write_text("\n".join(sys.modules))
        finish()
    except BaseException:
        traceback.print_exc()
        code = 71
    os._exit(code)


def _acknowledge(descriptor: int) -> None:
    """Note every row once its writer was told that it is kept."""
    write_file, write_trial, note = FileSequence.write, StudyRecorder.trial, os.write

    def files(self: FileSequence, table: str, rows: Any) -> None:
        write_file(self, table, rows)
        for row in rows:
            note(descriptor, json.dumps([table, [row.get(key) for key in reader._KEYS[table]]]).encode() + b"\n")

    def trial(self: StudyRecorder, row: Any) -> None:
        write_trial(self, row)
        if row.get("status") in ENDED:
            note(descriptor, json.dumps(["ended", [row["trial_id"], row["attempt"]]]).encode() + b"\n")

    FileSequence.write = files  # type: ignore[method-assign]
    StudyRecorder.trial = trial  # type: ignore[method-assign]


def acknowledged(home: Path) -> Iterator[tuple[str, tuple[Any, ...]]]:
    path = home / "acknowledged"
    for line in path.read_text().splitlines() if path.exists() else ():
        table, key = json.loads(line)
        yield table, tuple(key)


def in_process(function: Callable[[], Any]) -> Any:
    """What a function returns in a process of its own, as JSON; raises what it prints where it fails."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = json.dumps([function(), ""])
        except BaseException:
            answer = json.dumps([None, traceback.format_exc()])
        with os.fdopen(writing, "w") as file:
            file.write(answer)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(child, 0)
    value, error = json.loads(text or '[null, "died"]')
    if error:
        raise RuntimeError(error)
    return value


Tables = dict[str, dict[str, Any]]


def tables(folder: Any) -> dict[str, Any]:
    """Every table as key -> row, without what may differ; problems; and which best checkpoints are there."""
    loaded = results.load(folder)
    found: dict[str, Any] = {"problems": loaded.problems}
    for table in results.TABLES:
        frame: pd.DataFrame = getattr(loaded, table)
        keys = reader._KEYS[table]
        columns = [name for name in frame.columns if not TIMED.fullmatch(name) and name not in keys]
        found[table] = {
            json.dumps([_plain(row[key]) for key in keys]): [str(_plain(row[name])) for name in columns]
            for row in frame.to_dict("records")
        }
    found["attempts"] = {row["trial_id"]: int(row["attempt"]) for row in loaded.trials.to_dict("records")}
    found["best"] = {}
    for row in loaded.trials.to_dict("records"):
        path = loaded.best_checkpoint(row["trial_id"])
        found["best"][row["trial_id"]] = checkpoint.step_of(path) if path is not None else None
    found["leftovers"] = leftovers(loaded.folder)
    return found


def _plain(value: Any) -> Any:
    """A cell as a value of JSON; a column of whole numbers becomes one of fractions where another row has none."""
    value = results.cell_value(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def leftovers(folder: StoragePath) -> list[str]:
    return [str(path) for path in folder.local.rglob("*.tmp")] if folder.local else []


def folder_of(storage: str, name: str) -> StoragePath:
    base, _, query = storage.partition("?")
    return storage_path(f"{base}/{name}" + (f"?{query}" if query else ""))
