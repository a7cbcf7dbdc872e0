"""Named pipes, sockets, devices and folders where files belong: nothing waits for them, nothing reads them for ever."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from ebft_study import config, results
from ebft_study.config import DataConfig
from ebft_study.data import load_text
from ebft_study.errors import EbftError, NoFileError
from ebft_study.results import StudyRecorder, TrialRecorder, archive
from ebft_study.storage import open_file, storage_path
from ebft_study.study.folder import attempts, history, lock, study_yaml
from ebft_study.study.folder.study_yaml import StudySource
from ebft_study.study.resolving.study_file import load_study
from ebft_study.study.spec.study_spec import StudySpec
from ebft_study.training import checkpoint

pytestmark = pytest.mark.timeout(120)
KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.fixture(params=["pipe"])
def put(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    """Puts something else in place of a file."""

    def replace(path: Path) -> None:
        path.unlink(missing_ok=True)
        KINDS[request.param](path)

    return replace


@pytest.fixture
def study(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "s"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    spec = StudySpec(study="s", question="Are files files?", run={}, seeds=(0,))
    study_yaml.write(folder, spec, StudySource("s.yaml"), provenance={})
    driver, settings = StudyRecorder(folder, study="s"), config.flatten(config.RunConfig())
    for number, trial_id in enumerate(("t0", "t1", "t2")):
        row = {"trial_id": trial_id, "attempt": 1, "hyperparameters": settings, "label": trial_id}
        driver.trial({**row, "status": "finished" if number < 2 else "running"})
        TrialRecorder(folder, study="s", trial_id=trial_id, attempt=1).metrics(1, {"cfm_loss": 1.0})
    results.compact(folder)
    for step in (1, 2):
        path = attempts.folder(folder, "t0", attempts.begin(folder, "t0")) / attempts.checkpoint_name(step)
        path.local.mkdir()
        checkpoint.save(path.local, {"step": step}, step=step, metrics={})
    return folder


@pytest.mark.parametrize("put", KINDS, indirect=True)
def test_a_file_is_opened_and_nothing_else(study: Path, put: Callable[[Path], object]) -> None:
    (study / "file").write_bytes(b"x")
    with open_file(study / "file") as file:
        assert file.read() == b"x"
    with storage_path(study / "file").open("rb") as file:
        assert file.read() == b"x"
    put(study / "file")
    for read in (open_file, lambda path: storage_path(path).open("rb"), lambda path: storage_path(path).read_bytes()):
        with pytest.raises(NoFileError, match=r"file: is a .*, where a file belongs"):
            read(study / "file")


PLACES = {
    "study.yaml": "study.yaml",
    "its copy": ".study.yaml.copy",
    "trial": "results/trials/t0.parquet",
    "copy of a trial": "results/trials/.t0.parquet.copy",
    "row": "results/metrics/t2-*.parquet",
    "compacted": "results/metrics/compacted-*.parquet",
    "manifest": "results/metrics/.compacted.json",
}


@pytest.mark.parametrize("put", ["pipe", "folder"], indirect=True)
@pytest.mark.parametrize("place", PLACES)
def test_a_study_is_read_without_it(study: Path, put: Callable[[Path], object], place: str) -> None:
    (path,) = study.glob(PLACES[place])
    put(path)
    loaded = results.load(study)
    assert any(path.name in problem or path.name[1:-5] in problem for problem in loaded.problems), loaded.problems
    assert loaded.spec["study"] == "s"
    assert loaded.trials["status"].tolist() == ["finished", "finished", "running"]
    lost = {"row": ["t2"], "compacted": ["t0", "t1"]}.get(place, [])
    assert set(loaded.metrics["trial_id"]) == {"t0", "t1", "t2"} - set(lost)
    results.compact(study)
    assert history.read(study, "cfm_loss").states["t0"].status == "finished"
    if not path.is_dir():
        StudyRecorder(study, study="s").trial({"trial_id": "t0", "status": "failed"})
        assert path.is_file() == (path.parent.name == "trials")


def test_a_checkpoint_with_something_else_in_it_is_none(study: Path, put: Callable[[Path], object]) -> None:
    put(study / "train" / "t0-2" / attempts.checkpoint_name(2) / checkpoint.RECORD)
    newest = attempts.newest_checkpoint(study, "t0")
    assert newest == study / "train" / "t0-1" / attempts.checkpoint_name(1)


def test_the_owner_of_a_lock(study: Path, put: Callable[[Path], object]) -> None:
    put(study / lock.OWNER)
    lock.is_held(storage_path(study))


@pytest.mark.parametrize(
    "read",
    [
        load_study,
        lambda path: config.load_run(path, []),
        lambda path: load_text(DataConfig(dataset=str(path))),
        archive.unpack,
    ],
    ids=["study", "run", "data", "archive"],
)
@pytest.mark.parametrize("put", ["pipe", "device"], indirect=True)
def test_what_users_name_is_refused(study: Path, put: Callable[[Path], object], read: Callable[[Path], object]) -> None:
    path = study / "given.jsonl"
    put(path)
    with pytest.raises(EbftError) as caught:
        read(path)
    assert "given.jsonl" in str(caught.value)
