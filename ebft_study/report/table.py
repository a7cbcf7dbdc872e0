"""Tables to copy: one type, and a pure function for each format.

Cells are the text that the report shows. `±` divides a number from the half-width of its interval: LaTeX prints both in
one cell, CSV has a column for each.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ebft_study import text

if TYPE_CHECKING:
    import pandas as pd

_NUMBER = re.compile(r"([−+]?\d+(?:\.\d+)?(?:e-?\d+)?)(?: ± (\d+(?:\.\d+)?))?")
_LATEX = {
    "\\": r"\textbackslash{}",
    **{symbol: f"\\{symbol}" for symbol in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    '"': "''",
    # A row that began with one of these would belong to the line break before it.
    **{symbol: f"{{{symbol}}}" for symbol in "[]*"},
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "γ": r"$\gamma$",
    "τ": r"$\tau$",
    "–": "--",
    "…": r"\dots{}",
    "\u202f": r"\,",
}
_PLAIN = {ord("−"): "-", ord("\u202f"): None}


@dataclass(frozen=True)
class Table:
    """A table of text. `name` is that of files and LaTeX labels: letters, digits, underscores."""

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers alone, and at least one."""
        cells = [row[column] for row in self.rows if row[column] != text.NOTHING]
        return bool(cells) and all(_NUMBER.fullmatch(cell.replace("\u202f", "")) for cell in cells)

    def frame(self) -> pd.DataFrame:
        """The cells as a data frame, for notebooks."""
        import pandas as pd

        return pd.DataFrame(list(self.rows), columns=list(self.columns))


def markdown(table: Table) -> str:
    """The table in GitHub's Markdown, below its caption."""
    rules = ["---:" if table.is_number(column) else "---" for column in range(len(table.columns))]
    lines = [list(map(_markdown, table.columns)), rules, *(list(map(_markdown, row)) for row in table.rows)]
    return "\n".join([_markdown(table.caption), "", *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"


def latex(table: Table) -> str:
    """The table in LaTeX, with rules of the package booktabs."""
    alignment = "".join("r" if table.is_number(column) else "l" for column in range(len(table.columns)))
    lines = [" & ".join(map(escape_latex, line)) + r" \\" for line in (table.columns, *table.rows)]
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            rf"\caption{{{escape_latex(table.caption)}}}",
            rf"\label{{tab:{table.name}}}",
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def comma_separated(table: Table) -> str:
    """The table as CSV, without its caption: half-widths of intervals in columns of their own, missing values empty."""
    numbers = [table.is_number(column) for column in range(len(table.columns))]
    spread = [n and any("±" in row[column] for row in table.rows) for column, n in enumerate(numbers)]
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    names = zip(table.columns, spread, strict=True)
    writer.writerow(name for column, is_spread in names for name in (column, f"{column} ±")[: 1 + is_spread])
    for row in table.rows:
        cells: list[str] = []
        for cell, is_spread, is_number in zip(row, spread, numbers, strict=True):
            plain = "" if cell == text.NOTHING else cell.translate(_PLAIN) if is_number else cell
            cells += [*plain.split(" ± "), ""][:2] if is_spread else [plain]
        writer.writerow(cells)
    return target.getvalue()


FORMATS = {"LaTeX": (latex, "tex"), "Markdown": (markdown, "md"), "CSV": (comma_separated, "csv")}
"""Name of a format -> its function, and the ending of its files."""


def escape_latex(words: str) -> str:
    """Text that LaTeX prints as it is, on one line."""
    return "".join(_LATEX.get(symbol, symbol) for symbol in " ".join(words.split()))


def _markdown(words: str) -> str:
    """Text of a cell: no line breaks, nothing that ends the cell or opens a tag."""
    escaped = " ".join(words.split()).replace("\\", "\\\\").replace("|", "\\|")
    return re.sub(r"([<*`])", r"\\\1", escaped)


def slug(words: str) -> str:
    """Words as a part of a table's name."""
    return re.sub(r"\W+", "_", words, flags=re.ASCII).strip("_").lower()
