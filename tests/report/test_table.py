"""Tables to copy, read back by other programs: a Markdown parser, pandas, and by LaTeX's own rules."""

from __future__ import annotations

import io
import random
import re

import pandas as pd
import pytest
from markdown_it import MarkdownIt

from ebft_study.report.table import Table, comma_separated, escape_latex, latex, markdown, slug

TABLE = Table(
    "outcomes",
    "Costs: 50 % of A&B, for α_1 | β",
    ("Method", "CE", "Seeds", "Note"),
    (
        ("Base", "0.555 ± 0.046", "–", "x | y, \\_ z"),
        ("[SFT]", "−0.021", "2\u202f240", "[*a*] `b` <c> {d}"),
        ("*EBFT", "–", "3", '"quoted", #1 $2 ~3 ^4\nnext'),
    ),
)


def one_line(cell: str) -> str:
    return " ".join(cell.split())


def test_markdown_is_read_back_by_a_parser() -> None:
    caption, _, body = markdown(TABLE).partition("\n\n")
    parser = MarkdownIt("commonmark").enable("table")
    cells = [
        "".join(child.content for child in token.children or ())
        for token in parser.parse(body)
        if token.type == "inline"
    ]
    assert cells == [*TABLE.columns, *(one_line(cell) for row in TABLE.rows for cell in row)]
    (words,) = (token.content for token in parser.parse(caption) if token.type == "inline")
    assert words.replace("\\|", "|") == TABLE.caption
    assert body.splitlines()[1] == "| --- | ---: | ---: | --- |"


def test_csv_is_read_back_by_pandas_as_numbers() -> None:
    frame = pd.read_csv(io.StringIO(comma_separated(TABLE)))
    assert list(frame.columns) == ["Method", "CE", "CE ±", "Seeds", "Note"]
    assert frame["CE"].tolist()[:2] == [0.555, -0.021]
    assert frame["CE"].isna().tolist() == [False, False, True]
    assert frame["CE ±"].dropna().tolist() == [0.046]
    assert frame["Seeds"].dropna().tolist() == [2240, 3]
    assert frame["Note"].tolist() == [row[3] for row in TABLE.rows]


# --- LaTeX -----------------------------------------------------------------------------------------------------

PRINTS = {
    **{f"\\{symbol}": symbol for symbol in "&%$#_{}"},
    "\\textbackslash{}": "\\",
    "\\textasciitilde{}": "~",
    "\\textasciicircum{}": "^",
    "\\textless{}": "<",
    "\\textgreater{}": ">",
    "''": '"',
    "--": "–",
    "\\dots{}": "…",
    "\\,": "\u202f",
    "$-$": "−",
    "$\\pm$": "±",
    "$\\times$": "×",
    "$\\alpha$": "α",
    "$\\beta$": "β",
    "$\\gamma$": "γ",
    "$\\tau$": "τ",
    **{f"{{{symbol}}}": symbol for symbol in "[]*"},
}
"""LaTeX -> what it prints."""
LONGEST_FIRST = sorted(PRINTS, key=len, reverse=True)


def printed(source: str) -> str:
    """What LaTeX prints: an unescaped special character is an error."""
    words = ""
    while source:
        command = next((command for command in LONGEST_FIRST if source.startswith(command)), "")
        assert command or source[0] not in "&%$#_{}~^\\", f"{source[0]!r} is not escaped"
        words += PRINTS.get(command, source[0])
        source = source[len(command) or 1 :]
    return words


def test_latex_prints_every_character() -> None:
    draw = random.Random(0)
    for _ in range(300):
        words = "".join(draw.choices('&%$#_{}~^\\<>"−±×αβγτ…[]* aB1.', k=12))
        assert printed(escape_latex(words)) == one_line(words)


def test_latex_rows_and_alignment() -> None:
    lines = latex(TABLE).splitlines()
    assert lines[1] == r"\begin{table}"
    assert lines[3:6] == [r"\label{tab:outcomes}", r"\begin{tabular}{lrrl}", r"\toprule"]
    rows = [line for line in lines if line.endswith(r" \\")]
    cells = [[printed(cell) for cell in line.removesuffix(r" \\").split(" & ")] for line in rows]
    assert cells == [[one_line(cell) for cell in row] for row in (TABLE.columns, *TABLE.rows)]
    assert not [line for line in lines if line.startswith(("[", "*"))]  # an argument of the line break before
    assert latex(TABLE).count(r"\begin") == latex(TABLE).count(r"\end") == 2


def test_a_frame_has_the_cells() -> None:
    frame = TABLE.frame()
    assert (tuple(frame.columns), [tuple(row) for row in frame.to_numpy()]) == (TABLE.columns, list(TABLE.rows))


@pytest.mark.parametrize(
    ("cells", "expected"),
    [(("1", "–"), True), (("+0.031 ± 0.007", "−1e-4"), True), (("–", "–"), False), (("3 of 3", "1"), False)],
)
def test_a_column_of_numbers(cells: tuple[str, ...], expected: bool) -> None:
    assert Table("t", "", ("a",), tuple((cell,) for cell in cells)).is_number(0) == expected


def test_names_are_safe_in_files_and_labels() -> None:
    assert slug("paper_Q&A coding (α=1, T=96), losses") == "paper_q_a_coding_1_t_96_losses"
    assert re.fullmatch(r"\w+", slug("../x y"), flags=re.ASCII)
