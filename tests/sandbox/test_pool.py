"""The pool: order, threads, workers that die, hosts that die, and machines without containment."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ebft_study.errors import SandboxError
from ebft_study.sandbox import Limits, Program, Sandbox, Tests, __main__, levels
from ebft_study.sandbox.inside import zygote
from ebft_study.sandbox.worker import Worker, WorkerError
from tests.sandbox.test_hostile import descendants

TESTS = Tests(assertions=("assert f(3) == 4",), entry_points=("f",))
GOOD = Program("def f(n): return n + 1", TESTS)
SLEEP = Program("import time\ndef f(n): time.sleep(10**6)", TESTS)
LOOSE = Limits(cpu_seconds=30.0, wall_seconds=300.0)


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 240  # for machines that are busy
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def processes(sandbox: Sandbox) -> set[int]:
    keepers = {worker.process.pid for worker in sandbox._workers if worker.process}
    return keepers.union(*map(descendants, keepers))


def test_verdicts_keep_the_order_and_equal_programs_are_judged_once(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = []
    original = Worker.judge

    def judge(self: Worker, program: Program, limits: Limits):  # type: ignore[no-untyped-def]
        judged.append(program.code)
        return original(self, program, limits)

    monkeypatch.setattr(Worker, "judge", judge)
    codes = [f"def f(n): return {n}" for n in (4, 5, 4, 6, 4, 5)]
    with Sandbox(workers=3, level=level, limits=LOOSE) as sandbox:
        judged.clear()
        verdicts = sandbox.judge([Program(code, TESTS) for code in codes])
    assert [verdict.passed for verdict in verdicts] == [code.endswith("4") for code in codes]
    assert sorted(judged) == sorted(set(codes))


def test_threads_share_a_sandbox_and_several_sandboxes_live_at_once(level: str) -> None:
    results: dict[int, list[bool]] = {}
    with Sandbox(workers=2, level=level, limits=LOOSE) as one, Sandbox(level=level, limits=LOOSE) as other:

        def work(number: int) -> None:
            sandbox = one if number % 3 else other
            programs = [Program(f"def f(n): return n + {1 + k % 2}  # {number} {k}", TESTS) for k in range(4)]
            results[number] = [verdict.passed for verdict in sandbox.judge(programs)]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {number: [True, False] * 2 for number in range(6)}


def test_a_worker_outlives_the_thread_that_started_it(level: str) -> None:
    with Sandbox(level=level, limits=LOOSE) as sandbox:
        sandbox._workers[0].close()
        thread = threading.Thread(target=sandbox._workers[0].judge, args=(GOOD, LOOSE))
        thread.start()
        thread.join()
        before = processes(sandbox)
        assert sandbox.judge([GOOD])[0].passed
        assert processes(sandbox) == before


@pytest.mark.parametrize("victim", ["keeper", "zygote"])
def test_a_worker_that_dies_is_replaced(victim: str, level: str) -> None:
    with Sandbox(level=level, limits=LOOSE) as sandbox:
        process = sandbox._workers[0].process
        assert process is not None
        before = processes(sandbox)
        os.kill(process.pid if victim == "keeper" else descendants(process.pid).pop(), signal.SIGKILL)
        assert wait_until(lambda: not any(map(is_alive, before)))  # the other ends with it
        assert sandbox.judge([GOOD])[0].passed
        assert not before & processes(sandbox)


def test_a_worker_that_dies_in_the_middle_costs_no_verdict(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    original = socket.send_fds

    def send_and_kill(*arguments: Any) -> int:
        if not sent:
            sent.append(descendants(sandbox._workers[0].process.pid).pop())  # type: ignore[union-attr]
            os.kill(sent[0], signal.SIGSTOP)  # so that it does not end first
            threading.Timer(0.1, os.kill, (sent[0], signal.SIGKILL)).start()
        return original(*arguments)

    with Sandbox(level=level, limits=LOOSE) as sandbox:
        monkeypatch.setattr(socket, "send_fds", send_and_kill)
        assert sandbox.judge([GOOD])[0].passed
        assert sent[0] not in processes(sandbox)


def test_workers_that_keep_dying_give_no_judgement(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Sandbox(level=level, limits=LOOSE) as sandbox:

        def die(self: Worker, program: Program, limits: Limits) -> None:
            raise WorkerError("a worker died")

        monkeypatch.setattr(Worker, "judge", die)
        (verdict,) = sandbox.judge([GOOD])
    assert (verdict.is_judged, verdict.passed) == (False, False)


def test_a_program_whose_jail_fails_does_not_run(level: str) -> None:
    """Limits that cannot be set are an error of the sandbox's, before any foreign code."""
    worker = Worker(level)
    try:
        with pytest.raises(WorkerError, match="does not hold"):
            worker.judge(GOOD, Limits(cpu_seconds=1e30))
    finally:
        worker.close()


