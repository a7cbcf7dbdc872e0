"""Notebooks: what a cell shows (`show`), and notebooks executed on a study, as files with outputs and as pages.

    node = execute(Path("analysis/02_alpha_gamma.ipynb"), "studies/alpha_gamma")
    Path("02_alpha_gamma.html").write_text(page(node))

A page is one HTML file that loads nothing from elsewhere. Executing needs the `dev` extra.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from markdown_it import MarkdownIt
from markupsafe import Markup

from ebft_study import text
from ebft_study.errors import ResultsError
from ebft_study.report.drawing import RC, ReportFigure
from ebft_study.report.templates import template
from ebft_study.results import find_study
from ebft_study.storage import Location, absolute

STUDY = "EBFT_STUDY"
"""The environment variable from which a notebook takes its study."""
TEMPLATE = "notebook.html.j2"
DOTS_PER_INCH = 110
CELL_SECONDS = 600
RICHEST = ("text/html", "text/markdown", "image/png", "text/plain")


# --- in a notebook ---------------------------------------------------------------------------------------------


def show(*things: Any) -> None:
    """Display figures with title and caption, tables in full width, and Markdown; lists of them; nothing for None."""
    from IPython.display import HTML, Markdown, display

    for thing in _flat(things):
        if isinstance(thing, str):
            display(Markdown(thing))
        elif isinstance(thing, pd.DataFrame):
            with pd.option_context("display.max_colwidth", None):
                table = thing.to_html(index=False, na_rep=text.NOTHING, border=0)
            display(HTML(table.replace(" ± ", "\u00a0±\u00a0")))
        else:
            display(Markdown(f"#### {thing.title}"))
            display(_picture(thing) if isinstance(thing, ReportFigure) else _interactive(thing), raw=True)
            display(Markdown(thing.caption))


def _flat(things: Iterable[Any]) -> Iterable[Any]:
    for thing in things:
        if isinstance(thing, list | tuple):
            yield from _flat(thing)
        elif thing is not None:
            yield thing


def _picture(figure: ReportFigure) -> dict[str, Any]:
    buffer = io.BytesIO()
    with matplotlib.rc_context(RC):
        figure.figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return {"image/png": buffer.getvalue(), "text/plain": figure.title}


def _interactive(figure: Any) -> dict[str, Any]:
    """A figure to hover over; with the library, so that a cell shows it alone."""
    from ebft_study.report.interactive import library

    return {"text/html": library() + figure.html(), "image/png": figure.png, "text/plain": figure.title}


# --- executed --------------------------------------------------------------------------------------------------


def execute(notebook: Path, study: Location) -> Any:
    """The notebook (nbformat's node) with its outputs on a study, in a kernel of this Python.

    Raises:
        ResultsError: the study or a package is missing, or a cell failed.
    """
    try:
        import nbformat
        from jupyter_client.kernelspec import KernelSpecManager
        from jupyter_client.manager import AsyncKernelManager
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError
    except ImportError as error:
        remedy = "Install the development extra: pip install 'ebft-study[dev]'"
        raise ResultsError(f"{notebook.name}: executing a notebook needs the package {error.name}. {remedy}") from error
    folder = study if "://" in str(study) else absolute(find_study(study))
    node = nbformat.read(notebook, as_version=4)
    place = {"metadata": {"path": str(notebook.resolve().parent)}}
    # Sockets are files that only this user can open. Kernels that are installed elsewhere may be of another Python.
    with tempfile.TemporaryDirectory() as sockets:
        manager = AsyncKernelManager(
            transport="ipc", ip=f"{sockets}/kernel", kernel_spec_manager=KernelSpecManager(kernel_dirs=[])
        )
        patience = {"timeout": CELL_SECONDS, "startup_timeout": CELL_SECONDS}
        client = NotebookClient(node, km=manager, resources=place, record_timing=False, **patience)
        try:
            client.execute(cleanup_kc=True, env={**os.environ, STUDY: str(folder)})
        except CellExecutionError as error:
            raise ResultsError(f"{notebook.name}: a cell failed on {folder}: {error.ename}: {error.evalue}") from error
    return node


def answer(node: Any) -> str:
    """What an executed notebook ends with, in Markdown."""
    outputs = node.cells[-1].get("outputs", [])
    return "\n".join(str(output["data"]["text/markdown"]) for output in outputs if "text/markdown" in output["data"])


def page(node: Any, title: str) -> str:
    """An executed notebook as an HTML file: outputs open, code folded."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    cells = [
        {
            "text": Markup(markdown.render(cell.source)) if cell.cell_type == "markdown" else None,
            "code": cell.source,
            "outputs": [_output(output, markdown) for output in cell.get("outputs", [])],
        }
        for cell in node.cells
    ]
    return template(TEMPLATE).render(title=title, cells=cells)


def _output(output: Any, markdown: MarkdownIt) -> Markup:
    """The richest form of one output, as HTML."""
    if output.output_type == "stream":
        return Markup("<pre>{}</pre>").format(output.text)
    if output.output_type == "error":
        return Markup("<pre>{}</pre>").format(f"{output.ename}: {output.evalue}")
    kind = next((kind for kind in RICHEST if kind in output.data), "text/plain")
    content = output.data.get(kind, "")
    if kind == "text/html":
        return Markup('<div class="scroll">{}</div>').format(Markup(content))
    if kind == "text/markdown":
        return Markup(markdown.render(content))
    if kind == "image/png":
        alt = output.data.get("text/plain", "")
        return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(alt, content.strip())
    return Markup("<pre>{}</pre>").format(content)
