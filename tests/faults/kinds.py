"""The kinds of faults, each as a story of one study: how it begins, what happens to it, and how it goes on."""

from __future__ import annotations

import errno
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults.calls import OPERATIONS, Fault
from tests.faults.studies import SLEEP_SECONDS
from tests.s3_server import tell

if TYPE_CHECKING:
    from tests.faults.ordeal import Ordeal

Story = Callable[["Ordeal"], None]
KINDS: dict[str, Story] = {}
DAY = 86400.0
ERRORS = {
    "enospc": (errno.ENOSPC, ("open", "write", "fsync", "rename", "mkdir")),
    "eio": (errno.EIO, ("open", "read", "write", "fsync", "rename", "unlink", "listdir")),
    "erofs": (errno.EROFS, ("open", "rename", "unlink", "mkdir")),
    "estale": (errno.ESTALE, ("open", "read", "rename", "listdir", "stat")),
}
FILES = {
    "metrics": "results/metrics/t*.parquet",
    "evaluations": "results/evaluations/t*.parquet",
    "scores": "results/scores/t*.parquet",
    "samples": "results/samples/t*.parquet",
    "events": "results/events/[td]*.parquet",
    "compacted": "results/*/compacted-*.parquet",
    "manifest": "results/*/.compacted.json",
    "trials": "results/trials/t*.parquet",
    "trials_copy": "results/trials/.t*.copy",
    "pending": "results/trials/waiting~*.parquet",
    "study_yaml": "study.yaml",
    "study_yaml_copy": ".study.yaml.copy",
    "checkpoint_json": "train/*/checkpoint_*/checkpoint.json",
    "weights": "train/*/checkpoint_*/*.safetensors",
    "owner": ".owner",
    "journal": "optuna.journal",
}


def kind(name: str) -> Callable[[Story], Story]:
    def register(story: Story) -> Story:
        KINDS[name] = story
        return story

    return register


# --- file calls that fail --------------------------------------------------------------------------------------


def failing(error: int, operation: str) -> Story:
    def story(ordeal: Ordeal) -> None:
        process, at = ordeal.some_call((operation,))
        lasting, half = ordeal.random.random() < 0.5, ordeal.random.random() < 0.5
        ordeal.strike(Fault("error", process, at, (operation,), error, lasting=lasting, after=half))

    return story


for _name, (_error, _operations) in ERRORS.items():
    for _operation in _operations:
        KINDS[f"{_name}_{_operation}"] = failing(_error, _operation)


# --- processes -------------------------------------------------------------------------------------------------


def killed(processes: str, *, everything: bool = False) -> Story:
    def story(ordeal: Ordeal) -> None:
        process, at = ordeal.some_call(OPERATIONS, processes)
        after = ordeal.random.random() < 0.5
        ordeal.strike(Fault("kill", process, at, after=after, everything=everything))

    return story


KINDS["kill_driver"] = killed("driver")
KINDS["kill_trial"] = killed("t*")
KINDS["kill_all"] = killed("*", everything=True)


@kind("kill_in_write")
def _(ordeal: Ordeal) -> None:
    process, at = ordeal.some_call(("write",))
    ordeal.strike(Fault("torn", process, at, ("write",), everything=ordeal.random.random() < 0.5))


def _kill_at_random(ordeal: Ordeal) -> None:
    running = ordeal.start()
    wait = ordeal.random.uniform(0.0, 1.5 * ordeal.calm.seconds)
    while running.poll() is None and time.monotonic() - running.began < wait:
        time.sleep(0.003)
    running.kill()
    ordeal.fired = True
    ordeal.ended(running, killed=True)


KINDS["kill_at_random"] = _kill_at_random


def stopped(processes: str) -> Story:
    def story(ordeal: Ordeal) -> None:
        process, at = ordeal.some_call(OPERATIONS, processes)

        def meanwhile() -> None:
            other = ordeal.session("resume", ordeal.name)
            ordeal.expect(other.wait(), "a second driver hangs", "hangs")
            refused = other.code == 2 and "another process is running this study" in other.text
            unknown = other.code == 2 and "study" in other.text and not ordeal.has_record
            ordeal.expect(refused or unknown, f"a second driver ends with {other.code}: {other.text[-300:]}", "twice")

        ordeal.strike(Fault("stop", process, at), meanwhile)

    return story


KINDS["stop_driver"] = stopped("driver")
KINDS["stop_trial"] = stopped("t*")


# --- clocks ----------------------------------------------------------------------------------------------------


def clock(sign: float) -> Story:
    def story(ordeal: Ordeal) -> None:
        process, at = ordeal.some_call(OPERATIONS)
        seconds = sign * ordeal.random.choice([1.0, 3600.0, DAY, 400 * DAY])
        if ordeal.random.random() < 0.5:
            ordeal.strike(Fault("clock", process, at, seconds=seconds))
        else:  # between two sessions
            ordeal.cut_short()
            ordeal.shared.clock, ordeal.fired = seconds, True
            ordeal.cut_short()

    return story


KINDS["clock_back"] = clock(-1.0)
KINDS["clock_forth"] = clock(1.0)


# --- damage ----------------------------------------------------------------------------------------------------


