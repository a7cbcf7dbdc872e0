"""A local Ray for one benchmark, and what has to be installed for it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ebft_study.errors import ConfigError

TRAVELLING_BYTES = 400e6
"""Replies of all trials at a time, and room to spare."""
REMEDIES = {
    "ray": "Run make setup",
    "vllm": "Run make setup, or pip install 'ebft-study[vllm]' on a GPU machine",
}


def require(program: str, *modules: str) -> None:
    """Refuse to begin without one of the modules, which are those in `REMEDIES`.

    Raises:
        ConfigError: naming the first that is missing, and how to get it.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"bench {program}: {module} is not installed. {REMEDIES[module]}")


@contextlib.contextmanager
def local_ray() -> Iterator[None]:
    """Inside, Ray runs on this machine; actors that were started end with it."""
    from ebft_study.study.cluster import own

    own.set_environment()
    with own.running(namespace="bench", places=1, dashboard=False, travelling_bytes=TRAVELLING_BYTES):
        yield


@contextlib.contextmanager
def empty_cache() -> Iterator[Path]:
    """A folder that is the package's cache inside, here and in processes started there, and is deleted afterwards."""
    before = os.environ.get("EBFT_STUDY_CACHE")
    with tempfile.TemporaryDirectory(prefix="ebft-bench-") as folder:
        os.environ["EBFT_STUDY_CACHE"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["EBFT_STUDY_CACHE"]
            else:
                os.environ["EBFT_STUDY_CACHE"] = before
