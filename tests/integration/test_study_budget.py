"""A study whose hours end before its trials do, and that is then given more."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebft_study import results
from tests import commands

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

CONTENT = """
study: short
question: What happens when the time is over?
run: {steps: 2, checkpoint_every_steps: 1, log_every_steps: 1, features: {backend: local}}
axes: {gamma: [0.0, 0.1]}
budget: {max_hours: 1.0e-9}
resources: {workers_per_trial: 0}
"""


def test_a_study_without_time_left_is_not_finished_and_continues_with_a_larger_budget(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        return commands.ended(commands.start(*arguments, cwd=tmp_path, program=commands.FAKE), 120)

    (tmp_path / "short.yaml").write_text(CONTENT)
    said = run("study", "short.yaml")
    assert "budget.max_hours is used up; raise it: ebft-study resume short budget.max_hours=HOURS" in said
    assert said.endswith("exit code 1")
    said = run("resume", "short")
    assert "0 of its 2 trials are over. Raise it" in said
    assert said.endswith("exit code 2")
    said = run("resume", "short", "budget.max_hours=5")
    assert said.endswith("exit code 0"), said
    assert results.read_table(tmp_path / "studies" / "short", "trials")["status"].tolist() == ["finished"] * 2
