"""Plug-ins in tests: modules written into a folder, and a process that forgets them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebft_study import plugins
from ebft_study.results import METRICS, metrics

EXAMPLES = Path(__file__).parent.parent / "examples" / "plugins"


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Afterwards nothing is left of the plug-ins of a test."""
    modules = set(sys.modules)
    yield
    forget(modules)


def forget(modules: set[str]) -> None:
    """Make this process one that has imported these modules alone, and no plug-in."""
    plugins.search_in(None)
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and name.partition(".")[0].startswith("my_"):
            del sys.modules[name]
    metrics._LOADED.clear()
    for name in [name for name, entry in METRICS.items() if entry.plugin]:
        del METRICS[name]


def write_module(folder: Path, name: str, text: str) -> str:
    (folder / f"{name}.py").write_text(text)
    return name
