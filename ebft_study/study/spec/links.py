"""Linked settings: equal to another setting, a product, or a quotient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from ebft_study import config
from ebft_study.config import Section
from ebft_study.errors import rule_broken

Operand = int | float | str
"""A number, or the setting that holds it."""


class Link(Section):
    """A setting computed from others, by exactly one of three forms."""

    same_as: str | None = None
    product: tuple[Operand, ...] | None = None
    quotient: tuple[Operand, Operand] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Link:
        if sum(form is not None for form in (self.same_as, self.product, self.quotient)) != 1:
            raise ValueError("needs exactly one form. Give one of same_as, product, quotient")
        if self.product is not None and not any(isinstance(operand, str) for operand in self.product):
            raise ValueError("is a product of numbers alone. Fix it under 'run', or name a setting")
        return self

    @property
    def operands(self) -> tuple[Operand, ...]:
        return (self.same_as,) if self.same_as is not None else self.product or self.quotient or ()

    @property
    def sources(self) -> tuple[str, ...]:
        """The settings that it is computed from."""
        return tuple(operand for operand in self.operands if isinstance(operand, str))

    def resolved(self, source: str) -> Link:
        """The same with dotted paths, and numbers that YAML read as text."""

        def resolve(operand: Operand) -> Operand:
            number = config.as_number(operand)
            return config.resolve_key(number, source=source) if isinstance(number, str) else number

        form = next(name for name in Link.model_fields if getattr(self, name) is not None)
        operands = tuple(map(resolve, self.operands))
        return config.parse(Link, {form: operands[0] if form == "same_as" else operands}, source=source)


def in_order(links: Mapping[str, Link], source: str) -> dict[str, Link]:
    """Links in order, each after those that it is computed from; refuses cycles."""
    ordered: dict[str, Link] = {}

    def add(path: str, on_the_way: tuple[str, ...]) -> None:
        if path in on_the_way:
            circle = " -> ".join(map(config.short_name, (*on_the_way, path)))
            rule, remedy = "follows itself", "Fix one of them under 'run', or make it an axis"
            raise rule_broken(
                source=source, key=f"linked.{config.short_name(path)}", given=circle, rule=rule, remedy=remedy
            )
        for origin in links[path].sources if path not in ordered else ():
            if origin in links:
                add(origin, (*on_the_way, path))
        ordered.setdefault(path, links[path])

    for path in links:
        add(path, ())
    return ordered


def apply_links(
    links: Mapping[str, Link], settings: dict[str, Any], *, given: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Nested settings with everything linked filled in.

    Args:
        links: ordered (`in_order`). given: what a configuration, such as a baseline, sets itself; it stays.
    """
    for path, link in links.items():
        if path not in given:
            settings = config.with_paths(settings, {path: _value(path, link, settings, source)})
    return settings


def _value(path: str, link: Link, settings: Mapping[str, Any], source: str) -> Any:
    operands = [_setting(settings, operand) if isinstance(operand, str) else operand for operand in link.operands]
    if link.same_as is not None:
        return operands[0]
    key = f"linked.{config.short_name(path)}"
    for name, operand in zip(link.operands, operands, strict=True):
        if isinstance(operand, bool) or not isinstance(operand, int | float):
            rule = f"{name} is {operand!r} here, which is no number"
            raise rule_broken(source=source, key=key, given=list(link.operands), rule=rule, remedy="Name a number")
    if link.quotient is not None and not operands[1]:
        rule, remedy = "divides by zero here", "Exclude this configuration, or choose another divisor"
        raise rule_broken(source=source, key=key, given=list(link.operands), rule=rule, remedy=remedy)
    value = math.prod(operands) if link.product is not None else operands[0] / operands[1]
    return _whole(path, float(value), key, source)


def _whole(path: str, value: float, key: str, source: str) -> int | float:
    """A whole number for a setting that counts something."""
    default = config.all_keys()[path]
    if isinstance(default, float):
        return value
    if value.is_integer():
        return int(value)
    if not isinstance(default, int):
        return value
    rule, remedy = "is a whole number", "Choose numbers that divide evenly, or exclude this configuration"
    raise rule_broken(source=source, key=key, given=value, rule=rule, remedy=remedy)


def _setting(settings: Mapping[str, Any], path: str) -> Any:
    section, _, leaf = path.rpartition(".")
    inner = settings.get(section, {}) if section else settings
    return inner[leaf] if leaf in inner else config.all_keys()[path]
