"""Tests of the benchmarks. None looks at a time."""

import shlex
from typing import Any

from typer.testing import CliRunner

from benchmarks.cli import app
from ebft_study.errors import ConfigError


def run_command(arguments: str) -> Any:
    """The result of `ebft-study bench` with these arguments: exit code, output, exception."""
    return CliRunner().invoke(app, shlex.split(arguments), env={"COLUMNS": "200"})


def assert_refused(arguments: str, part: str) -> None:
    """Mistakes in options are typer's; settings that cannot be measured are the package's errors."""
    result = run_command(arguments)
    assert result.exit_code == 2 or isinstance(result.exception, ConfigError)
    assert part in result.stderr + str(result.exception)
