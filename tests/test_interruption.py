"""SIGTERM and Ctrl-C at every moment of a command: exit code 130, and a line that says how to continue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ebft_study.study.cluster.own import keeping_sigterm

BLOCKED = "print('BLOCKED', flush=True)\nimport time\ntime.sleep(600)\n"
PREPARING = f"""
import sys, types
from ebft_study.__main__ import main

preparing = types.ModuleType("ebft_study.training.prepare")

def prepare(runs, **_):
    {BLOCKED.replace(chr(10), "; ").rstrip("; ")}

preparing.prepare = prepare
sys.modules[preparing.__name__] = preparing
main()
"""
STUDY = "study: s\nquestion: q\naxes: {alpha: [0.0, 1.0]}\nrun: {steps: 2}\nresources: {workers_per_trial: 0}\n"
each_signal = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])


def signalled_when_blocked(number: int, cwd: Path, *command: str, **environment: str) -> tuple[int, str]:
    """Exit code and errors of a command that gets a signal as soon as it says that it is blocked."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environment},
        text=True,
        # Tests that a shell runs in the background ignore Ctrl-C, and so would the command.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **streams,
    )
    assert process.stdout is not None
    while (line := process.stdout.readline()).strip() != "BLOCKED":
        assert line, process.communicate()[1]
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


@each_signal
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["study", "s.yaml"], "interrupted; add --resume to the same command to continue"),
        (["study", "s.yaml", "--resume"], "interrupted; repeat the command to continue"),
    ],
)
def test_while_data_and_models_are_prepared(number: int, arguments: list[str], line: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(STUDY)
    code, errors = signalled_when_blocked(number, tmp_path, "-c", PREPARING, *arguments)
    assert (code, errors.strip()) == (130, line)
    assert not (tmp_path / "studies").exists(), "nothing is left of a study that has not begun"


@each_signal
def test_while_the_command_is_imported(number: int, tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text(BLOCKED)
    search = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    program = ("-m", "ebft_study", "study", "s.yaml")
    code, errors = signalled_when_blocked(number, tmp_path, *program, PYTHONPATH=search)
    assert (code, errors.strip()) == (130, "interrupted before it began; repeat the command")


def test_the_handler_survives_the_start_of_ray() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with keeping_sigterm():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("code", "error"), [(signal.SIGTERM, KeyboardInterrupt), (1, SystemExit)])
def test_rays_exit_during_its_start_is_an_interruption(code: int, error: type[BaseException]) -> None:
    with pytest.raises(error), keeping_sigterm():
        sys.exit(code)
