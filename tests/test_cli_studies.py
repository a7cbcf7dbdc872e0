"""Commands about studies as a whole: list, status --watch, init, delete, rename; and what the wheel holds."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import ebft_study
from ebft_study import api, paths
from ebft_study.results import StudyRecorder
from ebft_study.storage import storage_path
from ebft_study.study.folder import lock, study_yaml
from ebft_study.study.folder.study_yaml import StudySource
from ebft_study.study.folder.trial_states import TrialState
from ebft_study.study.resolving.study_file import load_study
from ebft_study.study.spec import normalize
from ebft_study.study.view import display, status
from tests.synthetic_study import write_study
from tests.test_cli import run, write_run  # noqa: F401

ROOT = Path(ebft_study.__file__).parents[1]


# --- list ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study, one that was interrupted, and a folder that is hardly one."""
    storage = tmp_path_factory.mktemp("studies")
    effects = {(0.0, 0.0): (0.0, 0.3), (1.0, 0.0): (0.0, -0.3)}
    write_study(storage / "whole", effects=effects, seeds=(0, 1))
    write_study(storage / "half", effects=effects, seeds=(0, 1), statuses={((1.0, 0.0), 1): "interrupted"})
    (storage / "damaged").mkdir()
    (storage / "damaged" / "study.yaml").write_text("- no mapping")
    (storage / "no study").mkdir()
    return storage


def test_studies_are_listed_with_state_trials_and_the_best(studies: Path) -> None:
    by_name = {each.name: each for each in api.studies(studies)}
    assert list(by_name) == ["damaged", "half", "whole"]
    whole, half = by_name["whole"], by_name["half"]
    assert (whole.state, whole.done, whole.trials) == ("finished", 4, 4)
    assert (half.state, half.done, half.trials) == ("interrupted", 3, 4)
    assert whole.best.endswith(": alpha=1.0 gamma=0.0")
    assert half.best.endswith(": alpha=0.0 gamma=0.0"), "one seed of the other has not finished"
    assert by_name["damaged"].state == "unreadable"
    assert "study.yaml" in by_name["damaged"].problem
    with lock.hold(storage_path(studies / "half"), record=study_yaml.NAME):
        assert {each.name: each.state for each in api.studies(studies)}["half"] == "running"


