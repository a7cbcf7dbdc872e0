"""Imports go one way, heavy libraries stay where they belong, and names are unique."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ebft_study
from ebft_study.config import all_keys, short_names

ROOT = Path(ebft_study.__file__).parent
FLOORS = [
    {"errors", "hub", "paths", "plugins", "progress", "terminal", "algorithm", "sandbox"},
    {"config", "storage"},
    {"cost", "results", "analysis", "data", "text"},
    {"pretraining", "report"},
    {"networks", "actors"},
    {"rollouts", "features", "verifiers"},
    {"evaluation"},
    {"methods"},
    {"training"},
    {"study.spec"},
    {"study.cluster", "study.folder"},
    {"study.resolving"},
    {"study.forecast", "study.search", "study.stopping", "study.population"},
    {"study.view"},
    {"study.driver"},
    {"api", "doctor"},
    {"__init__", "cli"},
    {"__main__"},
]
"""Rooms of the package, from the ground up. A module imports from its own floor and from those below."""
RAY_ALLOWED = (
    *("study/driver", "study/cluster", "study/stopping", "study/population", "actors.py"),
    *("training/worker.py", "rollouts/vllm", "features/service.py"),
)


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Absolute names that a module imports, function bodies included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def module_name(path: Path) -> str:
    return ".".join(("ebft_study", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


@functools.cache
def imports() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports; a package that a module is part of does not count."""
    known = {module_name(path): path for path in modules()}
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        graph[name] = set()
        for target in imported(path):
            while target and target not in known:
                target = target.rpartition(".")[0]
            if target and target != name and not name.startswith(f"{target}."):
                graph[name].add(target)
    return graph


def room(module: str) -> str:
    """`ebft_study.study.spec.axis` -> `study.spec`, `ebft_study.results.reader` -> `results`."""
    parts = module.split(".")[1:] or ["__init__"]
    return ".".join(parts[:2]) if parts[0] == "study" and len(parts) > 1 else parts[0]


def floor(name: str) -> int:
    return next(index for index, rooms in enumerate(FLOORS) if name in rooms)


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    def reachable(start: str) -> set[str]:
        found: set[str] = set()
        left = list(graph[start])
        while left:
            name = left.pop()
            if name not in found:
                found.add(name)
                left += graph[name]
        return found

    reach = {name: reachable(name) for name in graph}
    return [{other for other in reach[name] if name in reach[other]} for name in graph if name in reach[name]]


@pytest.mark.parametrize("name", sorted(imports()))
def test_imports_go_one_way(name: str) -> None:
    if room(name) == "study":
        return
    for target in imports()[name]:
        assert floor(room(target)) <= floor(room(name)), f"{name} imports {target}"


def test_no_module_and_no_room_is_part_of_a_circle() -> None:
    assert circles(imports()) == []
    rooms: dict[str, set[str]] = {room(name): set() for name in imports()}
    for name, targets in imports().items():
        rooms[room(name)] |= {room(target) for target in targets} - {room(name)}
    assert circles(rooms) == []


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})[0] == {"a", "b", "c"}


def test_the_algorithm_imports_nothing_of_the_package_but_itself() -> None:
    for path in (ROOT / "algorithm").glob("*.py"):
        ours = {name for name in imported(path) if name.startswith("ebft_study")}
        assert all(name.startswith("ebft_study.algorithm") for name in ours), path


def test_the_package_needs_nothing_of_the_checkout_around_it() -> None:
    for path in modules():
        names = {name.split(".")[0] for name in imported(path)}
        assert "tests" not in names, path
        assert "benchmarks" not in names or path == ROOT / "cli.py", path


def test_ray_appears_only_where_it_belongs() -> None:
    for path in modules():
        where = str(path.relative_to(ROOT))
        if any(name.split(".")[0] == "ray" for name in imported(path)):
            assert where.startswith(RAY_ALLOWED), where


def test_vllm_appears_only_in_the_process_that_holds_it() -> None:
    found = {str(path.relative_to(ROOT)) for path in modules() for name in imported(path) if name.startswith("vllm")}
    assert found == {"rollouts/vllm/engine.py", "rollouts/vllm/reader.py"}


def test_configuration_and_results_import_quickly_without_heavy_libraries() -> None:
    program = (
        "import sys, time; start = time.perf_counter()\n"
        "import ebft_study, ebft_study.config, ebft_study.cost, ebft_study.errors, ebft_study.storage\n"
        "import ebft_study.results, ebft_study.analysis, ebft_study.report\n"
        "import ebft_study.report.answers, ebft_study.report.interactive, ebft_study.report.notebooks\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)


MAP = (ROOT.parent / "docs" / "architecture.md").read_text()


def test_the_map_shows_the_rooms_on_their_floors() -> None:
    picture = re.findall(r"```\n(.*?)```", MAP, flags=re.DOTALL)[0]
    assert [set(line.split()) for line in picture.splitlines()] == FLOORS[::-1]
    assert {room(name) for name in imports()} - {"study"} == set().union(*FLOORS)


def test_what_the_map_names_exists() -> None:
    """`path/to/file.py:function` or `:Class.method`; a way has at most twelve steps."""
    named = re.findall(r"`(ebft_study/[\w/]+\.py):([\w.]+)`", MAP)
    assert len(named) > 20
    for path, name in named:
        tree: ast.AST = ast.parse((ROOT.parent / path).read_text())
        for part in name.split("."):
            body: list[ast.stmt] = getattr(tree, "body", [])
            tree = next((node for node in body if getattr(node, "name", None) == part), ast.Pass())
            assert not isinstance(tree, ast.Pass), f"{path} has no {name}"
    for path in re.findall(r"`((?:[a-z_]+/)+[\w.]+\.(?:py|j2))`", MAP):
        assert any((base / path).exists() for base in (ROOT, ROOT.parent)), path
    for way in re.findall(r"(?:^\d+\. .*\n)+", MAP, flags=re.MULTILINE):
        assert len(way.splitlines()) <= 12


def test_the_short_name_of_every_setting_is_unique() -> None:
    assert len(short_names()) == len(all_keys())
