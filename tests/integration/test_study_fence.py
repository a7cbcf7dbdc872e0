"""A driver that sleeps while another finishes its study in a store, and a study whose folder vanishes."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import pandas as pd
import psutil
import pytest

from ebft_study import results
from ebft_study.errors import ResultsError
from ebft_study.results import fence
from ebft_study.storage import StoragePath, storage_path
from tests import commands

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]

SECONDS = 200.0  # for each command
CONTENT = """
study: s
question: Who writes?
run: {steps: 8, weight_decay: 0.25, checkpoint_every_steps: 1, log_every_steps: 1, features: {backend: local}}
axes: {learning_rate: [0.5, 1.0]}
resources: {workers_per_trial: WORKERS}
"""


def is_under_way(folder: StoragePath) -> bool:
    with contextlib.suppress(ResultsError):
        return bool((results.read_table(folder, "metrics")["step"] >= 2).any())
    return False


def tables(folder: StoragePath) -> dict[str, pd.DataFrame]:
    return {table: results.read_table(folder, table) for table in ("trials", "metrics")}


def test_a_driver_that_wakes_when_another_has_finished_changes_nothing(tmp_path: Path, s3_query: str) -> None:
    (tmp_path / "study.yaml").write_text(CONTENT.replace("WORKERS", "0"))
    folder = storage_path(f"s3://studies/slept/s?{s3_query}")
    storage = f"s3://studies/slept?{s3_query}"
    first = commands.start("study", "study.yaml", "--storage", storage, cwd=tmp_path, program=commands.FAKE)
    asleep: list[psutil.Process] = []
    try:
        commands.wait_until(lambda: is_under_way(folder), first, SECONDS)
        asleep = [psutil.Process(first.pid), *commands.family(first)]
        for process in asleep:
            process.suspend()
        (folder / fence.CLAIMS).delete()
        second = commands.start("resume", str(folder), cwd=tmp_path, program=commands.FAKE)
        said = commands.ended(second, SECONDS)
        assert said.endswith("exit code 0"), said
        before = tables(folder)
        assert before["trials"]["status"].tolist() == ["finished", "finished"]
        for process in asleep:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        said = commands.ended(first, SECONDS)
    finally:
        for process in asleep:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        first.kill()
        first.wait()
    assert said.endswith("exit code 1"), said
    assert "another process has taken this study over" in said
    assert "Traceback" not in said
    assert "report:" not in said
    for table, rows in tables(folder).items():
        pd.testing.assert_frame_equal(rows, before[table])
    assert set(fence.generations(folder)) == {2}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_study_whose_folder_vanishes_ends_with_its_name_and_is_not_begun_anew(tmp_path: Path, workers: int) -> None:
    """As an unmounted disk leaves it: the folder above is there, and empty."""
    (tmp_path / "study.yaml").write_text(CONTENT.replace("WORKERS", str(workers)).replace("steps: 8", "steps: 4000"))
    storage = tmp_path / "mounted"
    storage.mkdir()
    driver = commands.start("study", "study.yaml", "--storage", str(storage), cwd=tmp_path, program=commands.FAKE)
    try:
        commands.wait_until(lambda: is_under_way(storage_path(storage / "s")), driver, SECONDS)
        (storage / "s").rename(tmp_path / "elsewhere")
        said = commands.ended(driver, 60)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert said.endswith("exit code 1"), said
    assert f"{storage}/s: the study's folder is gone" in said
    assert "Traceback" not in said
    assert list(storage.iterdir()) == []