def test_listing_imports_nothing_heavy(studies: Path) -> None:
    code = (
        f"import sys; from ebft_study import cli; sys.argv = ['ebft-study', 'list', '--storage', {str(studies)!r}]\n"
        "try: cli.main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        "assert not {'torch', 'ray', 'transformers', 'optuna', 'matplotlib'} & set(sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    assert "4/4" in ran.stdout
    assert "study.yaml" in ran.stdout, "why one cannot be read"


# --- init, version, completion ---------------------------------------------------------------------------------


def test_every_ready_study_can_be_copied_and_loaded(run: object, tmp_path: Path) -> None:  # noqa: F811
    assert set(paths.ready_studies()) == {file.stem for file in (ROOT / "search_spaces").glob("*.yaml")}
    listed = run("init", "--list").out  # type: ignore[operator]
    for name in paths.ready_studies():
        ran = run("init", name)  # type: ignore[operator]
        assert ran.code == 0, ran.err
        content = (tmp_path / f"{name}.yaml").read_bytes()
        assert content == (ROOT / "search_spaces" / f"{name}.yaml").read_bytes()
        assert name in listed
        assert yaml.safe_load(content)["question"].split()[0] in listed
        assert load_study(tmp_path / f"{name}.yaml", "cpu", []).name == name
    again = run("init")  # type: ignore[operator]
    assert (again.code, again.err) == (2, "error: quickstart.yaml: exists. Remove it, or go to another folder\n")
    unknown = run("init", "nothing")  # type: ignore[operator]
    assert unknown.code == 2
    assert "quickstart" in unknown.err


def test_a_missing_file_points_to_the_ready_ones(run: object) -> None:  # noqa: F811
    assert "ebft-study init --list" in run("study", "missing.yaml").err  # type: ignore[operator]


def test_the_version_is_that_of_the_package(run: object) -> None:  # noqa: F811
    ran = run("--version")  # type: ignore[operator]
    assert (ran.code, ran.out) == (0, f"ebft-study {ebft_study.__version__}\n")


def test_the_shell_completes_commands_and_names(tmp_path: Path) -> None:
    (tmp_path / "studies" / "mine").mkdir(parents=True)
    (tmp_path / "studies" / "mine" / "study.yaml").touch()

    def completed(line: str) -> list[str]:
        """What bash would offer for the last word of a line."""
        words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_EBFT_STUDY_COMPLETE": "complete_bash"}
        code = "import sys; sys.argv = ['ebft-study']; from ebft_study.cli import app; app(prog_name='ebft-study')"
        environment = {**os.environ, **words}
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return ran.stdout.split()

    assert {"stop", "status", "study"} <= set(completed("ebft-study st"))
    assert completed("ebft-study status m") == ["mine"]
    assert completed("ebft-study init qu") == ["quickstart"]


# --- delete, rename, and where studies are looked for ----------------------------------------------------------


def test_a_missing_study_is_looked_for_where_it_was_asked_for(run: object, tmp_path: Path) -> None:  # noqa: F811
    """One of the same name in ./studies is another study."""
    write_study(tmp_path / "studies" / "mine", effects={(0.0, 0.0): (0.0, 0.0)}, seeds=(0,))
    write_study(tmp_path / "elsewhere" / "theirs", effects={(0.0, 0.0): (0.0, 0.0)}, seeds=(0,))
    ran = run("status", "mine", "--storage", "elsewhere")  # type: ignore[operator]
    assert ran.code == 2
    assert "the name of one in elsewhere. Studies there: theirs" in ran.err
    assert "No studies in " in run("status", "mine", "--storage", "nowhere").err  # type: ignore[operator]
    assert run("status", "mine").code == 0  # type: ignore[operator]
    assert run("status", "theirs", "--storage", "elsewhere").code == 0  # type: ignore[operator]
    assert run("status", "elsewhere/theirs").code == 0  # type: ignore[operator]


def test_deleting_needs_a_yes(run: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    folder = write_study(tmp_path / "studies" / "mine", effects={(0.0, 0.0): (0.0, 0.0)}, seeds=(0,))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    ran = run("delete", "mine")  # type: ignore[operator]
    assert (ran.code, folder.exists()) == (2, True)
    assert "--yes" in ran.err
    for answer, remains in (("n\n", True), ("y\n", False)):
        typed = io.StringIO(answer)
        typed.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", typed)
        run("delete", "mine")  # type: ignore[operator]
        assert folder.exists() == remains


def test_a_renamed_study_is_found_by_its_new_name(run: object, tmp_path: Path) -> None:  # noqa: F811
    write_study(tmp_path / "studies" / "mine", effects={(0.0, 0.0): (0.0, 0.0), (1.0, 0.0): (0.1, 0.1)}, seeds=(0, 1))
    assert run("rename", "mine", "other").code == 0  # type: ignore[operator]
    assert "neither a study" in run("status", "mine").err  # type: ignore[operator]
    assert run("status", "other").out.startswith("other: ")  # type: ignore[operator]
    assert run("report", "other").code == 0  # type: ignore[operator]
    page = (tmp_path / "studies" / "other" / "report.html").read_text()
    assert re.search(r"<title>[^<]*\bother\b", page)
    assert not re.search(r"<title>[^<]*\bmine\b", page)


# --- watching --------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of two trials that somebody runs; `time.sleep` is what happens between two looks."""
    content = {"study": "s", "question": "?", "run": {"steps": 4}, "axes": {"alpha": [0.0, 1.0]}}
    folder = tmp_path / "s"
    folder.mkdir()
    study_yaml.write(folder, normalize.from_record(content, source="test"), StudySource("s.yaml"), provenance={})
    recorder = StudyRecorder(folder, study="s")
    rows = [
        {"trial_id": f"t000{n}", "label": f"alpha={n} seed=0", "configuration": f"alpha={n}", "status": "pending"}
        | {"attempt": 0, "hyperparameters": {"steps": 4, "warm_start_steps": 0, "seed": 0}}
        for n in range(2)
    ]
    recorder.trials(rows)
    moments = iter(
        [
            lambda: recorder.trial({**rows[0], "status": "running"}),
            lambda: recorder.trial({**rows[0], "status": "finished"}),
            lambda: None,
            lambda: [recorder.trial({**rows[1], "status": "failed", "error": "why"}), held.append(False)],
        ]
    )
    held = [True]
    monkeypatch.setattr(lock, "is_held", lambda folder: held[-1])
    monkeypatch.setattr(time, "sleep", lambda seconds: next(moments)())
    return folder


def test_watching_prints_a_line_for_each_change_and_ends_with_the_study(watched: Path) -> None:
    out = io.StringIO()
    status.watch(watched, Console(file=out, width=120))
    lines = [line.partition(" ")[2] for line in out.getvalue().splitlines()]
    assert lines == [
        "s: 0 of 2 trials finished, 2 pending",
        "t0000 alpha=0 seed=0: running",
        "t0000 alpha=0 seed=0: finished",
        "t0001 alpha=1 seed=0: failed",
        "s: 1 of 2 trials finished, 1 failed; over",
    ]


def test_watching_on_a_terminal_ends_with_the_whole_status(watched: Path) -> None:
    out = io.StringIO()
    status.watch(watched, Console(file=out, width=120, height=40, force_terminal=True))
    last = out.getvalue()[out.getvalue().rindex("alpha=0 seed=0") :]
    assert "t0001 failed: why" in last
    assert "1 of 2 trials finished, 1 failed" in last


def test_logs_say_how_many_trials_are_over_and_how_long_the_rest_takes() -> None:
    states = {f"t{n}": TrialState(f"t{n}", f"alpha={n}", total_steps=10) for n in range(3)}
    out = io.StringIO()
    lines = display.Lines(Console(file=out, width=200), ("ce_loss",), states, display.Plan(3))
    states["t0"].status, states["t0"].own_seconds, states["t0"].started_at = "finished", 20.0, 0.0
    lines.changed(states["t0"], "finished")
    states["t1"].status, states["t1"].step, states["t1"].earlier_seconds = "running", 5, 10.0
    states["t1"].metrics = {"ce_loss": 1.5}
    lines.changed(states["t1"], "step 5/10")
    lines.changed(states["t2"], "pauses")
    shown = [line.partition(" ")[2] for line in out.getvalue().splitlines()]
    assert shown == [
        "t0 alpha=0: finished; 1 of 3 trials finished, 2 pending; about 40 s left",
        "t1 alpha=1: step 5/10 ce_loss=1.5; about 30 s left",
        "t2 alpha=2: pauses",
    ]


# --- train -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(
    output: str,
    run: object,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setitem(sys.modules, "ebft_study.study.driver.single_run", None)
    ran = run("train", write_run(tmp_path), "--output", output)  # type: ignore[operator]
    assert ran.code == 2
    assert "cannot be written" in ran.err
    assert len(ran.err.splitlines()) == 1


def test_two_trainings_never_share_a_folder(run: object, tmp_path: Path) -> None:  # noqa: F811
    with lock.hold(storage_path(tmp_path / "out"), record="nothing"):
        ran = run("train", write_run(tmp_path), "--output", "out")  # type: ignore[operator]
    assert ran.code == 2
    assert "another process" in ran.err


def test_training_says_where_its_results_are(run: object, tmp_path: Path) -> None:  # noqa: F811
    ran = run("train", write_run(tmp_path), "--output", "my runs/first", "steps=1")  # type: ignore[operator]
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0] == "results: 'my runs/first'"
    assert lines[-1] == "results: 'my runs/first'; their report: ebft-study report 'my runs/first'"
    assert run("report", "my runs/first").code == 0  # type: ignore[operator]


# --- packaging -------------------------------------------------------------------------------------------------


def test_the_wheel_is_told_to_hold_the_ready_studies_where_they_are_looked_for() -> None:
    """Building it needs hatchling from a registry, which tests do not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {"search_spaces": "ebft_study/search_spaces"}
    assert project["project"]["version"] == ebft_study.__version__
    assert (ROOT / "ebft_study" / "py.typed").exists()


def test_an_installed_package_finds_its_ready_studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "ebft_study"
    (package / "search_spaces").mkdir(parents=True)
    (package / "search_spaces" / "one.yaml").touch()
    monkeypatch.setattr(paths, "__file__", str(package / "paths.py"))
    assert paths.ready_studies() == {"one": package / "search_spaces" / "one.yaml"}


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ebft_study.__version__
    assert citation["references"][0]["title"].startswith("Matching Features, Not Tokens")
