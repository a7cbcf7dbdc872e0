"""Two concurrent small studies: one in an S3 store whose driver is killed, one on a disk that runs full."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pytest

from ebft_study import results
from ebft_study.errors import ResultsError
from ebft_study.storage import storage_path
from tests import commands, disks

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

SECONDS = 300.0  # for each command
STEPS = 8
CONTENT = f"""
study: far
question: Does a study survive its storage?
run: {{steps: {STEPS}, weight_decay: 0.25, checkpoint_every_steps: 1, log_every_steps: 1, features: {{backend: local}}}}
axes: {{learning_rate: [0.5, 1.0]}}
resources: {{workers_per_trial: 0}}
"""
TRIALS = ["t0000", "t0001"]


@dataclass
class Study:
    """A study, its storage, and what its commands said."""

    cwd: Path
    storage: str
    said: dict[str, str] = field(default_factory=dict)
    before: set[tuple[str, int]] = field(default_factory=set)

    @property
    def address(self) -> str:
        return str(storage_path(self.storage) / "far")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return commands.start(*arguments, cwd=self.cwd, program=commands.FAKE)

    def keys(self) -> set[tuple[str, int]]:
        with contextlib.suppress(ResultsError):
            measured = results.read_table(self.address, "metrics")
            return set(zip(measured["trial_id"], measured["step"], strict=True))
        return set()

    def under_way(self) -> bool:
        return any(step > 2 for _, step in self.keys())

    def trials(self) -> pd.DataFrame:
        return results.read_table(self.address, "trials").set_index("trial_id")


def stop(process: subprocess.Popen[str]) -> None:
    """Nothing stays behind when a test fails."""
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(b"x" * 1024):
            pass


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, s3_query: str) -> Iterator[tuple[Study, Study | None]]:
    folder = tmp_path_factory.mktemp("far")
    (folder / "study.yaml").write_text(CONTENT)
    store = Study(folder, f"s3://studies/here?{s3_query}")
    with disks.small_disk(folder / "disk", "4m") as mounted, contextlib.ExitStack() as left:
        disk = Study(folder, str(folder / "disk"))
        drivers = {
            study.storage: study.start("study", "study.yaml", "--storage", study.storage) for study in (store, disk)
        }
        for driver in drivers.values():
            left.callback(stop, driver)

        def strike(study: Study) -> None:
            if study is store:
                drivers[store.storage].send_signal(signal.SIGKILL)
                drivers[store.storage].wait(timeout=100)
            elif mounted:
                fill(folder / "disk" / "ballast")
            study.before = study.keys()

        untouched = [store, disk]
        while untouched:  # whichever is in the middle of its first trial
            waiting_for = drivers[untouched[0].storage]
            commands.wait_until(lambda: any(study.under_way() for study in untouched), waiting_for, SECONDS)
            ripe = next(study for study in untouched if study.under_way())
            strike(ripe)
            untouched.remove(ripe)
        again = store.start("resume", store.address)
        disk.said["full"] = commands.ended(drivers[disk.storage], SECONDS)
        if mounted:
            (folder / "disk" / "ballast").unlink()
            disk.said["resume"] = commands.ended(disk.start("resume", "far", "--storage", disk.storage), SECONDS)
        store.said["resume"] = commands.ended(again, SECONDS)
        store.said["status"] = commands.ended(store.start("status", store.address), SECONDS)
        yield store, disk if mounted else None


@pytest.fixture
def store(both: tuple[Study, Study | None]) -> Study:
    return both[0]


@pytest.fixture
def disk(both: tuple[Study, Study | None]) -> Study:
    if both[1] is None:
        pytest.skip("needs the right to mount a small disk")
    return both[1]


@pytest.fixture(params=["store", "disk"])
def study(request: pytest.FixtureRequest) -> Study:
    study = request.getfixturevalue(request.param)
    assert isinstance(study, Study)
    return study


def test_every_trial_finishes_and_no_reported_row_is_lost(study: Study) -> None:
    assert study.trials()["status"].to_dict() == dict.fromkeys(TRIALS, "finished"), study.said
    assert study.before
    assert study.keys() == {(trial_id, step) for trial_id in TRIALS for step in range(STEPS + 1)}
    assert study.said["resume"].endswith("exit code 0")


def test_trials_resume_from_their_checkpoints(study: Study) -> None:
    under_way = {trial_id for trial_id, step in study.before if step >= 2}  # step 1 and its checkpoint lie behind it
    events = results.read_table(study.address, "events")
    assert under_way
    assert set(events.loc[events["kind"] == "resumed", "trial_id"]) >= under_way, study.said


def test_the_best_checkpoint_of_a_trial_is_there(study: Study) -> None:
    from ebft_study.training import checkpoint

    loaded = results.load(study.address)
    for trial_id in TRIALS:
        best = loaded.best_checkpoint(trial_id)
        assert best is not None
        assert checkpoint.step_of(best) == STEPS  # the objective falls all the time


def test_a_study_in_a_store_needs_no_folder_here(store: Study) -> None:
    assert not (store.cwd / "studies").exists()
    assert {"study.yaml", "results", "train", "report.html"} <= set(storage_path(store.address).names())
    assert "2 of 2 trials finished" in store.said["status"]
    assert ".lock" not in storage_path(store.address).names()


def test_a_full_disk_stops_the_study_with_the_reason(disk: Study) -> None:
    assert "No space left on device" in disk.said["full"]
    assert "Free some space" in disk.said["full"]
    assert "resume with: ebft-study resume" in disk.said["full"]
    assert "Traceback" not in disk.said["full"]
    assert disk.said["full"].endswith("exit code 1")
