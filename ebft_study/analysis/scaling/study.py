"""The scaling laws of a study: which points it has, which form foresees them best, and what methods save.

Where several configurations of a method have one size and one amount of data, the best by the metric on the validation
split stands for them: the learning rate may differ from size to size.

Points are held-out values at the ends of runs. Where runs of several sizes have one length and constant learning rates,
they are all evaluations on the validation split: the axis of data for the price of one run per size.

Cross-entropy has laws of its level. Feature matching has laws of the gain over the base model, where a study has one
feature map or a judge: its level has a part that no model can lower, and that differs from size to size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd

from ebft_study.analysis.configuration import HELDOUT, Configuration, grouped
from ebft_study.analysis.scaling import forms
from ebft_study.analysis.scaling.fits import Fit, fit
from ebft_study.analysis.scaling.forms import Form
from ebft_study.analysis.scaling.heldout import Choice, Extrapolation, choose, extrapolate, largest, last_half
from ebft_study.analysis.scaling.identifiability import MIN_VALUES
from ebft_study.analysis.scaling.levels import levels
from ebft_study.analysis.scaling.points import COSTS, as_gain, curve_points, final_points
from ebft_study.analysis.scaling.speedup import Speedup, sharing_p_value, speedup
from ebft_study.analysis.selection import best, comparable
from ebft_study.analysis.summary import VALIDATION, StudySummary
from ebft_study.errors import FitError
from ebft_study.results import METRICS

AXES = ("parameters", "tokens")
GAINS = ("cfm_loss", "judge_cfm_loss")
"""Metrics whose gain over the base model has a law, not their level."""
REFERENCE = "sft"


@dataclass(frozen=True)
class MethodLaw:
    """The law of one method: the fit of the first of `choices`, or the `reason` why there is none."""

    method: str
    points: pd.DataFrame = field(repr=False)
    choices: tuple[Choice, ...]
    fit: Fit | None
    reason: str = ""

    @property
    def score(self) -> Extrapolation | None:
        """The held-out score of the form; None where too few scales are left to fit it without the held-out ones."""
        return next((each.score for each in self.choices if self.fit and each.form.name == self.fit.form.name), None)


@dataclass(frozen=True)
class SharedLaw:
    """One law for all methods, with a multiplier of data for each, against that of the reference."""

    fit: Fit
    score: Extrapolation | None
    speedups: tuple[Speedup, ...]
    p_value: float
    """Of the methods sharing all else."""


@dataclass(frozen=True)
class StudyLaws:
    """The laws of `metric` along the axes of scale that a study has."""

    metric: str
    axes: tuple[str, ...]
    methods: tuple[MethodLaw, ...]
    shared: SharedLaw | None
    reason: str = ""
    """The reason why there are no points, or no shared law of several methods."""
    split: str = HELDOUT
    """Whose values the points are: those of the held-out split, or of the validation split along constant rates."""


def laws_of_all(study: StudySummary) -> list[StudyLaws]:
    """The laws of every metric by which the study's configurations compare with each other; empty without an axis."""
    measured = _measured(study)
    ours = [metric for metric in study.compared if not METRICS[metric].plugin]
    one_map = [metric for metric in ours if len(comparable(measured, metric, at_one_length=True)) == 1]
    return [found for metric in one_map if (found := laws(study, metric)) is not None]


def laws(study: StudySummary, metric: str = "ce_loss") -> StudyLaws | None:
    """The scaling laws of a study; None where no method has two sizes or two amounts of data."""
    measured = _measured(study)
    axes, split = _axes(measured), HELDOUT
    if not axes:
        return None
    chosen = _best_at_each_scale(measured, metric)
    try:
        points = final_points(study, metric, chosen)
    except FitError as error:
        return StudyLaws(metric, axes, (), None, str(error))
    if axes == ("parameters",) and (curves := _curves(study, metric, chosen)) is not None:
        points, axes, split = curves, AXES, VALIDATION
    if metric in GAINS:
        points = as_gain(points, metric)
    methods = tuple(_method_law(str(name), part, axes, metric) for name, part in points.groupby("method"))
    shared, reason = _shared(points, methods, axes)
    return StudyLaws(metric, axes, methods, shared, reason, split)