def test_nothing_runs_where_nothing_contains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(levels, "problem", lambda level: f"no {level} here")
    monkeypatch.setattr(Worker, "__init__", lambda *_: pytest.fail("a worker starts"))
    with pytest.raises(SandboxError) as error:
        Sandbox()
    assert "\n" not in str(error.value)
    for level, remedy in levels.REMEDIES.items():
        assert f"{level}: no {level} here ({remedy})" in str(error.value)
    with pytest.raises(SandboxError, match="no landlock here"):
        Sandbox(level="landlock")
    with pytest.raises(SandboxError, match="unknown"):
        Sandbox(level="none")
    monkeypatch.setattr(sys, "argv", ["sandbox"])
    assert __main__.main() == 1
    assert "not available: no landlock here" in capsys.readouterr().out


def test_a_level_whose_programs_escape_is_not_used(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each probe can fail a level: here it is replaced by what every program may do."""
    for name in levels.ESCAPES:
        with monkeypatch.context() as patch:
            patch.setitem(levels.ESCAPES, name, "def f(): return True")
            worker = Worker(level)
            assert levels._escape(worker) == f"a program {name}"
            worker.close()
            if name == "deletes a file of the host":
                break


def test_the_weaker_level_is_used_where_the_stronger_is_missing(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "problem", lambda name: "" if name == level else "missing")
    assert levels.choose(None) == level


def test_other_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels.platform, "machine", lambda: "riscv64")
    assert "riscv64" in levels.problem.__wrapped__("landlock")


def test_limits_that_no_program_meets_are_refused(level: str) -> None:
    with pytest.raises(SandboxError, match="harmless program does not pass"):
        Sandbox(level=level, limits=Limits(output_bytes=1))
    with pytest.raises(SandboxError, match="positive"):
        Sandbox(level=level, limits=Limits(memory_bytes=-1))  # the kernel's word for "no limit"


HOST = """
import sys
from ebft_study.sandbox import Limits, Program, Sandbox, Tests
tests = Tests(assertions=("assert f(3) == 4",), entry_points=("f",))
sleep = Program("import time\\ndef f(n): time.sleep(10**6)", tests)
with Sandbox(workers=2, level=sys.argv[1], limits=Limits(wall_seconds=1000.0)) as sandbox:
    sandbox.judge([sleep])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_of_a_host_that_ends(how: signal.Signals, level: str, tmp_path: Path) -> None:
    """While a program sleeps. Ctrl-C ends the host at once, not when the program's time is up."""
    errors = tmp_path / "errors"
    with errors.open("wb") as stderr:
        host = subprocess.Popen(
            [sys.executable, "-c", HOST, level],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.DEVNULL,
            stderr=stderr,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    left: list[int] = []

    def sleeps() -> bool:
        """Keeper, zygote, program and judge: it runs the sleeping program."""
        left[:] = descendants(host.pid)
        return len(left) >= 4 and _sleeps(host.pid)

    try:
        wait_until(lambda: host.poll() is not None or sleeps())
        assert host.poll() is None, errors.read_text()
        assert len(left) >= 4, left
        host.send_signal(how)
        host.wait(240)
        assert wait_until(lambda: not any(map(is_alive, left)))
    finally:
        host.kill()
        host.wait()


def _sleeps(host: int) -> bool:
    """Whether a program runs that has had its processor time for starting and does not end."""
    before = descendants(host)
    time.sleep(0.5)
    return len(before) >= 4 and before == descendants(host)


def test_a_fork_of_the_host_neither_ends_its_workers_nor_keeps_them(level: str) -> None:
    with Sandbox(level=level, limits=LOOSE) as sandbox:
        before = processes(sandbox)
        fork = os.fork()
        if fork == 0:
            sandbox.close()
            time.sleep(300)
            os._exit(0)
        assert sandbox.judge([GOOD])[0].passed
        assert processes(sandbox) == before
    assert wait_until(lambda: not any(map(is_alive, before)))  # though the fork still holds the socket
    os.kill(fork, signal.SIGKILL)
    os.waitpid(fork, 0)


def test_closing_ends_what_runs(level: str) -> None:
    sandbox = Sandbox(level=level, limits=LOOSE)
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.extend(sandbox.judge([SLEEP])))
    before = processes(sandbox)
    thread.start()
    assert wait_until(lambda: len(processes(sandbox)) > len(before))
    sandbox.close()
    thread.join()
    assert wait_until(lambda: not any(map(is_alive, before)))
    assert [verdict.is_judged for verdict in verdicts] == [False]
    sandbox.close()


def test_descriptors_do_not_add_up(level: str) -> None:
    with Sandbox(level=level, limits=LOOSE) as sandbox:
        sandbox.judge([Program(f"def f(n): return n + {n}", TESTS) for n in range(3)])
        before = len(os.listdir("/proc/self/fd"))
        script = Program("print(1)", Tests(stdin_stdout=(("", "1"),) * 3))
        sandbox.judge([script, *(Program(f"def f(n): return n - {n}", TESTS) for n in range(8))])
        assert len(os.listdir("/proc/self/fd")) <= before
        assert sandbox._workers[0].process is not None
        (zygote,) = descendants(sandbox._workers[0].process.pid)
        assert len(os.listdir(f"/proc/{zygote}/fd")) < 12


def test_the_words_need_the_standard_library_only() -> None:
    program = (
        "import sys, ebft_study.sandbox\n"
        "heavy = {'torch', 'ray', 'numpy', 'pydantic', 'yaml', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)


@pytest.mark.parametrize(("why", "holds"), [("over", True), ("", False), ("wall", False)])
def test_a_program_that_was_ended_on_its_way_into_the_jail_did_not_run(
    why: str, holds: bool, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(level)
    receive = worker._receive

    def as_if_ended_early() -> dict[str, Any]:
        answer = receive()
        return {
            name: {**end, "entered": False, "why": why} if name == "program" else end for name, end in answer.items()
        }

    try:
        assert worker.judge(GOOD, LOOSE).passed
        monkeypatch.setattr(worker, "_receive", as_if_ended_early)
        if holds:
            assert worker.judge(GOOD, LOOSE).is_judged
        else:
            with pytest.raises(WorkerError, match="does not hold"):
                worker.judge(GOOD, LOOSE)
    finally:
        worker.close()


class SlowJail:
    """Takes longer to enter than a program may run, as on a busy machine."""

    fork = staticmethod(os.fork)

    def enter(self, descriptors: list[int], limits: dict[str, Any], parent: int) -> None:
        time.sleep(4.0)
        (done,) = descriptors
        os.dup2(done, 0)


@pytest.mark.parametrize(("seconds", "why"), [(0.0, ""), (3600.0, "wall")])
def test_the_way_into_the_jail_is_no_part_of_a_programs_time(
    seconds: float, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor has the program what is left of the time for that way."""
    monkeypatch.setattr(zygote, "ENTRY_SECONDS", 10 * zygote.ENTRY_SECONDS)
    job = {"cpu_seconds": 300.0, "wall_seconds": 3.0}
    file = os.open(tmp_path / "program", os.O_RDWR | os.O_CREAT)
    ours, theirs = socket.socketpair()
    started = time.monotonic()
    with ours, theirs:
        keeper = zygote.Zygote(SlowJail(), theirs)  # type: ignore[arg-type]
        child = keeper._start(job, file, [], lambda _text: time.sleep(seconds))
        keeper._watch({"program": child}, job)
    assert (child.why, child.report()["entered"]) == (why, True)
    assert time.monotonic() - started < 240
    os.close(file)
