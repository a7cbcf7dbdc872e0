"""Reads configurations from YAML files and `key=value` overrides; the first problem is reported in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ebft_study.config.keys import as_number, nearest, nest, resolve_key, with_paths
from ebft_study.config.rules import check_rules
from ebft_study.config.sections import RunConfig, Section
from ebft_study.errors import ConfigError, one_line

SectionT = TypeVar("SectionT", bound=Section)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Check the path, or see search_spaces/ for ready files") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error}). Give a YAML file") from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML ({one_line(error)}). Repair the line it names") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {type(content).__name__}, not a mapping. Write 'key: value' lines")
    return content


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
    try:
        return key.strip(), as_number(yaml.safe_load(value))
    except yaml.YAMLError:
        raise ConfigError(f"command line: {item!r}: the value is not valid YAML. Quote it") from None


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
