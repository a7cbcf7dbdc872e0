"""Running a search to its end without a cluster, and reading its journal with plain Optuna."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from ebft_study.study.folder.trial_states import TrialResult
from ebft_study.study.search.listed import Search
from ebft_study.study.spec.trials import Trial


def run_all(search: Search, result: Callable[[Trial], TrialResult]) -> list[Trial]:
    """Run every trial, one after the other."""
    done = []
    while (trial := search.next()) is not None:
        search.ended(trial.trial_id, result(trial))
        done.append(trial)
    assert search.exhausted
    return done


def plain_optuna(journal: Path) -> optuna.Study:
    return optuna.load_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(journal))))
