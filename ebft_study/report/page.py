"""The report: one self-contained HTML file with its figures inline, and the figures as PNG and SVG next to it."""

from __future__ import annotations

import base64
import datetime
import functools
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup

from ebft_study import text
from ebft_study.analysis import pareto, usage
from ebft_study.analysis.settings import objectives
from ebft_study.analysis.summary import StudySummary, summarize
from ebft_study.report import collected, conclusion, content, explore, facts, methods, paper, samples, scaling, table
from ebft_study.report.claims import judge
from ebft_study.report.drawing import ReportFigure
from ebft_study.report.figures import draw_all
from ebft_study.report.templates import template
from ebft_study.report.verdicts import Verdict
from ebft_study.results import load
from ebft_study.storage import StoragePath

TEMPLATE = "report.html.j2"
DOTS_PER_INCH = 160
FONTS = "'DejaVu Sans', Verdana, sans-serif"
"""Texts of figures are texts, to search and to read aloud; other machines have fonts that are no wider."""


@dataclass(frozen=True)
class Live:
    """A page that asks its server every few seconds whether there are new results."""

    url: str
    version: str
    seconds: float


def write(study_folder: StoragePath) -> Path | StoragePath:
    """Write `report.html` and `figures/` of the study in `study_folder`; returns the HTML file."""
    return write_summary(summarize(load(study_folder)))


def write_summary(study: StudySummary, *, written: str | None = None) -> Path | StoragePath:
    """Write the report of a study into its folder; returns the HTML file.

    Args:
        written: the report's date; default: now.
    """
    study_folder = study.results.folder
    figures = draw_all(study)
    svgs = {figure.name: as_svg(figure) for figure in figures}
    for figure in figures:
        _save(figure, svgs[figure.name], study_folder.subfolder("figures"))
    target = study_folder / "report.html"
    target.write_bytes(page_of(study, figures, svgs, written=written).encode())
    return target.local or target


def live_page(study: StudySummary, live: Live) -> str:
    """The report of a study as its server shows it; nothing is written."""
    figures = draw_all(study)
    return page_of(study, figures, {figure.name: as_svg(figure) for figure in figures}, live=live)


def page_of(
    study: StudySummary,
    figures: Sequence[ReportFigure],
    svgs: Mapping[str, str],
    *,
    written: str | None = None,
    live: Live | None = None,
) -> str:
    """The report as HTML."""
    spec = study.results.spec
    lines = content.configuration_rows(study, content.MAX_CONFIGURATIONS)
    tested, untested = _divided(judge(study))
    rulings = [(name, sum(v.ruling == name for v in tested)) for name in ("agrees", "disagrees", "cannot tell")]
    explored = explore.data(study)
    return render(
        TEMPLATE,
        figures,
        svgs,
        names=content.NAMES,
        study=study,
        question=spec.get("question"),
        profile=spec.get("profile"),
        conclusions=conclusion.conclusions(study),
        tested=tested,
        untested=untested,
        rulings=rulings,
        overview=content.overview(study),
        asked=facts.asked(study),
        fixed=facts.fixed_settings(study),
        provenance=facts.provenance(spec),
        cost=usage.cost(study.results),
        configurations=lines,
        outcomes=collected.outcomes(study, lines),
        omitted=content.omitted(study),
        precision=content.precision(study),
        evidence=content.evidence_rows(study, content.MAX_CONFIGURATIONS),
        methods=methods.method_tables(study),
        benchmarks=content.benchmark_tables(study),
        paper=paper.section(study),
        formats=table.FORMATS,
        scaling=scaling.section(study),
        trials=content.trial_rows(study, content.MAX_CONFIGURATIONS),
        unfinished=content.unfinished_rows(study),
        max_unfinished=content.MAX_UNFINISHED,
        costs=content.cost_rows(study, content.MAX_CONFIGURATIONS),
        incidents=content.incidents(study),
        objectives=[metric for metric, _ in objectives(spec) or [study.objective]],
        front=pareto.rows(study),
        lineage=content.lineage_rows(study),
        race=content.race_rows(study),
        prompts=samples.best_of_methods(study, samples.Samples(study)),
        data_note=explored["note"],
        has_coordinates=bool(explored["coordinates"]),
        live=live,
        **scripts(explored),
        missing=content.missing(study, list(svgs)),
        written=written,
    )


def _divided(verdicts: Sequence[Verdict]) -> tuple[list[Verdict], list[Verdict]]:
    """Verdicts on claims that the study can speak to, and those on others."""
    tested = [verdict for verdict in verdicts if not math.isnan(verdict.p_value)]
    return tested, [verdict for verdict in verdicts if math.isnan(verdict.p_value)]


@functools.cache
def script() -> str:
    """What the page does in a browser."""
    return (Path(__file__).parent / "report.js").read_text(encoding="utf-8")


def scripts(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a template needs for the script, its data, and the policy that allows no other."""
    digest = base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()
    return {"data": Markup(explore.as_json(data)), "script": Markup(script()), "script_hash": f"sha256-{digest}"}


def render(
    name: str, figures: Sequence[ReportFigure], svgs: Mapping[str, str], *, written: str | None = None, **rows: Any
) -> str:
    """A page from the template `name`, with its figures inline.

    Args:
        svgs: of the figures, by name.
        written: the date of the page; default: now.
        rows: what else the template names.
    """
    return template(name).render(
        text=text,
        figures=figures,
        svgs={name: Markup(_inline(svg, name)) for name, svg in svgs.items()},
        written=written or f"written {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        **rows,
    )


def as_svg(figure: ReportFigure) -> str:
    """The figure as SVG: equal data give equal bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": figure.name, "svg.fonttype": "none"}):
        figure.figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().decode().replace("'DejaVu Sans'", FONTS)


def _save(figure: ReportFigure, svg: str, folder: StoragePath) -> None:
    buffer = io.BytesIO()
    figure.figure.set_layout_engine("none")  # that of the SVG stays: making it takes as long as drawing
    figure.figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    (folder / f"{figure.name}.png").write_bytes(buffer.getvalue())
    (folder / f"{figure.name}.svg").write_bytes(svg.encode())


def _inline(svg: str, name: str) -> str:
    """An SVG file as an element of a page: without prolog, its ids apart from those of the other figures."""
    element = svg[svg.index("<svg") :]
    # Images are named by their content, so two equal colour bars share a name that nothing refers to.
    element = re.sub(r'(<image\b[^>]*?) id="[^"]*"', r"\1", element)
    element = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', element)
    element = re.sub(r'(href=")#', rf"\1#{name}-", element)
    element = element.replace("url(#", f"url(#{name}-")
    return re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
