"""A sample of the inputs by the command line, in a process of its own: exit code 2 and one line, or a right answer."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests import commands
from tests.fuzz import study, test_data, test_models, test_results
from tests.fuzz.outcomes import FAILURES, INPUTS, MOST_BYTES, MOST_SECONDS, inputs
from tests.tiny_run import tiny_config


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("here")
    study.write(folder / "studied", folder)
    return folder


def data(folder: Path, draw: Random) -> list[str]:
    (folder / "data.jsonl").write_bytes(b"\n".join(draw.choices(test_data.HARMFUL, k=3)))
    return train(folder)


def model(folder: Path, draw: Random) -> list[str]:
    draw.choice(test_models.HOW)(folder / "model", draw)
    return [*train(folder), "steps=1"]


def results(folder: Path, draw: Random) -> list[str]:
    test_results.damage(folder / "studied", draw)
    return [draw.choice(["status", "report"]), "studied", "--storage", "."]


def train(folder: Path) -> list[str]:
    settings = tiny_config(folder).model_dump(mode="json", exclude_unset=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return ["train", "run.yaml"]


@pytest.mark.slow
@inputs(20)
@given(kind=st.sampled_from([data, model, results]), draw=st.randoms(use_true_random=False))
def test_commands(
    tmp_path_factory: pytest.TempPathFactory, here: Path, kind: Callable[[Path, Random], list[str]], draw: Random
) -> None:
    folder = tmp_path_factory.mktemp("command") / "here"
    shutil.copytree(here, folder)
    arguments = kind(folder, draw)
    INPUTS["command_line"] += 1
    process = commands.start(*arguments, cwd=folder)
    output = commands.ended(process, MOST_SECONDS)
    *_, last, code = output.splitlines()
    is_answered = "Traceback" not in output and (
        code.endswith(" 0") or (code.endswith(" 2") and last.startswith("error: "))
    )
    is_small = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < MOST_BYTES
    FAILURES["tracebacks"] += not is_answered
    FAILURES["over_memory"] += not is_small
    assert is_answered, output
    assert is_small
    shutil.rmtree(folder)
