"""Showing text that comes from elsewhere: study files, data, messages of libraries, samples of a model.

None of it may move the cursor, change a title, or be taken for markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Control characters but tabs and line feeds, and those that reverse the direction of what follows."""


def printable(foreign: str) -> str:
    """A text without the characters that command a terminal."""
    return _UNPRINTABLE.sub("", foreign)


def one_line(foreign: str, most: int = 2000) -> str:
    """A text as a single line of printable characters; of a longer one, its beginning and its end."""
    line = printable(" ".join(foreign.split()))
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"


class Terminal(Console):
    """A console that shows every text as it is."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    def render(self, *arguments: Any, **keywords: Any) -> Iterable[Segment]:
        """The segments of what is printed, whatever it is made of."""
        for segment in super().render(*arguments, **keywords):
            yield segment if segment.control else segment._replace(text=printable(segment.text))
