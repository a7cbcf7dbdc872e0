"""Reading configurations: YAML files and `key=value` overrides, with the first problem as one line for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ebft_study.config.keys import as_number, nearest, nest, resolve_key, set_path
from ebft_study.config.rules import broken_rules
from ebft_study.config.sections import RunConfig, Section
from ebft_study.errors import ConfigError, one_line, rule_broken

SectionT = TypeVar("SectionT", bound=Section)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from `path`, read safely."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Check the path, or see search_spaces/ for ready files") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error}). Give a YAML file") from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML ({one_line(error)}). Mend the line it names") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {type(content).__name__}, not a mapping. Write 'key: value' lines")
    return content


def build_run(settings: dict[str, Any], *, source: str) -> RunConfig:
    """A checked `RunConfig` from nested settings; raises `ConfigError` naming `source` and the key."""
    config = parse(RunConfig, settings, source=source)
    for key, given, rule, remedy in broken_rules(config):
        raise rule_broken(source=source, key=key, given=given, rule=rule, remedy=remedy)
    return config


def load_run(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """A run from a YAML file and `key=value` overrides (short names allowed)."""
    settings = nest(read_yaml(path), source=str(path))
    for item in overrides or []:
        key, value = parse_override(item)
        set_path(settings, resolve_key(key), value)
    return build_run(settings, source=str(path))


def parse_override(item: str) -> tuple[str, Any]:
    """`alpha=0.5` -> ("alpha", 0.5); values are read as YAML."""
    key, separator, value = item.partition("=")
    if not separator or not key:
        raise ConfigError(f"command line: {item!r} is not an override. Write key=value, for example alpha=0.5")
    try:
        return key.strip(), as_number(yaml.safe_load(value))
    except yaml.YAMLError:
        raise ConfigError(f"command line: {item!r}: the value is not valid YAML. Quote it") from None


def parse(model: type[SectionT], settings: dict[str, Any], *, source: str) -> SectionT:
    """Validate `settings`, turning the first problem into one line for people."""
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(model, error)}") from None


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"]) or "the file"
    if problem["type"] == "extra_forbidden":
        siblings = _siblings(model, problem["loc"])
        return f"unknown key {key!r}.{nearest(str(problem['loc'][-1]), siblings)}"
    given = "" if isinstance(problem["input"], dict) else f"={problem['input']!r}"
    more = len(error.errors()) - 1
    also = f" ({more} more problem{'s' if more > 1 else ''} in this file)" if more else ""
    return f"{key}{given}: {problem['msg'].removeprefix('Value error, ')}.{also}"


def _siblings(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    current: Any = model
    for part in location[:-1]:
        field = current.model_fields.get(part) if hasattr(current, "model_fields") else None
        current = field.annotation if field else None
    return list(getattr(current, "model_fields", {}))
