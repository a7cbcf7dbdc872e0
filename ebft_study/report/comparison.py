"""The page that compares studies: `analysis.comparison` as text, with a figure of all differences."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ebft_study import text
from ebft_study.analysis import usage
from ebft_study.analysis.comparison import Comparison, Difference, Pair, fingerprints
from ebft_study.analysis.settings import NOT_AN_AXIS, sort_key
from ebft_study.analysis.statistics import CONFIDENCE
from ebft_study.analysis.summary import StudySummary
from ebft_study.report import drawing
from ebft_study.report.content import NAMES
from ebft_study.report.drawing import ReportFigure
from ebft_study.report.page import as_svg, render
from ebft_study.results import schema
from ebft_study.storage import StoragePath

TEMPLATE = "comparison.html.j2"
MAX_ROWS = 30
RECORDS = ("profile", "seeds", "search", "scheduler", "stopping", "objective", "resources", "file", "git_revision")
"""What study.yaml records of how a study was run, besides versions and the origin of data and models."""
Table = list[tuple[str, list[str]]]
"""A name and a text per study."""


@dataclass(frozen=True)
class Row:
    """A difference as text; `kind` is the class of its ruling on the page."""

    label: str
    metric: str
    reference: str
    value: str
    difference: str
    shared: str
    p_value: str
    ruling: str
    kind: str


def write(comparison: Comparison, target: StoragePath) -> None:
    """Write the page, one self-contained HTML file."""
    with matplotlib.rc_context(drawing.RC):
        figures = [differences_figure(comparison)]
    page = render(
        TEMPLATE,
        figures,
        {figure.name: as_svg(figure) for figure in figures},
        names=list(comparison.studies),
        sentences=sentences(comparison),
        counts=counts(comparison),
        tables={name: [row(each) for each in comparison.of(name)] for name in list(comparison.studies)[1:]},
        n_tested=comparison.n_tested,
        across=text.listed(list(comparison.across)),
        length=comparison.length,
        notes=[*comparison.notes, *problems(comparison)],
        settings=different_settings(comparison.studies),
        records=different_records(comparison.studies),
        costs=costs(comparison.studies),
        pair_costs=list(pair_costs(comparison)),
    )
    if target.local:
        target.local.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(page.encode())


# --- differences -----------------------------------------------------------------------------------------------


def sentences(comparison: Comparison) -> list[str]:
    """What the comparison says of each study."""
    return [_sentence(name, comparison) for name in list(comparison.studies)[1:]]


def _sentence(name: str, comparison: Comparison) -> str:
    differences, reference = comparison.of(name), comparison.reference
    n_pairs = sum(pair.study == name for pair in comparison.pairs)
    of = f"{name} against {reference}, {n_pairs} configurations in common"
    singles = [each for each in differences if not each.is_average]
    if all(each.ruling == "same trials" for each in singles):
        return (
            f"{of}: no difference. They hold the same trials: all values are equal, and the trials were started at the "
            "same moments on the same machines. One of the two is no further evidence."
        )
    if all(each.ruling in ("same trials", "equal") for each in singles):
        return f"{of}: no difference. All {len(singles)} held-out values are equal to the last digit."
    clear = [each for each in differences if each.ruling in ("lower", "higher")]
    tested = f"after Holm's correction for {comparison.n_tested} differences"
    if clear:
        shown = "; ".join(
            f"{NAMES.get(each.metric, each.metric)} {'on' if each.is_average else 'of'} {each.label} is {each.ruling} "
            f"by {each.interval.as_difference()}"
            for each in clear[:3]
        )
        more = f"; and {len(clear) - 3} more" if len(clear) > 3 else ""
        return f"{of}: {len(clear)} of {len(differences)} differences are clear {tested}. {shown}{more}."
    if all(math.isnan(each.interval.half_width) for each in differences):
        return f"{of}: cannot tell. No difference has an interval, which takes two seeds in each study."
    bounds = ", ".join(
        f"{NAMES.get(metric, metric)} {_excluded(list(of_metric), comparison.n_tested)}"
        for metric, of_metric in itertools.groupby(differences, key=lambda each: each.metric)
    )
    return f"{of}: cannot tell {tested}. Taken together, 95 % intervals exclude differences beyond {bounds}."


def _excluded(differences: Sequence[Difference], n_tested: int) -> str:
    """The largest difference in size within intervals that hold together (Bonferroni), and that of the average."""
    parts = []
    for what, is_average in (("in any configuration", False), ("on average", True)):
        intervals = [each.interval for each in differences if each.is_average == is_average]
        bounds = [abs(i.mean) + i.half_width_at((1 - CONFIDENCE) / max(n_tested, 1)) for i in intervals]
        if any(not math.isnan(bound) for bound in bounds):
            parts.append(f"±{text.number(max(bound for bound in bounds if not math.isnan(bound)), 4)} {what}")
    return " and ".join(parts) or "nothing"


def counts(comparison: Comparison) -> list[tuple[str, str, int]]:
    """Ruling, class and number of differences, averages aside; rulings that none has are left out."""
    rows = [row(each) for each in comparison.differences if not each.is_average]
    kinds = {each.ruling: each.kind for each in rows}
    return [(ruling, kind, sum(each.ruling == ruling for each in rows)) for ruling, kind in kinds.items()]


def row(each: Difference) -> Row:
    """A difference as a row of the table."""
    clear = each.ruling in ("lower", "higher")
    kind = ("agrees" if each.is_better else "disagrees") if clear else "cannot-tell"
    shown = {"same trials": "no difference: same trials", "equal": "no difference: equal values"}
    better = f"{each.ruling}: {'better' if each.is_better else 'worse'}" if clear else each.ruling
    return Row(
        label=each.label,
        metric=NAMES.get(each.metric, each.metric),
        reference=each.levels[0].as_level(),
        value=each.levels[1].as_level(),
        difference="0" if each.ruling in shown else each.interval.as_difference(),
        shared=each.shared,
        p_value=text.NOTHING if math.isnan(each.p_value) else f"{each.p_value:.2g}",
        ruling=shown.get(each.ruling, better),
        kind=kind,
    )


def differences_figure(comparison: Comparison) -> ReportFigure:
    """Every difference with its interval, a panel per metric, a colour per study."""
    metrics = list(dict.fromkeys(each.metric for each in comparison.differences))
    labels = list(dict.fromkeys(each.label for each in comparison.differences))
    shown = [*[label for label in labels if label not in _averages(comparison)][:MAX_ROWS], *_averages(comparison)]
    studies = list(comparison.studies)[1:]
    styles = dict(zip(studies, drawing.sequence(len(studies)), strict=True))
    size = (1.6 + 3.6 * len(metrics), 1.5 + (0.28 + 0.1 * len(studies)) * len(shown))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        at = f", {comparison.length} tokens" if metric == "cfm_loss" else ""
        label = f"minus {comparison.reference} ({drawing.unit_of(metric)})"
        drawing.interval_panel(axes, 0, title=f"Held-out {NAMES.get(metric, metric)}{at}", label=label)
        for each in comparison.differences:
            if each.metric != metric or each.label not in shown:
                continue
            y = shown.index(each.label) + 0.5 * (studies.index(each.study) + 0.5) / len(studies) - 0.25
            drawing.interval_row(axes, y, each.interval, styles[each.study], label=each.study)
    drawing.row_labels(panels[0], shown)
    if len(studies) > 1:
        drawing.add_legend(figure)
    omitted = f" The first {MAX_ROWS} configurations are drawn." if len(labels) > len(shown) else ""
    caption = (
        f"Mean held-out value minus that of {comparison.reference}, with 95 % intervals that are not corrected for the "
        f"number of differences.{omitted}"
    )
    return ReportFigure("comparison", f"Differences to {comparison.reference}", caption, figure)


def _averages(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(each.label for each in comparison.differences if each.is_average))


# --- settings, records and costs -------------------------------------------------------------------------------


def different_settings(studies: Mapping[str, StudySummary]) -> Table:
    """Settings whose values on the axes are not the same in all studies."""
    rows = []
    for column in schema.hyperparameters():
        values = [_values(study, column.name) for study in studies.values()]
        if column.name not in NOT_AN_AXIS and len(set(values)) > 1:
            rows.append((text.named(column.name), list(values)))
    return rows


def _values(study: StudySummary, name: str) -> str:
    configurations = study.on_axes or study.configurations
    values = {repr(c.settings[name]): c.settings[name] for c in configurations if name not in c.unread}
    ordered = [text.setting(value) for value in sorted(values.values(), key=sort_key)]
    return "; ".join(ordered[:6]) + (f"; {len(ordered) - 6} more" if len(ordered) > 6 else "") or text.NOTHING


def different_records(studies: Mapping[str, StudySummary]) -> Table:
    """Seeds, procedure, files and versions that are not the same in all studies."""
    flat = [_records(study) for study in studies.values()]
    names = dict.fromkeys(itertools.chain.from_iterable(flat))
    rows = [(name, [each.get(name, text.NOTHING) for each in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _records(study: StudySummary) -> dict[str, str]:
    spec = study.results.spec
    kept = {key: spec[key] for key in RECORDS if key in spec}
    of_origin = {key: spec[key] for key in ("versions", "provenance") if isinstance(spec.get(key), Mapping)}
    return dict(_leaves({**kept, **of_origin}))


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}: {key}" if name else str(key))
    else:
        shown = value if isinstance(value, str) else json.dumps(value, default=str)
        yield name, shown if len(shown) < 40 else f"{shown[:16]}…{shown[-8:]}"


def costs(studies: Mapping[str, StudySummary]) -> Table:
    """Time, memory and services of each study, and its FLOPs."""
    of_studies = []
    for study in studies.values():
        trials = study.results.trials
        finished = int((trials["status"] == "finished").sum())
        flops = text.power(trials["flops"].sum(min_count=1))
        facts = [("Trials, of which finished", f"{len(trials)}, {finished}"), ("FLOPs of updates", flops)]
        of_studies.append(dict([*facts, *usage.cost(study.results)]))
    names = dict.fromkeys(itertools.chain.from_iterable(of_studies))
    return [(name, [facts.get(name, text.NOTHING) for facts in of_studies]) for name in names]


def pair_costs(comparison: Comparison) -> Iterator[tuple[str, str, list[str]]]:
    """Study, configuration, and FLOPs and time of a trial's updates: of the reference, of the study, their ratio."""
    for pair in comparison.pairs:
        cells = [cell for name in ("flops", "update_seconds") for cell in _amounts(pair, name)]
        if any(cell != text.NOTHING for cell in cells):
            yield pair.study, pair.label, cells


def _amounts(pair: Pair, name: str) -> list[str]:
    means = [float(c.finished[name].mean()) for c in (pair.reference, pair.other)]
    shown = [text.power(mean) if name == "flops" else text.duration(mean) for mean in means]
    ratio = means[1] / means[0] if means[0] > 0 else math.nan
    return [*shown, text.number(ratio, 2)]


def problems(comparison: Comparison) -> list[str]:
    """Damaged files of the studies, and what is not recorded."""
    notes = [f"{name}: {each}" for name, study in comparison.studies.items() for each in study.results.problems]
    specs = {name: study.results.spec for name, study in comparison.studies.items()}
    kinds = {name: spec.get("scheduler") for name, spec in specs.items()}
    changing = [n for n, kind in kinds.items() if isinstance(kind, Mapping) and kind.get("kind") == "pbt"]
    if changing:
        notes.append(
            f"A population changes the settings of its trials; those of the start count: {text.listed(changing)}."
        )
    unknown = [name for name, spec in specs.items() if not fingerprints(spec, "data")]
    if unknown:
        notes.append(f"Whether the data are the same is not known: {text.listed(unknown)} recorded no fingerprint.")
    return notes
