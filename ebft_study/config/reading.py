"""Reads configurations from YAML files and `key=value` overrides; the first problem is reported in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ebft_study.config.keys import as_number, nearest, nest, resolve_key, with_paths
from ebft_study.config.rules import check_rules
from ebft_study.config.sections import RunConfig, Section
from ebft_study.errors import ConfigError, one_line
from ebft_study.storage import open_file

MOST_CHARACTERS, MOST_NODES, MOST_NESTED = 10**6, 10**5, 50
"""Limits of a configuration, far above any that people write."""
SectionT = TypeVar("SectionT", bound=Section)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader."""
    try:
        with open_file(path) as file:
            text = file.read().decode("utf-8")
    except FileNotFoundError:
        remedy = "Check the path, or copy a ready file: ebft-study init --list"
        raise ConfigError(f"{path}: no such file. {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error}). Give a YAML file") from None
    content = parse_yaml(text, source=str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {type(content).__name__}, not a mapping. Write 'key: value' lines")
    return content


class _Loader(yaml.SafeLoader):
    """YAML of limited size; a key that occurs twice in a mapping is refused, as the first would be dropped."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MOST_NESTED:
            raise yaml.YAMLError(f"it is nested more than {MOST_NESTED} levels deep")
        node = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        self.depth -= 1
        return node

    def construct_yaml_int(self, node: Any) -> int:
        value: int = super().construct_yaml_int(node)  # type: ignore[no-untyped-call]
        if abs(value) >= 2**63:
            raise yaml.YAMLError(f"{node.value[:20]}... is too large for a whole number")
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise yaml.YAMLError(f"{name!r} is on lines {seen[name]} and {line}, and only one can count")
            seen[name] = line
        return super().construct_mapping(node, deep)


_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_Loader.yaml_constructors = {  # no sets, dates or bytes, which no setting takes
    tag: _Loader.yaml_constructors[tag] for tag in (*(f"tag:yaml.org,2002:{kind}" for kind in _PLAIN), None)
}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)  # type: ignore[no-untyped-call]
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, *, source: str) -> Any:
    """The content of a YAML text.

    Raises:
        ConfigError: not YAML, a key that occurs twice in a mapping, or too large.
    """
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"{source}: has {len(text)} characters, and at most {MOST_CHARACTERS} are read")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()  # type: ignore[no-untyped-call]
            if node is not None and _size(node, {}) > MOST_NODES:
                raise yaml.YAMLError(f"with its aliases it holds more than {MOST_NODES} values")
            return None if node is None else loader.construct_document(node)  # type: ignore[no-untyped-call]
        finally:
            loader.dispose()  # type: ignore[no-untyped-call]
    # Dates, numbers and characters that do not exist are errors of many kinds.
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{source}: is not valid YAML ({one_line(error)}). Repair the line it names") from None


def _size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """Number of values of a node with all its aliases written out; infinite for one that contains itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        inner = node.value if isinstance(node, yaml.SequenceNode) else [each for pair in node.value for each in pair]
        sizes[id(node)] = 1 + sum(_size(each, sizes) for each in inner)
    return sizes[id(node)]


def build_run(settings: dict[str, Any], *, source: str) -> RunConfig:
    """Validate nested settings; `ConfigError` names `source` and the key of the first problem."""
    run = parse(RunConfig, settings, source=source)
    check_rules(run, source=source)
    return run


def load_run(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run from a YAML file and `key=value` overrides (short names allowed)."""
    return read_run(read_yaml(path), overrides or [], source=str(path))


def read_run(content: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str) -> RunConfig:
    """Read a run from the content of its file."""
    settings = nest(dict(content), source=source)
    changes = {resolve_key(key): value for key, value in map(parse_override, overrides)}
    return build_run(with_paths(settings, changes), source=source)


def parse_override(item: str) -> tuple[str, Any]:
    """Split `alpha=0.5` into ("alpha", 0.5); the value is read as YAML."""
    key, separator, value = item.partition("=")
    if not separator or not key:
        raise ConfigError(f"command line: {item!r} is not an override. Write key=value, for example alpha=0.5")
    return key.strip(), as_number(parse_yaml(value, source=f"command line: {item!r}: the value"))


def parse(model: type[SectionT], settings: dict[str, Any], *, source: str) -> SectionT:
    """Validate `settings`; the first problem becomes a `ConfigError` of one line."""
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(model, error)}") from None


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    problem, *others = error.errors()
    location = problem["loc"]
    key = ".".join(map(str, location)) or "the file"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}.{nearest(str(location[-1]), _siblings(model, location))}"
    value = "" if isinstance(problem["input"], dict) else f"={problem['input']!r}"
    more = f" ({len(others)} more problem{'s' if len(others) > 1 else ''} in this file)" if others else ""
    return f"{key}{value}: {problem['msg'].removeprefix('Value error, ')}.{more}"


def _siblings(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names that are valid at the last part of `location`."""
    section: Any = model
    for part in location[:-1]:
        field = getattr(section, "model_fields", {}).get(part)
        section = field.annotation if field else None
    return list(getattr(section, "model_fields", {}))
