"""Text from elsewhere on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ebft_study.terminal import Terminal, one_line, printable

HOSTILE = "\x1b]0;title\x07\x1b[31m[red]x[/red] :smile: [/nothing] \u202eabc\x9b2J"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_foreign_text_is_shown_as_it_is_and_commands_nothing(is_terminal: bool) -> None:
    shown = io.StringIO()
    console = Terminal(file=shown, force_terminal=is_terminal, width=200, color_system=None)
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    console.print(HOSTILE)
    console.print(Group(table, Text(HOSTILE, style="bold")))
    text = shown.getvalue()
    assert text.count("[red]x[/red] :smile: [/nothing] abc2J") == 5
    assert not set("\x07\x9b\u202e") & set(text)
    assert "\x1b]0" not in text
    assert "\x1b[31m" not in text


def test_styles_of_our_own_still_work() -> None:
    shown = io.StringIO()
    console = Terminal(file=shown, force_terminal=True, color_system="standard", _environ={})
    console.print("x", style="red")
    assert "\x1b[31m" in shown.getvalue()


def test_one_line_is_printable_and_short() -> None:
    assert one_line("a\n\tb\x1b[0m") == "a b[0m"
    assert one_line("x" * 5000) == "x" * 1000 + " ... " + "x" * 1000
    assert printable("tab\tand\nline") == "tab\tand\nline"
