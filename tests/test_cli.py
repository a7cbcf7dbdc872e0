"""The command line: one line for what a user can mend, exit codes, and a whole run without Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ebft_study import cli, results
from ebft_study.errors import EbftError


class Ran:
    """What a command printed and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.signal, "signal", lambda number, handler: None)  # pytest keeps its own
    monkeypatch.setenv("EBFT_STUDY_CACHE", str(tmp_path / "cache"))

    def command(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["ebft-study", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return Ran(int(ended.value.code or 0), out, err)

    return command


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["study", "missing.yaml"], ["missing.yaml", "no such file"]),
        (["study", "binary.yaml"], ["binary.yaml", "cannot be read as text"]),
        (["study", "list.yaml"], ["list.yaml", "not a mapping"]),
        (["study", "misspelt.yaml"], ["misspelt.yaml", "unknown key 'axis'", "'axes'"]),
        (["study", "good.yaml", "alpha=0.5"], ["reward.alpha", "an axis of the study"]),
        (["study", "good.yaml", "--profile", "cpu"], ["profile='cpu'", "Known profiles: none"]),
        (["train", "missing.yaml"], ["missing.yaml", "no such file"]),
        (["train", "run.yaml", "n_samples=1"], ["rollout.n_samples=1", "Use n_samples >= 2"]),
        (["train", "run.yaml", "dataset=nowhere.jsonl"], ["nowhere.jsonl"]),
        (["status", "nothing"], ["nothing", "neither a study"]),
        (["resume", "nothing"], ["nothing", "neither a study"]),
        (["report", "nothing"], ["nothing", "neither a study"]),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(
    run: object, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "misspelt.yaml").write_text("study: s\nquestion: q\naxis: {}\n")
    (tmp_path / "good.yaml").write_text("study: s\nquestion: q\naxes: {alpha: [0, 1]}\n")
    (tmp_path / "run.yaml").write_text("name: r\nsteps: 2\n")
    before = sorted(tmp_path.iterdir())
    ran = run(*arguments)  # type: ignore[operator]
    assert ran.code == 2
    assert ran.err.startswith("error: ")
    assert len(ran.err.strip().splitlines()) == 1
    for part in parts:
        assert part in ran.err
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "cache"] == before


@pytest.mark.parametrize("command", ["study", "resume", "status", "report", "train", "export"])
def test_help_shows_an_example(run: object, command: str) -> None:
    ran = run(command, "--help")  # type: ignore[operator]
    assert ran.code == 0
    assert f"ebft-study {command} " in " ".join(ran.out.split())


def test_help_and_status_load_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from ebft_study import cli; from ebft_study.study.view import status; "
        "assert not {'torch', 'ray', 'transformers', 'optuna'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_mistakes_cost_no_heavy_import(tmp_path: Path) -> None:
    """A file that is missing or wrong, a study that is not there: the answer comes before torch would."""
    (tmp_path / "wrong.yaml").write_text("study: s\nquestion: q\naxes: {alpha: [0.0, 2.0]}\nseeds: [0]\n")
    commands = [
        *([command, file] for command in ("study", "plan", "train") for file in ("missing.yaml", "wrong.yaml")),
        *([command, "missing"] for command in ("resume", "status", "report", "evaluate", "bundle")),
        ["export", "missing", "--to", "folder"],
        ["compare", "missing", "missing too"],
    ]
    code = (
        "import sys; from ebft_study import cli\n"
        f"for arguments in {commands!r}:\n"
        "    sys.argv = ['ebft-study', *arguments]\n"
        "    try: cli.main()\n"
        "    except SystemExit as ended: assert ended.code == 2, arguments\n"
        "    heavy = {'torch', 'ray', 'transformers', 'optuna', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, (arguments, heavy)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stderr.splitlines()) == len(commands)


def test_errors_of_several_lines_become_one(run: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EbftError("first\n  second")

    monkeypatch.setattr("ebft_study.study.resolving.study_file.load_study", fail)
    assert run("study", "x.yaml").err == "error: first second\n"  # type: ignore[operator]


def write_run(folder: Path) -> Path:
    from tests.tiny_run import tiny_config

    settings = tiny_config(folder).model_dump(mode="json", exclude_none=True) | {"name": "tiny"}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_single_run_is_recorded_like_a_study_and_can_be_continued(run: object, tmp_path: Path) -> None:
    file = write_run(tmp_path)
    ran = run("train", file)  # type: ignore[operator]
    assert ran.code == 0, ran.err
    assert "finished" in ran.out
    there = results.load(tmp_path / "runs" / "tiny")
    assert there.trials["status"].tolist() == ["finished"]
    assert there.metrics["step"].max() == 4
    assert set(there.evaluations["step"]) == {0, 4}

    again = run("train", file)  # type: ignore[operator]
    assert again.code == 2
    assert "--resume" in again.err
    other = run("train", file, "learning_rate=0.5", "--resume")  # type: ignore[operator]
    assert other.code == 2
    assert "run.optimizer.learning_rate: 0.001 -> 0.5" in other.err

    longer = run("train", file, "steps=6", "--resume")  # type: ignore[operator]
    assert longer.code == 0, longer.err
    there = results.load(tmp_path / "runs" / "tiny")
    assert there.metrics["step"].tolist() == list(range(7))
    assert there.metrics.loc[there.metrics["step"] > 4, "attempt"].tolist() == [2, 2]
    assert "resumed" in set(there.events["kind"])


def test_what_a_single_run_must_mend_fails_it(run: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EbftError("data.dataset='gone': vanished. Restore it")

    file = write_run(tmp_path)
    monkeypatch.setattr("ebft_study.training.loop.train", fail)
    ran = run("train", file)  # type: ignore[operator]
    assert ran.code == 2
    assert ran.err == "error: data.dataset='gone': vanished. Restore it\n"
    assert results.load(tmp_path / "runs" / "tiny").trials["status"].tolist() == ["failed"]
