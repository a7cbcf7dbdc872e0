"""Removing and renaming studies that no driver is running."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Mapping

from ebft_study.errors import ConfigError, ResultsError
from ebft_study.results import copies, studies_in
from ebft_study.results.reader import read_spec
from ebft_study.storage import StoragePath, absolute, storage_errors, storage_path
from ebft_study.study.folder import lock, study_yaml
from ebft_study.study.spec.study_spec import NAME_PATTERN


def delete(folder: StoragePath) -> None:
    """Remove a study with all that it holds.

    Raises:
        ResultsError: a driver is running it.
    """
    folder = absolute(folder)
    with lock.hold(folder, record=study_yaml.NAME):
        copies.delete(folder / study_yaml.NAME)  # first: what a killed removal leaves is not taken for a whole study
        if folder.local:
            doomed = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.tmp"
            with storage_errors(folder, "removed"):
                os.rename(folder, doomed)  # in one moment, as the lock's heartbeat writes below its old name
            doomed.delete()
        else:
            folder.delete()
            shutil.rmtree(folder.local_dir, ignore_errors=True)


def rename(folder: StoragePath, name: str) -> StoragePath:
    """Give a study and its folder another name; returns the new folder.

    Rows that it has keep the name in their files: `results.load` and `results.catalog` show the new one.

    Raises:
        EbftError: a driver is running it, it lies in a store, or another study has the name.
    """
    folder = absolute(folder)
    if not re.fullmatch(NAME_PATTERN, name) or len(name) > 100:
        raise ConfigError(
            f"command line: {name!r}: is no name of a study. Use letters, digits, '.', '-' and '_', 100 at most"
        )
    if folder.local is None:
        raise ResultsError(f"{folder}: a store has no folders that could be renamed. Keep the name")
    target = folder.local.parent / name
    if os.path.lexists(target):
        raise ResultsError(f"{target}: exists. Choose another name, or delete it first")
    with lock.hold(folder, record=study_yaml.NAME):
        study_yaml.change_name(folder, name)
        with storage_errors(folder):
            os.rename(folder, target)
        (target / lock.OWNER).unlink(missing_ok=True)
    return storage_path(target)


def search_began_with(folder: StoragePath) -> list[str]:
    """Names of the studies beside this one whose search began with its results; they hold what they need of it."""
    return [other.name for other in studies_in(folder.parent) if folder.name in _named(read_spec(other, []))]


def _named(record: Mapping[str, object]) -> list[str]:
    warm_start = record.get("warm_start")
    earlier = warm_start if isinstance(warm_start, list) else []
    return [str(each.get("study")) for each in earlier if isinstance(each, Mapping)]
