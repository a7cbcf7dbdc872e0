"""Figures to hover over, as Vega-Lite specifications: curves, and configurations as parallel coordinates.

A figure is a picture and a script that turns it into a chart. A page needs `library()` once, 0.9 MB of script without
which, as in print or in a reader that runs no scripts, the picture stays. Nothing is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd
import vl_convert
from PIL import Image

from ebft_study import text
from ebft_study.analysis.curves import frame_of, score_series, series, spread
from ebft_study.analysis.methods import Column
from ebft_study.analysis.summary import MAX_GROUPS, Configuration, StudySummary
from ebft_study.report import drawing, importance
from ebft_study.report.content import NAMES
from ebft_study.report.methods import column_name
from ebft_study.results import METRICS

LOSSES = ("ce_loss", "cfm_loss", "judge_cfm_loss")
WIDTH, HEIGHT = 520, 190
PIXELS = 1.5
"""Pixels of the picture for each of the chart."""
COLORS = 128
MAX_SCORES = 3
MAX_NAMES = 40
"""More configurations than these are not named beside the curves, but still where one points."""
FAINT = 0.12
FINISHED, UNFINISHED = "finished", "not finished"
CONFIG: dict[str, Any] = {
    "font": "DejaVu Sans, Verdana, sans-serif",
    "view": {"stroke": None},
    "axis": {"gridColor": "#e6e6e6", "domainColor": "#9a9a9a", "titleFontWeight": "normal", "labelColor": drawing.INK},
    "legend": {"symbolLimit": 0, "labelLimit": 300, "symbolOpacity": 1, "symbolType": "stroke", "symbolStrokeWidth": 3},
    "title": {"anchor": "start", "fontSize": 12},
}


@dataclass(frozen=True)
class InteractiveFigure:
    """A figure to hover over, with its title and a caption that says how to read it."""

    name: str
    title: str
    caption: str
    spec: dict[str, Any]

    @functools.cached_property
    def png(self) -> bytes:
        """The figure as a picture, in few colours: a third of the bytes."""
        buffer = io.BytesIO()
        picture = Image.open(io.BytesIO(vl_convert.vegalite_to_png(self.spec, scale=PIXELS))).convert("RGB")
        picture.quantize(COLORS, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
        return buffer.getvalue()

    def html(self) -> str:
        """The picture, and the script that replaces it where the page has the `library`."""
        picture = base64.b64encode(self.png).decode()
        spec = json.dumps(self.spec).replace("</", "<\\/")
        return (
            f'<div><img alt="{html.escape(self.title)}" style="max-width:100%;height:auto" '
            f'src="data:image/png;base64,{picture}"></div>\n'
            "<script>(() => { const place = document.currentScript.previousElementSibling;\n"
            f"if (window.vegaEmbed) window.vegaEmbed(place, {spec}, "
            "{actions: false, renderer: 'svg'}); })()</script>"
        )


@functools.cache
def library() -> str:
    """The script element that figures need once in a page."""
    script = vl_convert.javascript_bundle().replace("</script", "<\\/script")  # type: ignore[call-arg]  # has a default
    return f"<script>if (!window.vegaEmbed) {{ (() => {{ {script} }})() }}</script>"


# --- curves ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Panel:
    """The lines of one number over steps: a row per line and step."""

    title: str
    unit: str
    rows: pd.DataFrame
    base: float | None = None
    """The base model's value, where all configurations have one."""


def curves(study: StudySummary) -> InteractiveFigure | None:
    """Losses on the validation split, and scores on benchmarks, over steps: all configurations."""
    panels = [panel for panel in (*_losses(study), *_scores(study)) if len(panel.rows)]
    if not panels:
        return None
    styles = drawing.configuration_styles(study)
    colors = {c.label: styles[c.name].color for c in study.configurations}
    by_name = {"bind": "legend"} if len(colors) <= MAX_NAMES else {}
    picked = alt.selection_point(fields=["configuration"], name="picked", **by_name)
    charts = [_lines(panel, colors, picked, first=k == 0, name=f"near{k}") for k, panel in enumerate(panels)]
    caption = (
        "Means over the seeds of a configuration, bands from its lowest to its highest seed; thin lines are trials "
        "that did not finish. The dashed line is the base model, where the study has one value of it. Point at a line "
        "for its name and numbers; click names on the right, or points, several with Shift, to see these alone."
    )
    spec = alt.vconcat(*charts).configure(**CONFIG).to_dict(validate=False)
    return InteractiveFigure("curves", "Losses and scores over training", caption, spec)


