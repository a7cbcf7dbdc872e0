"""Checkpoints on disk: damage is detected, and those that stay are enumerated against the definition."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from ebft_study.errors import CheckpointError
from ebft_study.training import checkpoint
from ebft_study.training.checkpoint import ranked, to_keep

NAN = math.nan


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"step": 4}, step=4)
    assert checkpoint.step_of(tmp_path) == 4
    with (tmp_path / checkpoint.STATE).open("r+b") as file:
        file.seek(40)
        file.write(b"damage")
    assert checkpoint.step_of(tmp_path) is None
    with pytest.raises(CheckpointError, match="complete"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_every_small_case_agrees_with_the_definition(mode: str) -> None:
    """A checkpoint stays if fewer than `newest` are newer, fewer than `best` are better, or its step is a multiple."""
    steps = (1, 2, 3, 4)
    settings = list(itertools.product((1, 2, 5), (0, 1, 2), (None, 1, 2, 3)))
    for levels in itertools.product((0.0, 1.0, 2.0, NAN), repeat=len(steps)):
        values = dict(zip(steps, levels, strict=True))
        for newest, best, every in settings:
            expected = set()
            for step in steps:
                newer = sum(other > step for other in steps)
                better = sum(_is_better(values, other, step, mode) for other in steps)
                measured = not math.isnan(values[step])
                if newer < newest or (measured and better < best) or (every is not None and step % every == 0):
                    expected.add(step)
            kept = to_keep(values, newest=newest, best=best, every_steps=every, mode=mode)  # type: ignore[arg-type]
            assert kept == expected, (values, newest, best, every)


def _is_better(values: dict[int, float], one: int, other: int, mode: str) -> bool:
    a, b = values[one], values[other]
    if math.isnan(a) or math.isnan(b):
        return False
    return one < other if a == b else (a < b) == (mode == "min")


def test_the_newest_always_stays() -> None:
    assert to_keep({2: NAN, 3: NAN}, newest=0) == {3}
    assert to_keep({}, newest=2, best=1) == set()


def test_of_equals_the_earlier_is_the_best() -> None:
    assert ranked({10: 1.0, 20: 1.0, 30: 0.5, 40: NAN}, "min") == [30, 10, 20]
    assert ranked({10: 1.0, 20: 1.0, 30: 0.5}, "max") == [10, 20, 30]
