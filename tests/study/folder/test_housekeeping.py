"""Removing and renaming studies: what is left, what follows the new name, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ebft_study import api, results
from ebft_study.errors import EbftError, ResultsError
from ebft_study.results import StudyRecorder, TrialRecorder
from ebft_study.storage import StoragePath, storage_path
from ebft_study.study.folder import housekeeping, lock, study_yaml
from ebft_study.study.folder.study_yaml import StudySource
from ebft_study.study.resolving import extending
from ebft_study.study.search import journal
from ebft_study.study.spec import normalize, trials
from ebft_study.study.spec.study_spec import StudySpec
from ebft_study.study.stopping.schedulers import Halving

CONTENT = {"study": "first", "question": "?", "run": {"steps": 4}, "axes": {"alpha": [0.0, 1.0]}}


def written(folder: StoragePath, **changes: Any) -> StudySpec:
    """A study with a row in each of its tables."""
    spec = normalize.from_record({**CONTENT, "study": folder.name, **changes}, source="test")
    if folder.local:
        folder.local.mkdir(parents=True)
    study_yaml.write(folder, spec, StudySource("s.yaml"), provenance={})
    (trial, *_) = trials.listed(spec) or [None]
    row = {"trial_id": "t0000", "status": "finished", "attempt": 1, "hyperparameters": {}, "configuration": "alpha=0"}
    StudyRecorder(folder, study=spec.study).trial(row if trial else {**row, "configuration": "x"})
    TrialRecorder(folder, study=spec.study, trial_id="t0000", attempt=1).metrics(0, {"ce_loss": 1.0})
    return spec


@pytest.fixture(params=["disk", "store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoragePath]:
    if request.param == "disk":
        yield storage_path(tmp_path / "studies" / "first")
    else:
        query = request.getfixturevalue("s3_query")
        yield storage_path(f"s3://studies/housekeeping/first?{query}")


def test_a_deleted_study_is_gone_and_others_are_not(folder: StoragePath) -> None:
    written(folder)
    other = folder.parent / "other"
    written(other)
    housekeeping.delete(folder)
    assert folder.parent.names() == ["other"]
    assert results.load(other).trials["trial_id"].tolist() == ["t0000"]
    housekeeping.delete(other)


def test_a_running_study_is_neither_deleted_nor_renamed(tmp_path: Path) -> None:
    folder = storage_path(tmp_path / "first")
    written(folder)
    with lock.hold(folder, record=study_yaml.NAME):
        with pytest.raises(ResultsError, match="another process is running"):
            housekeeping.delete(folder)
        with pytest.raises(ResultsError, match="another process is running"):
            housekeeping.rename(folder, "second")
    assert study_yaml.read(folder).study == "first"
    assert not (tmp_path / "second").exists()


def test_what_a_killed_removal_leaves_can_be_removed(tmp_path: Path) -> None:
    """study.yaml goes first, so that nothing takes the rest for a study."""
    folder = storage_path(tmp_path / "first")
    written(folder)
    (folder / study_yaml.NAME).delete()
    (folder / ".study.yaml.copy").delete()
    housekeeping.delete(api.find("first", tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 101])
def test_names_that_no_study_can_have_are_refused(name: str, tmp_path: Path) -> None:
    folder = storage_path(tmp_path / "first")
    written(folder)
    with pytest.raises(EbftError, match="no name of a study"):
        housekeeping.rename(folder, name)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_a_name_that_exists_is_refused(tmp_path: Path) -> None:
    written(storage_path(tmp_path / "first"))
    written(storage_path(tmp_path / "second"))
    with pytest.raises(ResultsError, match="exists"):
        housekeeping.rename(storage_path(tmp_path / "first"), "second")
    assert study_yaml.read(tmp_path / "first").study == "first"
    assert study_yaml.read(tmp_path / "second").study == "second"


def test_a_study_in_a_store_keeps_its_name(s3_query: str) -> None:
    folder = storage_path(f"s3://studies/renamed/first?{s3_query}")
    with pytest.raises(ResultsError, match="a store has no folders"):
        housekeeping.rename(folder, "second")


def test_all_that_reads_a_renamed_study_shows_its_new_name(tmp_path: Path) -> None:
    """Its rows hold both names: those from before, and those of a session since."""
    written(storage_path(tmp_path / "first"))
    folder = housekeeping.rename(storage_path(tmp_path / "first"), "second")
    assert [path.name for path in tmp_path.iterdir()] == ["second"]
    assert not (folder / lock.OWNER).exists()
    assert not lock.is_held(folder)
    assert yaml.safe_load((tmp_path / "second" / "study.yaml").read_text())["study"] == "second"
    TrialRecorder(folder, study="second", trial_id="t0000", attempt=1).metrics(1, {"ce_loss": 0.5})
    assert set(results.read_table(folder, "metrics")["study"]) == {"first", "second"}
    loaded = results.load(folder)
    assert set(loaded.metrics["study"]) == set(loaded.trials["study"]) == {"second"}
    in_catalog = results.catalog(tmp_path).sql("SELECT DISTINCT study FROM metrics").fetchall()
    assert in_catalog == [("second",)]
    (line,) = api.studies(tmp_path)
    assert (line.name, line.done, line.trials) == ("second", 1, 2)


def test_a_renamed_study_decides_as_before(tmp_path: Path) -> None:
    """Orders, brackets and Optuna's study follow the name with which the study began."""
    hyperband = {"kind": "hyperband", "grace_period_steps": 1, "reduction_factor": 2}
    before = written(storage_path(tmp_path / "first"), scheduler=hyperband, run={"steps": 16, "eval_every_steps": 1})
    once = housekeeping.rename(storage_path(tmp_path / "first"), "second")
    after = study_yaml.read(housekeeping.rename(once, "third"))
    assert (after.study, after.drawn_by, before.drawn_by) == ("third", "first", "first")
    labels = [f"alpha={alpha}" for alpha in range(40)]
    brackets = [[Halving(spec, 16).group(label) for label in labels] for spec in (before, after)]
    assert brackets[0] == brackets[1]
    other = before.model_copy(update={"study": "third"})
    assert [Halving(other, 16).group(label) for label in labels] != brackets[0], "brackets are drawn by the name"
    asked = normalize.from_record({**CONTENT, "study": "third", "scheduler": hyperband,
                                   "run": {"steps": 16, "eval_every_steps": 1}}, source="test")  # fmt: skip
    assert extending.differences(after, asked) == [], "its file, under the new name, is still the same study"
    back = study_yaml.read(housekeeping.rename(storage_path(tmp_path / "third"), "first"))
    assert back == before


def test_a_renamed_search_goes_on_in_its_journal(tmp_path: Path) -> None:
    search = {"algorithm": "optuna", "num_configurations": 3}
    spec = written(storage_path(tmp_path / "first"), search=search, axes={"alpha": [0.0, 0.5, 1.0]})
    begun = journal.open_study(spec, tmp_path / "first" / journal.JOURNAL)
    begun.ask()
    folder = housekeeping.rename(storage_path(tmp_path / "first"), "second")
    assert folder.local
    resumed = journal.open_study(study_yaml.read(folder), folder.local / journal.JOURNAL)
    assert len(resumed.get_trials(deepcopy=False)) == 1


def test_studies_whose_search_began_with_another_are_named(tmp_path: Path) -> None:
    written(storage_path(tmp_path / "first"))
    earlier = {"study": "first", "sha256": "0", "data": {}, "models": {}, "points": [], "not_used": {}}
    search = {"algorithm": "optuna", "num_configurations": 3, "warm_start_from": ["first"]}
    written(storage_path(tmp_path / "later"), search=search, warm_start=[earlier])
    assert housekeeping.search_began_with(storage_path(tmp_path / "first")) == ["later"]
    assert housekeeping.search_began_with(storage_path(tmp_path / "later")) == []
