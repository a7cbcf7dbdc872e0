"""The harness of faults: a few of them, and that it would notice what goes wrong."""

from __future__ import annotations

import argparse
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults import __main__ as faults
from tests.faults.calls import Calls, Fault, Shared
from tests.faults.kinds import KINDS

FEW = ("enospc_write", "kill_in_write", "stop_driver", "delete_metrics", "truncate_study_yaml")


def run(*arguments: str) -> dict[str, Any]:
    """In a process of its own: it forks, and adopts orphans."""
    command = [sys.executable, "-m", "tests.faults", "--processes", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    counts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return counts


def test_a_few_faults_leave_no_trace() -> None:
    counts = run("--faults", str(len(FEW)), "--seed", "1", "--kinds", *FEW)
    assert counts["by_kind"] == dict.fromkeys(FEW, 1)
    assert not any(counts["problems"].values())


@pytest.mark.slow
def test_one_fault_of_every_kind_leaves_no_trace() -> None:
    counts = run("--faults", str(len(KINDS)), "--seed", "2")
    assert counts["kinds"] == len(KINDS)


def test_a_fault_that_never_happens_fails_the_harness(capsys: pytest.CaptureFixture[str]) -> None:
    report = {"kind": "eio_read", "fired": False, "unnamed": False, "problems": {}}
    options = argparse.Namespace(faults=1, seed=0)
    assert faults.conclude([report], ["eio_read"], options, 1.0) == 1
    assert faults.conclude([{**report, "fired": True}], ["eio_read"], options, 1.0) == 0
    assert faults.conclude([{**report, "fired": True, "problems": {"lost": 1}}], ["eio_read"], options, 1.0) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[0])["never_happened"] == ["eio_read"]


@pytest.mark.parametrize("lasting", [False, True])
def test_the_call_that_is_due_fails_and_those_after_it_where_the_fault_lasts(tmp_path: Path, lasting: bool) -> None:
    fault = Fault("error", "driver", 2, ("write", "open"), errno.ENOSPC, lasting=lasting)
    calls = Calls(tmp_path, "driver", fault, Shared())
    outcomes = []
    for operation, path in (("open", "/elsewhere"), ("open", "a"), ("read", "a"), ("write", "a"), ("write", "b")):
        try:
            outcomes.append(calls.around(operation, os.path.join(tmp_path, path), lambda: "done"))
        except OSError as error:
            outcomes.append(error.errno)
    assert outcomes == ["done", "done", "done", errno.ENOSPC, errno.ENOSPC if lasting else "done"]
    assert calls.counts == {"open": 1, "read": 1, "write": 2}
