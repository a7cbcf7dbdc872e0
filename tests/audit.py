"""Known vulnerabilities of the pinned versions: `make audit`. Exit code 1 if there are any, 2 if nobody can tell."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILES = sorted((Path(__file__).parents[1] / "requirements").glob("*.txt"))


def looked_up(files: Sequence[Path]) -> list[dict[str, Any]]:
    """What the database has on each pin; none where it cannot be reached."""
    options = ["--disable-pip", "--no-deps", "--progress-spinner", "off", "--format", "json"]
    named = [argument for file in files for argument in ("-r", str(file))]
    ended = subprocess.run([sys.executable, "-m", "pip_audit", *options, *named], capture_output=True, text=True)
    try:
        return list(json.loads(ended.stdout)["dependencies"])
    except ValueError:
        return []


def verdict(pins: Sequence[dict[str, Any]]) -> tuple[int, list[str]]:
    """The exit code, and what to print."""
    known = [pin for pin in pins if "skip_reason" not in pin]
    if not known:
        return 2, ["error: no database of vulnerabilities can be reached from here (pypi.org). Nothing was checked"]
    lines = [
        f"{pin['name']} {pin['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'no version'}"
        for pin in known
        for found in pin["vulns"]
    ]
    unknown = len(pins) - len(known)
    summary = f"{len(lines)} known vulnerabilities in {len(known)} pinned versions"
    return int(bool(lines)), [*lines, summary + (f"; {unknown} are not in the database" if unknown else "")]


if __name__ == "__main__":
    code, lines = verdict(looked_up(FILES))
    print("\n".join(lines))
    sys.exit(code)
