"""Imports go one way, heavy libraries stay where they belong, and names are unique."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ebft_study
from ebft_study.config import all_keys, short_names

ROOT = Path(ebft_study.__file__).parent
LAYERS = [
    {"algorithm", "errors", "paths", "places", "config", "rules", "cost", "results", "report", "progress"},
    {"data", "ngram", "block_model", "lora", "actors"},
    {"rollouts", "features", "pretraining", "models", "evaluation"},
    {"methods"},
    {"training"},
    {"study", "bench", "diagnostics"},
    {"cli", "__main__"},
]
"""A module may import from its own layer and from those above it in this list."""
EXCEPTIONS = {"evaluation": {"methods"}}
"""Evaluation shares the cross-entropy of the sft method."""
RAY_ALLOWED = {
    *("study", "training/worker.py", "actors.py", "rollouts/vllm", "features/service.py"),
    "bench/services.py",
}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Absolute names that a module imports, function bodies included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def rank(name: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    if path.parent == ROOT and path.name == "__init__.py":
        return
    own = room(path)
    for name in imported(path):
        package, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if package == "ebft_study" and other not in ("", "__version__"):
            allowed = rank(other) <= rank(own) or other in EXCEPTIONS.get(own, set())
            assert allowed, f"{own} imports {name}"


def test_the_algorithm_imports_nothing_of_the_package_but_itself() -> None:
    for path in (ROOT / "algorithm").glob("*.py"):
        ours = {name for name in imported(path) if name.startswith("ebft_study")}
        assert all(name.startswith("ebft_study.algorithm") for name in ours), path


def test_ray_appears_only_where_it_belongs() -> None:
    for path in modules():
        place = str(path.relative_to(ROOT))
        if any(name.split(".")[0] == "ray" for name in imported(path)):
            assert place.startswith(tuple(RAY_ALLOWED)), place


def test_vllm_appears_only_in_the_process_that_holds_it() -> None:
    found = {str(path.relative_to(ROOT)) for path in modules() for name in imported(path) if name.startswith("vllm")}
    assert found == {"rollouts/vllm/engine.py", "rollouts/vllm/reader.py"}


def test_configuration_and_results_import_quickly_without_heavy_libraries() -> None:
    program = (
        "import sys, time; start = time.perf_counter()\n"
        "import ebft_study.config, ebft_study.cost, ebft_study.errors, ebft_study.results, ebft_study.report\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_short_name_of_every_setting_is_unique() -> None:
    assert len(short_names()) == len(all_keys())
