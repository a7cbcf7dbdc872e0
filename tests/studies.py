"""Studies for tests, from the content of a study file or from a spec."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebft_study.study.cluster.capacity import ClusterCapacity
from ebft_study.study.folder.study_yaml import StudySource
from ebft_study.study.resolving.resolved import ResolvedStudy
from ebft_study.study.resolving.study_file import resolve
from ebft_study.study.spec import normalize
from ebft_study.study.spec.study_spec import StudySpec
from ebft_study.study.spec.trial_task import TrialTask
from ebft_study.study.spec.trials import Trial

SOURCE = StudySource("study.yaml")


def resolved(study: StudySpec | Mapping[str, Any], capacity: ClusterCapacity | None = None) -> ResolvedStudy:
    """A checked study, on this machine unless told otherwise."""
    spec = study if isinstance(study, StudySpec) else normalize.from_record(study, source="test")
    return resolve(spec, SOURCE, capacity)


def task(**changes: Any) -> TrialTask:
    """The task of some trial, with the fields that matter to a test."""
    (trial,) = resolved({"study": "s", "question": "?", "run": {"steps": 1}}).trials
    return task_of(trial, **changes)


def task_of(trial: Trial, folder: Path | str = "studies/s", **changes: Any) -> TrialTask:
    """The task of a trial's processes, as a session gives it to Tune."""
    fields: dict[str, Any] = {
        "study": "s",
        "study_folder": str(folder),
        "trial_id": trial.trial_id,
        "label": trial.label,
        "is_baseline": trial.configuration.baseline is not None,
        "total_steps": trial.run.total_steps,
        "run": trial.run.model_dump(mode="json"),
        "settings": trial.configuration.settings,
        "resources": trial.resources.model_dump(mode="json"),
        "objective": {"metric": "cfm_loss", "mode": "min"},
        "loop": "ebft_study.training.loop:train",
    }
    return TrialTask(**fields | changes)
