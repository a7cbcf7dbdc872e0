"""Folders of results that are not as their writers left them: the same tables, the damage named, or one line."""

from __future__ import annotations

import functools
import io
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ebft_study import api, results
from ebft_study.report.comparison import sentences
from ebft_study.study.driver import downstream, runner, session
from ebft_study.study.view import status
from ebft_study.terminal import Terminal
from ebft_study.training import checkpoint
from tests.fuzz import study
from tests.fuzz.outcomes import answer, check, flip, inputs, places, truncate

VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**63, 1e308, float("nan"), "", "x", "[red]", "a" * 300, [], {}, [1], {"a": 1},
]  # fmt: skip
DEEP = b"[" * 20000 + b"]" * 20000
CONTENTS = [b"", b"\0", b"{}", b"[]", b"null", b"PAR1PAR1", b"\xff\xfe", b"a: &a [*a]", b"1" * 5000, DEEP]
NAMES = ["README.txt", "x.parquet", ".hidden", "_x.parquet", "t9999.parquet", "a b", "é", "checkpoint_x", "t0000-x"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an undisturbed study, its data and its model."""
    folder = tmp_path_factory.mktemp("here")
    study.write(folder / "whole" / "studied", folder)
    return folder


@pytest.fixture(scope="module")
def right(here: Path) -> dict[str, Any]:
    """What each command answers while nothing is damaged."""
    return {name: command(fresh(here)) for name, command in COMMANDS.items()}


def fresh(here: Path) -> Path:
    """A copy of the study, always in the same place: answers name it."""
    folder = here / "damaged" / "studied"
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(here / "whole" / "studied", folder)
    return folder


# --- commands ----------------------------------------------------------------------------------------------------


def tables(folder: Path) -> tuple[dict[str, str], list[str]]:
    read = results.load(folder)
    return {table: getattr(read, table).astype(str).to_csv() for table in results.TABLES}, read.problems


def show_status(folder: Path) -> str:
    console = Terminal(file=io.StringIO(), width=250)
    status.show(folder, console)
    return str(console.file.getvalue())


def resume(folder: Path) -> dict[str, str]:
    """The states of trials after a session that ends when Ray would start, and their checkpoints."""
    console = Terminal(file=io.StringIO(), width=250)
    with (
        mock.patch.object(runner, "_prepare", return_value=study.INPUTS),
        mock.patch.object(session, "_tune"),
        mock.patch.object(runner, "_report"),
    ):
        runner.resume(folder, console=console)
    return results.read_table(folder, "trials").set_index("trial_id")["status"].to_dict()


def evaluate(folder: Path) -> Any:
    """The checkpoint with which an evaluation would begin."""

    def load(each: downstream.Evaluated, device: Any) -> None:
        raise _BegunError(
            each.checkpoint.name, checkpoint.load(Path(str(each.checkpoint)))["tensors"]["weights"]["w"].tolist()
        )

    with mock.patch.object(downstream, "_load", load):
        try:
            return api.evaluate(folder, ["mini"], ["t0001"], ["benchmark_max_tokens=2", "benchmark_problems=2"])
        except _BegunError as begun:
            return begun.args


class _BegunError(Exception):
    """An evaluation has read all that it needs."""


def query(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it names the number of problems
        catalog = api.catalog(folder.parent)
    return catalog.sql("SELECT count(*), sum(ce_loss) FROM metrics").fetchall()


def compare(folder: Path) -> list[str]:
    return list(sentences(api.compare([folder, folder.parents[1] / "whole" / "studied"])))


def report(folder: Path) -> None:
    api.write_report(folder)


COMMANDS: dict[str, Callable[[Path], Any]] = {
    "tables": tables, "status": show_status, "resume": resume, "evaluate": evaluate, "catalog": query,
    "compare": compare, "report": report,
}  # fmt: skip
NAMED_BY_ITSELF = ("resume", "evaluate")
"""Commands that continue with what is whole; damaged rows are trained again."""


# --- damage ------------------------------------------------------------------------------------------------------


def damage(folder: Path, draw: Random) -> tuple[Callable[[Path, Random], None], Path]:
    """Change one file of a study; returns how, and which."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".compact.lock")
    kind = draw.choice(sorted({_kind(path) for path in files}))
    path = draw.choice([path for path in files if _kind(path) == kind])
    how = draw.choice(HOW)
    how(path, draw)
    return how, path


def _kind(path: Path) -> str:
    """Files of one kind are read by the same code."""
    return re.sub(r"t\d{4}(-a?\d+)?|[0-9a-f]{8,}|\d{6,}", "", f"{path.parent.name}/{path.name}")


def zeroed(path: Path, draw: Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def replaced(path: Path, draw: Random) -> None:
    path.write_bytes(draw.choice(CONTENTS))


def in_other_words(path: Path, draw: Random) -> None:
    """Another value somewhere in YAML or JSON; other files lose their end."""
    if path.suffix not in (".json", ".yaml"):
        truncate(path, draw)
        return
    content = yaml.safe_load(path.read_text())
    where = draw.choice([*places(content)])
    node = functools.reduce(lambda inner, key: inner[key], where[:-1], content)
    node[where[-1]] = draw.choice(VALUES)
    if draw.random() < 0.2:
        del node[where[-1]]
    path.write_text(json.dumps(content))  # which is YAML, too


def missing(path: Path, draw: Random) -> None:
    path.unlink()


def duplicated(path: Path, draw: Random) -> None:
    shutil.copy(
        path, path.with_name(draw.choice([f"copy-{path.name}", f"{path.stem}-1{path.suffix}", path.name.upper()]))
    )


def a_folder(path: Path, draw: Random) -> None:
    path.unlink()
    path.mkdir()


def a_link(path: Path, draw: Random) -> None:
    path.unlink()
    path.symlink_to(draw.choice([path.name, "..", "/nowhere", "../.."]))


def foreign(path: Path, draw: Random) -> None:
    path.with_name(draw.choice(NAMES)).write_bytes(draw.choice([b"", b"hello", path.read_bytes()]))


HOW: list[Callable[[Path, Random], None]] = [
    flip, flip, flip, truncate, zeroed, replaced, in_other_words, in_other_words, missing, duplicated, a_folder, a_link,
    foreign,
]  # fmt: skip


@inputs(400)
@given(draw=st.randoms(use_true_random=False))
def test_results(here: Path, right: dict[str, Any], draw: Random) -> None:
    """Tables are those of the undisturbed study, or the damage is named; and so is every command's answer."""
    folder = fresh(here)
    how, path = damage(folder, draw)
    read, line = answer("results", lambda: tables(folder))
    is_named = bool(line) or bool(read and read[1]) or _is_lost(how, path)
    if read is not None:
        check(read[0] == right["tables"][0] or is_named, f"tables differ: {how.__name__} {path}")
    name = draw.choice([name for name in COMMANDS for _ in range(1 if name == "report" else 4) if name != "tables"])
    given, line = answer(f"results: {name}", lambda: COMMANDS[name](folder))
    if not line and given != right[name] and name not in NAMED_BY_ITSELF:
        named_here = name == "status" and str(folder / "study.yaml") in given
        check(is_named or named_here, f"{name} differs: {how.__name__} {path}")


def _is_lost(how: Callable[[Path, Random], None], path: Path) -> bool:
    """A file that was neither merged nor copied, and is there no more: nothing knows that it was (docs/storage.md)."""
    return not path.exists() and path.parent.parent.name == "results" and not path.name.startswith("compacted")
