"""The report: one self-contained HTML file with its figures inline, and the figures as PNG and SVG beside it."""

from __future__ import annotations

import datetime
import io
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
import matplotlib
from markupsafe import Markup

from ebft_study import text
from ebft_study.report import content, facts, pareto, population, services
from ebft_study.report.claims import judge
from ebft_study.report.figures import draw_all
from ebft_study.report.pictures import Picture
from ebft_study.report.tables import summarize
from ebft_study.results import load
from ebft_study.storage import StoragePath

TEMPLATE = "report.html.j2"
DOTS_PER_INCH = 160


def write(study_folder: StoragePath) -> Path | StoragePath:
    """Write `report.html` and `figures/` of the study in `study_folder`; returns the HTML file."""
    study = summarize(load(study_folder))
    pictures = draw_all(study)
    vectors = {picture.name: _svg(picture) for picture in pictures}
    _save_figures(pictures, vectors, study_folder / "figures")
    verdicts = judge(study)
    page = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            study=study,
            question=study.results.spec.get("question"),
            profile=study.results.spec.get("profile"),
            verdicts=verdicts,
            rulings=[
                (name, sum(v.ruling == name for v in verdicts)) for name in ("agrees", "disagrees", "cannot tell")
            ],
            overview=content.overview(study),
            asked=facts.asked(study),
            fixed=facts.fixed_settings(study),
            provenance=facts.provenance(study.results.spec),
            cost=[*facts.cost(study), *services.used(study.results.metrics)],
            configurations=content.configuration_rows(study),
            precision=content.precision(study),
            trials=content.trial_rows(study),
            unfinished=content.unfinished_rows(study),
            incidents=content.incidents(study),
            objectives=[name for name, _ in pareto.objectives(study.results.spec)],
            front=pareto.rows(study),
            takeovers=population.rows(study),
            samples=content.sample_groups(study),
            missing=content.missing(study, [picture.name for picture in pictures]),
            pictures=pictures,
            vectors={name: Markup(_inline(svg, name)) for name, svg in vectors.items()},
            written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )
    target = study_folder / "report.html"
    target.write_bytes(page.encode())
    return target.local or target


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals["text"] = text
    return environment


def _svg(picture: Picture) -> str:
    """The figure as SVG: equal data give equal bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": picture.name, "svg.fonttype": "path"}):
        picture.figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().decode()


def _inline(svg: str, name: str) -> str:
    """An SVG file as an element of a page: without prolog, its ids apart from those of the other figures."""
    element = svg[svg.index("<svg") :]
    # Images are named by their content, so two equal colour bars share a name that nothing refers to.
    element = re.sub(r'(<image\b[^>]*?) id="[^"]*"', r"\1", element)
    element = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', element)
    element = re.sub(r'(href=")#', rf"\1#{name}-", element)
    element = element.replace("url(#", f"url(#{name}-")
    return re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)


def _save_figures(pictures: Sequence[Picture], vectors: dict[str, str], folder: StoragePath) -> None:
    for picture in pictures:
        buffer = io.BytesIO()
        picture.figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
        (folder / f"{picture.name}.png").write_bytes(buffer.getvalue())
        (folder / f"{picture.name}.svg").write_bytes(vectors[picture.name].encode())