def _losses(study: StudySummary) -> Iterator[_Panel]:
    metrics = study.results.metrics
    for name in (*LOSSES, *(metric for metric in study.compared if METRICS[metric].plugin)):
        rows = _rows((c, *series(study, c, name)) for c in study.configurations)
        at_start = metrics.loc[metrics["step"] == 0, name].dropna()
        has_one = len(at_start) and len(study.of_one_base(name)) == 1
        yield _Panel(
            f"Validation {NAMES[name]}", drawing.unit_of(name), rows, float(at_start.mean()) if has_one else None
        )


def _scores(study: StudySummary) -> Iterator[_Panel]:
    """Scores of one sampled answer."""
    names = study.benchmark_rows[["benchmark", "metric", "position"]].drop_duplicates()
    columns = [
        Column(str(benchmark), str(metric), int(position))
        for benchmark, metric, position in names.to_numpy(dtype=object).tolist()
        if not text.is_missing(position)
    ]
    for column in sorted(column for column in columns if column.is_sampled_once)[:MAX_SCORES]:
        yield _Panel(
            column_name(column), "score", _rows((c, *score_series(study, c, *column)) for c in study.configurations)
        )


def _rows(lines: Iterable[tuple[Configuration, pd.DataFrame, list[pd.Series]]]) -> pd.DataFrame:
    """A row per line and step: of finished trials their mean, of the others each."""
    parts = []
    for c, finished, unfinished in lines:
        if len(finished):
            parts.append(spread(finished).assign(configuration=c.label, line=c.name, trials=FINISHED))
        for each in unfinished:
            alone = pd.DataFrame(
                {"step": each.index, "n": 1, **dict.fromkeys(("mean", "low", "high"), each.to_numpy())}
            )
            parts.append(alone.assign(configuration=c.label, line=str(each.name), trials=UNFINISHED))
    return pd.concat(parts, ignore_index=True).round(5) if parts else pd.DataFrame()


def _lines(
    panel: _Panel, colors: Mapping[str, str], picked: alt.Parameter, *, first: bool, name: str
) -> alt.LayerChart:
    """A panel of curves; `picked`, the names chosen in the legend that all panels share, is a part of the first."""
    # Not the nearest point: Vega-Lite 6.4 shows names as undefined there.
    near = alt.selection_point(fields=["line", "step"], on="pointerover", clear="pointerout", name=name)
    of_finished = panel.rows[panel.rows["trials"] == FINISHED]
    means = [of_line["mean"].to_numpy() for _, of_line in of_finished.groupby("line")]
    limits = frame_of(panel.base, means) if panel.base is not None else None
    scale = alt.Scale(zero=False, domain=list(limits)) if limits else alt.Scale(zero=False)
    hues = alt.Scale(domain=list(colors), range=list(colors.values()))
    legend = alt.Legend(title=None) if len(colors) <= MAX_NAMES else None
    plain = alt.Chart(panel.rows).encode(
        x=alt.X("step:Q", title="optimizer step"), color=alt.Color("configuration:N", scale=hues, legend=legend)
    )
    value = alt.Y("mean:Q", title=panel.unit, scale=scale)
    widths = alt.Scale(domain=[FINISHED, UNFINISHED], range=[2.0, 0.8])
    line = plain.mark_line(clip=True).encode(
        y=value,
        detail="line:N",
        size=alt.Size("trials:N", scale=widths, legend=None),
        opacity=alt.condition(picked, alt.value(1.0), alt.value(FAINT)),
    )
    band = plain.mark_area(clip=True).encode(
        y=alt.Y("low:Q", title=panel.unit, scale=scale),
        y2="high:Q",
        detail="line:N",
        opacity=alt.condition(picked, alt.value(0.14), alt.value(0.0)),
    )
    point = plain.mark_point(filled=True, size=120, clip=True).encode(
        y=value,
        tooltip=[
            alt.Tooltip("configuration:N"),
            alt.Tooltip("step:Q"),
            alt.Tooltip("mean:Q", format=".4f", title=panel.title),
            alt.Tooltip("low:Q", format=".4f", title="lowest seed"),
            alt.Tooltip("high:Q", format=".4f", title="highest seed"),
            alt.Tooltip("n:Q", title="seeds"),
            alt.Tooltip("trials:N"),
        ],
        opacity=alt.condition(near, alt.value(1.0), alt.value(0.0), empty=False),
    )
    # Altair gives all parameters of a layered chart to every layer that has any, and Vega refuses some of them twice.
    layers = [band, line, point.add_params(near, picked) if first else point.add_params(near)]
    if panel.base is not None:
        rule = alt.Chart(pd.DataFrame({"base": [round(panel.base, 5)]})).mark_rule(
            strokeDash=[5, 3], color=drawing.BASE_COLOR
        )
        layers.insert(0, rule.encode(y="base:Q"))
    return alt.layer(*layers).properties(title=panel.title, width=WIDTH, height=HEIGHT)


