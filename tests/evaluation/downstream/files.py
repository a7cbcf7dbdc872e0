"""Small benchmark files in the formats of the original distributions."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HUMANEVAL: list[dict[str, Any]] = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'def double(x):\n    return 2 * x\n\n\ndef quadruple(x):\n    """Four times x."""\n',
        "entry_point": "quadruple",
        "canonical_solution": "    return double(double(x))\n",
        "test": "def check(candidate):\n    assert candidate(1) == double(2)\n    assert candidate(0) == 0\n",
    },
    {
        "task_id": "HumanEval/1",
        "prompt": 'def first(x):\n    """The first item."""\n',
        "entry_point": "first",
        "canonical_solution": "    return x[0]\n",
        "test": "METADATA = {}\n\ndef check(candidate):\n    assert candidate([3, 4]) == 3\n",
    },
]
MBPP: list[dict[str, Any]] = [
    {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"def add_{number}(x):\r\n  return x + {number}",
        "test_list": [f"assert add_{number}(1) == {number + 1}", f"assert add_{number}(0) == {number}"],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    for number in (1, 2, 3, 4, 11, 510, 511)
]
MULTIPL_E: list[dict[str, Any]] = [
    {
        "name": "HumanEval_0_one",
        "language": "pl",
        "prompt": "# Return one.\nsub one {\n",
        "doctests": "transform",
        "original": "",
        "prompt_terminology": "reworded",
        "tests": "die 'wrong' unless one() == 1;\n",
        "stop_tokens": ["\nsub", "\n#"],
    }
]


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """JSON lines, compressed where the name says so."""
    content = "\n".join(map(json.dumps, rows)).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def humaneval(folder: Path) -> str:
    return f"humaneval:{write_lines(folder / 'HumanEval.jsonl.gz', HUMANEVAL)}"


def parallel(folder: Path, name: str = "test.de-en") -> str:
    texts = {"de": "Guten Tag.\nDas ist ein kleines Haus.\n", "en": "Good day.\nThis is a small house.\n"}
    for language, text in texts.items():
        path = folder / f"{name}.{language}"
        if not path.exists():  # workers share it
            path.write_text(text)
    return f"wmt22:{folder / name}.de"
