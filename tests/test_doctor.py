"""`doctor`: each thing that a machine may lack has its line, and only what studies need fails the command."""

from __future__ import annotations

import importlib.metadata
import socket
import sys
from pathlib import Path

import pytest

from ebft_study import cli, doctor

ANSWERS = {"GPU": ("1 x H", ""), "Ray": ("starts", ""), "vLLM": ("0.1", ""), "hub": ("yes", ""), "sandbox": ("x", "")}


def by_name(monkeypatch: pytest.MonkeyPatch, **changed: tuple[str, str]) -> dict[str, doctor.Finding]:
    """The findings where the probes answer as given."""
    answers = {doctor._PROBES[name]: answer for name, answer in {**ANSWERS, **changed}.items()}
    monkeypatch.setattr(doctor, "probe", lambda program, seconds=None: answers[program])
    return {each.name: each for each in doctor.findings()}


def test_a_probe_returns_the_last_line_or_the_reason() -> None:
    assert doctor.probe("print('first'); print('last')") == ("last", "")
    assert doctor.probe("") == ("", "")
    assert doctor.probe("raise ValueError('no such thing')") == ("", "ValueError: no such thing")


def test_a_probe_that_never_answers_ends_with_all_that_it_started(tmp_path: Path) -> None:
    """Its child keeps the other end of a socket open for as long as it lives."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        child = f"import socket, time; s = socket.create_connection({server.getsockname()!r}); time.sleep(600)"
        program = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
        answer, problem = doctor.probe(program, seconds=5.0)
        assert (answer, problem) == ("", "no answer within 5 s")
        server.settimeout(0.0)
        try:
            connection, _ = server.accept()
        except BlockingIOError:  # it was killed before it came so far
            return
        with connection:
            connection.settimeout(60)
            assert connection.recv(1) == b"", "the child has ended"


@pytest.mark.parametrize("name", ["GPU", "vLLM", "hub", "sandbox"])
def test_studies_run_without_what_is_absent(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_name(monkeypatch, **{name: ("", "")})
    assert found[name].state == "none"
    assert {each.state for each in found.values() if each.name not in (name, "W&B", "/dev/shm")} == {"ok"}


@pytest.mark.parametrize(
    ("name", "state"), [("Ray", "broken"), ("GPU", "broken"), ("vLLM", "none"), ("sandbox", "none")]
)
def test_what_fails_is_told_with_its_reason(name: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_name(monkeypatch, **{name: ("", "Error: disk on fire")})[name]
    assert found.state == state
    assert found.text.startswith("Error: disk on fire. ")


def test_a_package_of_another_version_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0" if name == "torch" else real(name))
    found = doctor._packages()
    assert found.state == "broken"
    assert "torch is 1.0, not ==" in found.text


@pytest.mark.parametrize(("minor", "state"), [(10, "broken"), (11, "ok"), (13, "ok"), (14, "broken")])
def test_versions_of_python(minor: int, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "version_info", (3, minor, 0))
    assert doctor._python().state == state


def test_a_folder_that_cannot_be_written_is_broken(tmp_path: Path) -> None:
    assert doctor._folder("cache", tmp_path / "new" / "er").state == "ok"
    assert list(tmp_path.iterdir()) == [], "it was tried, not made"
    (tmp_path / "file").touch()
    found = doctor._folder("cache", tmp_path / "file" / "below")
    assert found.state == "broken"
    assert "EBFT_STUDY_CACHE" in found.text


def test_a_login_of_wandb_is_found_without_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    file = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(file))
    assert doctor._wandb().state == "none"
    file.write_text("machine api.wandb.ai login user password secret\n")
    file.chmod(0o600)
    found = doctor._wandb()
    assert found.state == "ok"
    assert "secret" not in found.text


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("none", 0), ("broken", 1)])
def test_the_command_fails_where_something_needed_is_broken(
    state: doctor.State, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "findings", lambda: [doctor.Finding("Ray", state, "[text]")])
    monkeypatch.setattr(sys, "argv", ["ebft-study", "doctor"])
    monkeypatch.setattr(cli.signal, "signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    assert capsys.readouterr().out == f"{state:6}  Ray: [text]\n"