# --- parallel coordinates --------------------------------------------------------------------------------------


def parallel_coordinates(study: StudySummary) -> InteractiveFigure | None:
    """Each configuration as a line through its settings to its objective; of the first groups that compare."""
    groups = importance.drawable(study)[:MAX_GROUPS]
    if not groups:
        return None
    charts = [_coordinates(study, group, f"at{k}", len(groups) > 1) for k, group in enumerate(groups)]
    chart = alt.vconcat(*charts).resolve_scale(color="independent").configure(**CONFIG)
    metric, mode = study.objective
    caption = (
        f"Each line is a configuration, through the values of its settings to its validation {metric} on the right "
        f"(mean over seeds; {'lower' if mode == 'min' else 'higher'} is better), which gives its colour. Point at a "
        "line to see it alone, with its settings. Configurations without a result for every seed are not drawn."
    )
    return InteractiveFigure(
        "parallel_coordinates_interactive", "All configurations at once", caption, chart.to_dict(validate=False)
    )


def _coordinates(study: StudySummary, group: Sequence[Configuration], name: str, titled: bool) -> alt.LayerChart:
    found = importance.coordinates(study, group)
    axes = [*(text.named(each) for each in found.names), f"validation {study.objective[0]}"]
    rows = pd.DataFrame(
        {
            "configuration": c.label,
            "axis": axis,
            "place": place,
            "height": round(height, 4),
            "objective": round(c.validated(), 5),
            "seeds": len(c.finished_seeds),
        }
        for c, heights in zip(found.measured, found.lines, strict=True)
        for place, (axis, height) in enumerate(zip(axes, heights, strict=True))
    )
    labels = pd.DataFrame(
        {"place": place, "height": height, "label": label}
        for place, of_axis in enumerate(found.ticks)
        for height, label in of_axis
    )
    near = alt.selection_point(fields=["configuration"], on="pointerover", clear="pointerout", name=name)
    scale = alt.Scale(
        scheme=importance.COLORS, reverse=study.objective[1] != "min", domain=list(found.outcomes), clamp=True
    )
    color = alt.Color("objective:Q", title=f"validation {study.objective[0]}", scale=scale)
    place = alt.X(
        "place:Q",
        title=None,
        scale=alt.Scale(domain=[-0.25, len(axes) - 0.6]),
        axis=alt.Axis(
            values=list(range(len(axes))),
            labelExpr=f"{json.dumps(axes)}[datum.value]",
            domain=False,
            ticks=False,
            grid=True,
        ),
    )
    height = alt.Y("height:Q", axis=None, scale=alt.Scale(domain=[-0.05, 1.05]))
    tooltip = [alt.Tooltip("configuration:N"), alt.Tooltip("objective:Q", format=".4f"), alt.Tooltip("seeds:Q")]
    base = alt.Chart(rows).encode(x=place, y=height, detail="configuration:N")
    lines = base.mark_line(strokeWidth=2).encode(
        color=color, opacity=alt.condition(near, alt.value(1.0), alt.value(FAINT), empty=True)
    )
    reach = base.mark_line(strokeWidth=9, opacity=0).encode(tooltip=tooltip).add_params(near)
    names = alt.Chart(labels).encode(x=place, y=height, text="label:N")
    style = {"align": "right", "dx": -6, "fontSize": 9}
    values = alt.layer(names.mark_text(**style, stroke="white", strokeWidth=3), names.mark_text(**style))
    title = study.map_label(group[0].map_of(study.objective[0])) if titled else ""
    return alt.layer(lines, reach, values).properties(title=title, width=WIDTH + 120, height=280)
