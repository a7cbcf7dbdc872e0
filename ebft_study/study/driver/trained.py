"""Trained models of a study: a trial's run and one of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ebft_study import config, results
from ebft_study.config import RunConfig
from ebft_study.errors import ConfigError, ResultsError
from ebft_study.results import cell_value
from ebft_study.results.lineage import lineage
from ebft_study.storage import StoragePath
from ebft_study.study.folder import attempts, study_yaml


@dataclass(frozen=True)
class TrainedModel:
    """A trial's checkpoint, and the run that wrote it."""

    trial_id: str
    label: str
    attempt: int
    run: RunConfig
    checkpoint: StoragePath


def trained_model(
    study: results.Results, trial_id: str, checkpoint: str, changes: Mapping[str, Any] | None = None
) -> TrainedModel:
    """The model of a trial at the checkpoint `last`, `best`, or that of a step.

    Args:
        changes: dotted path -> value of settings that differ from the trial's; its benchmarks are dropped.

    Raises:
        ResultsError: there is no such trial or checkpoint.
    """
    check_trial(study, trial_id)
    row = study.trials.set_index("trial_id").loc[trial_id].to_dict()
    settings = {name: cell_value(row[name]) for name in config.short_names() if name in row}
    nested = config.nest({k: v for k, v in settings.items() if v is not None}, source=f"trial {trial_id}")
    nested["evaluation"] = {
        key: value for key, value in nested["evaluation"].items() if not key.startswith("benchmark")
    }
    run = config.build_run(config.with_paths(nested, changes or {}), source="command line")
    return TrainedModel(trial_id, str(row["label"]), int(row["attempt"]), run, _checkpoint(study, trial_id, checkpoint))


def check_trial(study: results.Results, trial_id: str) -> None:
    """Refuse a name that is no trial's."""
    trial_ids = study.trials["trial_id"].tolist()
    if trial_id not in trial_ids:
        listed = ", ".join(trial_ids) or "none"
        raise ResultsError(f"{study.folder}: has no trial {trial_id!r}. Its trials: {listed}")


def _checkpoint(study: results.Results, trial_id: str, which: str) -> StoragePath:
    """The `last`, the `best`, or that of a step, of those that were kept."""
    exploits = lineage(study)
    since = int(exploits.loc[exploits["trial_id"] == trial_id, "attempt"].max()) if len(exploits) else 0
    if which == "last":
        path = attempts.newest_checkpoint(study.folder, trial_id, since=since)
    elif which == "best":
        path = study.best_checkpoint(trial_id)
    elif which.isdecimal():
        path = attempts.checkpoint_at(study.folder, trial_id, int(which), since=since)
    else:
        raise ConfigError(f"command line: --checkpoint={which!r}: is neither last, best nor a step. Use one of them")
    if path is None:
        raise ResultsError(
            f"{study.folder}: trial {trial_id} has no checkpoint {which!r}. Name another one, or a trial"
        )
    return path


def check_base(study: results.Results, run: RunConfig) -> None:
    """Refuse a base model that has changed since the study: adapters fit no other, and tokens mean something else."""
    from ebft_study.networks.loading import digest_of_files

    now = {"models": {run.model: {"files": digest_of_files(run.model, revision=run.model_revision)}}}
    if changed := study_yaml.changed_inputs(study.folder, now):
        raise ResultsError(f"{study.folder}: {changed[0]}: the base model has changed since the study. Put it back")
