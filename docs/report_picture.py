"""Draw the README's picture of a report: the verdicts and two figures of one study, in one small PNG file.

python docs/report_picture.py studies/quickstart docs/report.png
"""

from __future__ import annotations

import io
import sys
import textwrap
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ebft_study import results
from ebft_study.analysis.summary import summarize
from ebft_study.report import claims, content, drawing, figures

COLORS = {"agrees": "#0a6b4f", "disagrees": "#9a2e00", "cannot tell": "#57606a"}
RIGHT_COLUMN = ("heat_maps", "settings", "differences", "learning_curves")  # the first two that the study has


def draw(study_folder: Path, target: Path) -> None:
    """Write the picture of the study in `study_folder` to `target`."""
    study = summarize(results.load(study_folder))
    drawn = {each.name: each for each in figures.draw_all(study)}
    chosen = [drawn[name] for name in RIGHT_COLUMN if name in drawn][:2]
    images = [_pixels(each) for each in chosen]
    heights = [image.height / image.width for image in images]
    with matplotlib.rc_context(drawing.RC):
        page = Figure(figsize=(12.5, 7.4))
        grid = page.add_gridspec(len(images), 2, width_ratios=(1, 1), height_ratios=heights, left=0.02, right=0.99,
                                 top=0.98, bottom=0.02, wspace=0.03, hspace=0.06)  # fmt: skip
        question = str(study.results.spec.get("question", ""))
        _verdicts(page.add_subplot(grid[:, 0]), study.name, question, content.overview(study), claims.judge(study))
        for row, image in enumerate(images):
            axes = page.add_subplot(grid[row, 1])
            axes.imshow(image, interpolation="antialiased")
            axes.axis("off")
        buffer = io.BytesIO()
        page.savefig(buffer, format="png", dpi=128)
    # A palette makes the file a third as large.
    Image.open(buffer).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE).save(target, optimize=True)


def _pixels(figure: drawing.ReportFigure) -> Image.Image:
    buffer = io.BytesIO()
    figure.figure.savefig(buffer, format="png", dpi=160)
    return Image.open(buffer)


def _verdicts(axes: Axes, name: str, question: str, overview: str, verdicts: list[claims.Verdict]) -> None:
    """Write title, question and the table of claims from top to bottom; a line is one unit high."""
    axes.axis("off")
    lines: list[tuple[str, float, dict[str, object]]] = [(name, 2.0, {"fontsize": 17, "fontweight": "bold"})]
    lines += [(line, 1.15, {"fontsize": 10.5}) for line in textwrap.wrap(question, 80)]
    lines += [(overview, 2.0, {"fontsize": 9, "color": drawing.QUIET})]
    for verdict in verdicts:
        tag = {"fontsize": 8.5, "fontweight": "bold", "color": COLORS[verdict.ruling]}
        lines += [(f"{verdict.ruling}  ({verdict.reference})", 1.0, tag)]
        lines += [(line, 1.0, {"fontsize": 9, "fontweight": "bold"}) for line in textwrap.wrap(verdict.claim, 76)]
        lines += [(line, 1.0, {"fontsize": 8.5}) for line in textwrap.wrap(verdict.sentence, 92)]
        text, _, style = lines.pop()
        lines.append((text, 1.5, style))
    height, y = sum(step for _, step, _ in lines), 1.0
    for text, step, style in lines:
        axes.text(0, y, text, va="top", transform=axes.transAxes, **style)
        y -= step / height


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
