"""Built-in data sets: Python source that is installed with this project, split by file, and generated miniatures.

`stdlib`        the running Python's standard library without its tests; the tiny models are pretrained on it.
`unstructured`  the test suites inside the pandas and numpy wheels: source in another style, the analogue of raw code.
`qa`            signature and docstring -> function body, from hard dependencies: the analogue of instructions.

Miniatures, which are the same on every machine, and split by meaning:

`mini_pretraining`   text that half prepares for the tasks; `mini-1m` is pretrained on it.
`mini_functions`     signature and docstring -> body, with hidden tests that judge any answer.
`mini_unstructured`  files of such functions without prompts: raw code from which `mini_functions` can be learnt.
`mini_translation`   sentences of a toy language with several right translations each.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import importlib.util
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ebft_study.data import mini_functions, mini_pretraining, mini_translation, mini_unstructured
from ebft_study.data.cache import Facts, cached_examples
from ebft_study.data.draws import MEANINGS_PERCENT
from ebft_study.data.examples import SPLITS, Example, TextDataset, build_dataset, digest, split_of
from ebft_study.data.functions import function_pairs, normalize
from ebft_study.errors import DataError

TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
STDLIB_SKIPPED = TEST_FOLDERS | {"site-packages", "dist-packages", "encodings", "pydoc_data"}  # the last two are tables
MACHINE_MADE = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")  # of one machine or distribution
TEST_PACKAGES = ("numpy", "pandas")
FUNCTION_PACKAGES = ("datasets", "jinja2", "matplotlib", "numpy", "optuna", "pandas", "pydantic", "rich", "scipy")
GENERATED = frozenset({"__config__.py", "_version.py", "version.py"})  # written at build time: differ between machines


@dataclass(frozen=True)
class Source:
    """A built-in data set, split by the part of its examples' origins before "::"; `slow`: cached."""

    summary: str
    read: Callable[[], tuple[list[Example], Facts]]
    packages: tuple[str, ...] = ()
    has_answers: bool = False
    split_by: str = "file"
    evaluation_percent: int = 5
    slow: bool = False


def load_builtin(name: str, max_examples: int | None) -> TextDataset:
    """Load the built-in data set `name`."""
    source = SOURCES[name]
    versions = {"python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in source.packages}
    examples, facts = cached_examples(name, versions, source.read) if source.slow else source.read()
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for example in examples:
        key = example.origin.partition("::")[0]
        splits[split_of(key, percent=source.evaluation_percent)].append(example)
    provenance = {"source": source.summary, "split_by": source.split_by, "versions": versions, **facts}
    return build_dataset(
        name, has_answers=source.has_answers, splits=splits, provenance=provenance, max_examples=max_examples
    )


def _stdlib() -> tuple[list[Example], Facts]:
    files = _python_files(Path(sysconfig.get_path("stdlib")), STDLIB_SKIPPED)
    return [Example("", text, relative) for relative, text in files if not relative.startswith(MACHINE_MADE)], {}


def _test_suites() -> tuple[list[Example], Facts]:
    examples: list[Example] = []
    for package in TEST_PACKAGES:
        files = _python_files(_package_folder(package))
        tests = [(relative, text) for relative, text in files if "tests" in relative.split("/")[:-1]]
        if not tests:
            raise DataError(f"package {package!r} is installed without its test suite. Install its wheel from PyPI")
        examples += [Example("", text, f"{package}/{relative}") for relative, text in tests]
    return examples, {}


def _functions() -> tuple[list[Example], Facts]:
    """Extract function pairs; of bodies that differ only in comments, spacing and literals, the first in path order."""
    distinct: dict[str, Example] = {}
    copies = 0
    with _garbage_collection_paused():
        for package in FUNCTION_PACKAGES:
            for relative, text in _python_files(_package_folder(package), TEST_FOLDERS):
                if relative.rpartition("/")[2] in GENERATED:
                    continue
                for name, prompt, answer in function_pairs(text):
                    example = Example(prompt, answer, f"{package}/{relative}::{name}")
                    copies += distinct.setdefault(digest(normalize(answer)), example) is not example
    return list(distinct.values()), {"copies_removed": copies}


@contextlib.contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Syntax trees are many objects without cycles: collecting while they grow doubles the time to parse them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _python_files(root: Path, skipped: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """Yield (path relative to `root` with forward slashes, text) of its UTF-8 Python files, in path order.

    Folders named in `skipped` are not entered: site-packages can be larger than the rest by far.
    """
    files: dict[str, Path] = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        files |= {path.relative_to(root).as_posix(): path for path in paths}
    for relative in sorted(files):
        try:
            text = files[relative].read_text(encoding="utf-8")  # universal newlines: the same text on every platform
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield relative, text


def _package_folder(package: str) -> Path:
    """Locate a package's source without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DataError(f"package {package!r} is not installed. Install the project's dependencies again")
    return Path(spec.origin).parent


SOURCES = {
    "stdlib": Source("the running Python's standard library without its tests", _stdlib),
    "unstructured": Source(
        "the test suites inside the pandas and numpy packages", _test_suites, packages=TEST_PACKAGES
    ),
    "qa": Source(
        "functions of installed dependencies: signature and docstring -> body",
        _functions,
        packages=FUNCTION_PACKAGES,
        has_answers=True,
        slow=True,
    ),
    "mini_pretraining": Source(
        "generated text that half prepares for the miniatures",
        lambda: (mini_pretraining.read_examples(), {}),
        split_by="document",
        slow=True,
    ),
    "mini_functions": Source(
        "generated functions: signature and docstring -> body, with tests",
        lambda: (mini_functions.read_examples(), {}),
        has_answers=True,
        split_by="meaning",
        evaluation_percent=MEANINGS_PERCENT,
    ),
    "mini_unstructured": Source(
        "generated files of small functions",
        lambda: (mini_unstructured.read_examples(), {}),
        split_by="meaning",
        evaluation_percent=MEANINGS_PERCENT,
    ),
    "mini_translation": Source(
        "generated sentences and their translations",
        lambda: (mini_translation.read_examples(), {}),
        has_answers=True,
        split_by="meaning",
        evaluation_percent=MEANINGS_PERCENT,
    ),
}
