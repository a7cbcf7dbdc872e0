"""What the command lines of all benchmarks have in common. Imports no torch, so that --help is instant."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ebft_study.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Mistakes are errors of the package: one line, and what to do."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"bench: {message}. See --help")


def positive(text: str) -> int:
    """A number of things, at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def fraction(text: str) -> float:
    """A share, 0 and 1 included."""
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value
