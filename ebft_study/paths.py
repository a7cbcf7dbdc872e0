"""Folders of this project on a machine."""

from __future__ import annotations

import os
from pathlib import Path


def ready_studies() -> dict[str, Path]:
    """The ready study files by name, whether the package is installed or runs from its source."""
    here = Path(__file__).parent
    folders = (here / "search_spaces", here.parent / "search_spaces")  # of the wheel, of the source
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def cache_folder() -> Path:
    """Return the user's cache folder of this project; the environment variable EBFT_STUDY_CACHE overrides it."""
    import platformdirs  # what computes needs no such folder, and runs where this is not installed

    return Path(os.environ.get("EBFT_STUDY_CACHE") or platformdirs.user_cache_dir("ebft-study"))
