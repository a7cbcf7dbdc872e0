"""What the pages show exists: study files load, commands have their options, Python its names, links a target."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer
import yaml

import ebft_study
from ebft_study.cli import app
from ebft_study.study.resolving.study_file import load_study

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "analysis" / "README.md"]
}
STUDIES = PAGES["docs/studies.md"] + PAGES["README.md"] + PAGES["docs/index.md"]
EXAMPLES = {
    yaml.safe_load(block)["study"]: block for block in re.findall(r"```yaml\n(.*?)```", STUDIES, flags=re.DOTALL)
}
NUMBERS = {
    "temperature": 21,
    "axes": 20,
    "choices": 4,
    "conditions": 12,
    "linked": 3,
    "exclusions": 6,
    "baselines": 9,
    "profiles": 3,
    "pooling": 12,
    "promoted": 28,
    "own": 9,
}


def test_these_are_all_the_examples() -> None:
    assert set(EXAMPLES) == set(NUMBERS)


@pytest.mark.parametrize("name", NUMBERS)
def test_an_example_loads_and_has_the_trials_that_it_should(name: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(EXAMPLES[name])
    for profile in yaml.safe_load(EXAMPLES[name]).get("profiles") or [None]:
        assert load_study(path, profile).n_trials == NUMBERS[name]


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (page, block)
        for page, text in PAGES.items()
        for block in re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    ]


def commands() -> list[tuple[str, str]]:
    """Page and line of every call of the command line in the pages."""
    lines = [(page, line) for page, block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    found = [(page, match[0]) for page, line in lines if (match := re.search(r"(?<![\w/.-])ebft-study \S.*", line))]
    return [(page, re.split(r"\s#|[|;&>]", line)[0].strip()) for page, line in found]


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: str(value)[:60])
def test_a_command_exists_with_its_options(page: str, line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    group = typer.main.get_command(app)
    if name.startswith("--"):
        assert name in {option for parameter in group.params for option in parameter.opts} | {"--help"}
        return
    command = group.commands[name]  # type: ignore[attr-defined]
    if command.context_settings.get("ignore_unknown_options"):
        return  # it has a command line of its own
    try:
        command.make_context(name, arguments, resilient_parsing=False)
    except click.exceptions.Exit:
        assert "--help" in arguments


def test_there_are_commands() -> None:
    assert len(commands()) > 40


@pytest.mark.parametrize(("page", "block"), blocks("python"), ids=lambda value: str(value)[:40].replace("\n", " "))
def test_python_is_python_and_its_names_exist(page: str, block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("ebft", "ebft_study")
        ):
            is_module = importlib.util.find_spec(f"ebft_study.{node.attr}") is not None
            assert is_module or hasattr(ebft_study, node.attr), f"{page}: ebft.{node.attr}"
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("ebft_study"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")


def test_the_site_builds_and_all_its_links_lead_somewhere(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path),
    ]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stderr
    settings = (tmp_path / "reference" / "settings.html").read_text()
    assert "completions per context" in settings
    assert "kl_coefficient" in settings
    assert not re.search(r'(src|href)="https?://(?!arxiv|github|squidfunk)', (tmp_path / "index.html").read_text())


def test_pages_name_pages_and_files_that_exist() -> None:
    for page, text in PAGES.items():
        for name in re.findall(
            r"`(docs/[\w/]+\.\w+|search_spaces/\w+\.yaml|examples/[\w/]+\.\w+|analysis/[\w/]+\.\w+)`", text
        ):
            assert (ROOT / name).exists() or (ROOT / "ebft_study" / name).exists(), f"{page}: {name}"