def flip(path: Path, random: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        path.write_bytes(content)


def truncate(path: Path, random: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: random.randrange(len(content))] if content else b"")


def delete(path: Path, random: random.Random) -> None:
    path.unlink()


def damaged(name: str, damage: Callable[[Path, random.Random], None]) -> Story:
    def story(ordeal: Ordeal) -> None:
        if name == "journal":
            ordeal.choose("optuna")
        moment = ordeal.random.choice(["killed", "live", "over"])
        if moment == "over" and name not in ("pending", "owner"):
            ordeal.strike(Fault(""))
            ordeal.damage(FILES[name], damage)
            return
        for _ in range(6):  # until there is such a file at that moment
            process, at = ordeal.some_call(OPERATIONS, "driver")
            if moment == "live":
                fault = Fault("stop", process, at)
                ordeal.strike(fault, lambda: ordeal.damage(FILES[name], damage), fresh=True)
            else:
                ordeal.strike(Fault("kill", process, at, everything=True), fresh=True)
                ordeal.damage(FILES[name], damage)
            if ordeal.damaged:
                return
            ordeal.start_over()

    return story


for _file in FILES:
    KINDS[f"flip_{_file}"] = damaged(_file, flip)
    KINDS[f"truncate_{_file}"] = damaged(_file, truncate)
    KINDS[f"delete_{_file}"] = damaged(_file, delete)


# --- lock and storage ------------------------------------------------------------------------------------------


@kind("lock_deleted")
def _(ordeal: Ordeal) -> None:
    process, at = ordeal.some_call(OPERATIONS, "driver")
    others = []

    def meanwhile() -> None:
        if not ordeal.has_record:
            return
        for name in (".lock", ".owner"):
            Path(ordeal.path, name).unlink(missing_ok=True)
        others.append(ordeal.session("resume", ordeal.name))

    ordeal.strike(Fault("stop", process, at), meanwhile)
    for other in others:
        ordeal.ended(other)


def vanished(*, returns: bool) -> Story:
    def story(ordeal: Ordeal) -> None:
        process, at = ordeal.some_call(OPERATIONS)
        aside = ordeal.home / "aside"
        gone = False

        def meanwhile() -> None:
            nonlocal gone
            if ordeal.has_record:
                ordeal.path.rename(aside)
                gone = True

        running = ordeal.strike(Fault("stop", process, at), meanwhile)
        if not gone:
            return
        ordeal.expect(running.code not in (0, None), "ends with code 0 though its storage vanished", "silent")
        left = [p for p in ordeal.path.rglob("*") if p.is_file()] if ordeal.path.exists() else []
        ordeal.expect(not left, f"writes the study again: {[str(p) for p in left[:3]]}", "different")
        shutil.rmtree(ordeal.path, ignore_errors=True)
        if returns:
            aside.rename(ordeal.path)
        else:
            shutil.rmtree(aside)
            ordeal.gone = True

    return story


KINDS["storage_renamed"] = vanished(returns=True)
KINDS["storage_deleted"] = vanished(returns=False)


# --- object stores ---------------------------------------------------------------------------------------------


def failing_store(do: str, *, times: int = 1, seconds: float = 0.0) -> Story:
    def story(ordeal: Ordeal) -> None:
        if ordeal.random.random() < 0.5:
            _kill_at_random(ordeal)
        at = ordeal.random.randint(1, ordeal.calm.requests)
        tell(ordeal.query, ordeal.home.name, do=do, at=at, times=times, seconds=seconds)
        running = ordeal.start()
        running.wait()
        ordeal.fired = tell(ordeal.query, ordeal.home.name)["fired"] > 0
        ordeal.ended(running)

    return story


KINDS["s3_error"] = failing_store("error")
KINDS["s3_slow_down"] = failing_store("slow_down", times=3)
KINDS["s3_lost_answer"] = failing_store("lost")
KINDS["s3_reset"] = failing_store("reset")
KINDS["s3_reset_after"] = failing_store("reset_after")
KINDS["s3_latency"] = failing_store("wait", times=5, seconds=0.3)
KINDS["s3_dead"] = failing_store("error", times=10**9)
KINDS["s3_kill"] = lambda ordeal: _kill_at_random(ordeal)


@kind("s3_sleep")
def _(ordeal: Ordeal) -> None:
    """A driver sleeps until another has taken its study over, and wakes up."""
    running = ordeal.start()
    wait = ordeal.random.uniform(0.3, 1.0) * ordeal.calm.seconds
    while running.poll() is None and time.monotonic() - running.began < wait:
        time.sleep(0.003)
    if running.poll() is not None or not ordeal.has_record:
        running.kill()
        return
    running.signal(signal.SIGSTOP)
    time.sleep(1.5 * SLEEP_SECONDS)
    ordeal.fired = True
    other = ordeal.session("resume", ordeal.name)
    ordeal.ended(other)
    ordeal.expect(other.code == 0, f"no other driver takes over: {other.text[-400:]}", "different")
    running.signal(signal.SIGCONT)
    ordeal.ended(running)
    ordeal.expect(running.code != 0, f"a driver that lost its study ends with 0: {running.text[-400:]}", "silent")