def candidates(axes: tuple[str, ...], metric: str = "ce_loss") -> list[Form]:
    """The forms of a loss along some axes, or of a gain along the last of them."""
    if metric in GAINS:
        return [forms.sigmoid(axes[-1])]
    if len(axes) == 2:
        return [forms.additive(), forms.multiplicative()]
    return [forms.power_law(axes[0]), *([forms.rectified()] if axes[0] == "tokens" else [])]


def held_out(points: pd.DataFrame, axes: tuple[str, ...]) -> pd.Series[bool]:
    """The points by which forms are judged: the largest size, or the last half of the data at one size."""
    return largest(points, "parameters") if "parameters" in axes else last_half(points, "tokens")


def _measured(study: StudySummary) -> list[Configuration]:
    return [c for c in study.configurations if c.is_measured and c.is_scored]


def _axes(configurations: list[Configuration]) -> tuple[str, ...]:
    """The axes of scale along which some method varies."""
    columns = {"parameters": "parameters", "tokens": COSTS["tokens"]}
    finished = [c.finished[["method", *columns.values()]] for c in configurations]
    trials = pd.concat(finished) if finished else pd.DataFrame()
    if trials.empty:
        return ()
    of_methods = [part for _, part in trials.groupby("method")]
    return tuple(a for a in AXES if any(len(set(levels(part[columns[a]].dropna()))) > 1 for part in of_methods))


def _curves(study: StudySummary, metric: str, configurations: list[Configuration]) -> pd.DataFrame | None:
    """Evaluations along runs of constant learning rates; None where rates fall, or data take too few values."""
    try:
        points = curve_points(study, metric, configurations)
    except FitError:
        return None
    of_methods = [part for _, part in points.groupby("method")]
    is_enough = of_methods and all(len(set(levels(part["tokens"]))) >= MIN_VALUES for part in of_methods)
    return points if is_enough else None


def _best_at_each_scale(configurations: list[Configuration], metric: str) -> list[Configuration]:
    sizes, data = (
        dict(zip((c.name for c in configurations), levels(pd.Series(values)), strict=True))
        for values in (
            [float(c.finished["parameters"].median()) for c in configurations],
            [float(c.finished[COSTS["tokens"]].median()) for c in configurations],
        )
    )
    groups = grouped(configurations, lambda c: (c.settings.get("method"), sizes[c.name], data[c.name]))
    # Where values cannot be compared, all stay, and `final_points` says so.
    chosen = [(best(group, metric), group) for group in groups.values()]
    return [c for one, group in chosen for c in ([one] if one else group)]


def _method_law(method: str, points: pd.DataFrame, axes: tuple[str, ...], metric: str) -> MethodLaw:
    choices = tuple(choose(candidates(axes, metric), points, held_out(points, axes)))
    reasons = []
    for choice in choices:
        try:
            return MethodLaw(method, points, choices, fit(choice.form, points))
        except FitError as error:
            reasons.append(str(error))
    return MethodLaw(method, points, choices, None, "; ".join(reasons))


def _shared(
    points: pd.DataFrame, methods: tuple[MethodLaw, ...], axes: tuple[str, ...]
) -> tuple[SharedLaw | None, str]:
    """One law of all methods that were fitted, in the form of the reference, or the reason why there is none."""
    fitted = {law.method: law.fit for law in methods if law.fit}
    reference = fitted.get(REFERENCE)
    if reference is None or len(fitted) < 2 or "tokens" not in axes:
        return None, ""
    together = points[points["method"].isin(list(fitted))].reset_index(drop=True)
    try:
        law = fit(reference.form, together, multiplied="tokens", reference=REFERENCE)
    except FitError as error:
        return None, str(error)
    try:
        held = held_out(together, axes)
        score = extrapolate(reference.form, together, held, multiplied="tokens", reference=REFERENCE)
    except FitError:
        score = None
    speedups = [speedup(law, name, amount) for name in fitted if name != REFERENCE for amount in COSTS]
    return SharedLaw(law, score, tuple(each for each in speedups if each), sharing_p_value(law)), ""
