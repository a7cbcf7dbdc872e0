"""The answer of a study to its own question, by each objective: what moves it, the best configuration, its model.

Effects and differences are of held-out values where the split was measured by the objective, else of validation values.
Differences to baselines are those of a configuration that is chosen for each seed by the other seeds. What is tested
together is corrected by Holm; the comparison with the next best holds at one error rate for all configurations.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebft_study import text
from ebft_study.analysis.configuration import BySeed, Configuration, grouped
from ebft_study.analysis.effects import Effect, effects, left_out, subjects
from ebft_study.analysis.elimination import Comparison, against_best
from ebft_study.analysis.importance import complete, is_population
from ebft_study.analysis.selection import Selected, best_trial, comparable, ranked, select
from ebft_study.analysis.settings import Objective, objectives
from ebft_study.analysis.statistics import CONFIDENCE, Interval, holm
from ebft_study.analysis.summary import MAX_GROUPS, StudySummary
from ebft_study.report.content import NAMES
from ebft_study.report.effects import named
from ebft_study.report.verdicts import left_out as missing_of

ERROR_RATE = 1 - CONFIDENCE
MAX_UNCLEAR = 3
"""Settings that are named although nothing can be told of them."""


@dataclass(frozen=True)
class Model:
    """The trained model of the best configuration, at the seed that is best by validation."""

    sentence: str
    command: str
    """That exports it."""


@dataclass(frozen=True)
class Part:
    """The best of the configurations that one objective compares; `label` names them where there are several groups."""

    label: str
    best: str
    against: str
    model: Model | None


@dataclass(frozen=True)
class Conclusion:
    """The answer by one objective."""

    metric: str
    title: str
    """`Held-out CFM (cfm_loss), lower is better`."""
    moves: str
    """Which settings move it, by how much."""
    parts: list[Part]
    more: str = ""
    """A note on parts that are not shown."""

    def sentences(self) -> list[str]:
        """The answer without its models."""
        of_parts = [" ".join(filter(None, (f"[{p.label}]" * bool(p.label), p.best, p.against))) for p in self.parts]
        return [f"{self.title}: {self.moves}", *of_parts, *filter(None, [self.more])]


def conclusions(study: StudySummary) -> list[Conclusion]:
    """An answer per objective; none before a trial has finished."""
    if not any(c.is_measured for c in study.configurations):
        return []
    return [_conclusion(study, objective) for objective in objectives(study.results.spec) or [study.objective]]


def _conclusion(study: StudySummary, objective: Objective) -> Conclusion:
    metric, mode = objective
    groups = [group for group in comparable(study.on_axes or study.configurations, metric) if ranked(group, metric)]
    parts = [_part(study, group, objective, is_one_of=len(groups) > 1) for group in groups[:MAX_GROUPS]]
    more = f"And {len(groups) - MAX_GROUPS} more groups that do not compare." * (len(groups) > MAX_GROUPS)
    split = "Held-out" if study.has_heldout(metric) else "Validation"
    name = f"{NAMES[metric]} ({metric})" if metric in NAMES else metric
    title = f"{split} {name}, {'lower' if mode == 'min' else 'higher'} is better"
    return Conclusion(metric, title, moves(study, metric), parts, more)


def _part(study: StudySummary, group: Sequence[Configuration], objective: Objective, *, is_one_of: bool) -> Part:
    label = study.map_label(group[0].map_of(objective[0])) if is_one_of else ""
    return Part(label, best(group, objective), against(study, group, objective[0]), _model(study, group, objective))


# --- what moves it ---------------------------------------------------------------------------------------------


def moves(study: StudySummary, metric: str) -> str:
    """The effect of each setting on a metric, all else equal: the largest that is clear, or that none is."""
    if not study.varying:
        return "No setting varies."
    if is_population(study):
        return "The settings of a population change while it trains, so the effect of none is measured."
    found = {names: of_names for names in subjects(study) if (of_names := effects(study, names, metric))}
    tested = [(names, each) for names, of_names in found.items() for each in of_names]
    adjusted = holm([each.difference.p_value for _, each in tested])
    clear: dict[tuple[str, ...], Effect] = {}
    unclear: dict[tuple[str, ...], Effect] = {}
    by_size = sorted(zip(tested, adjusted, strict=True), key=lambda pair: -abs(pair[0][1].difference.mean))
    for (names, each), p in by_size:
        (clear if p < ERROR_RATE else unclear).setdefault(names, each)
    parts = []
    if clear:
        shown = [f"{_subject(names)} moves it: {_shown(each)}" for names, each in clear.items()]
        parts.append(f"{'; '.join(shown)}.")
    open_questions = {names: each for names, each in unclear.items() if names not in clear}
    if open_questions:
        shown = [f"{_subject(names)} moves it cannot be told: {_shown(each)}" for names, each in open_questions.items()]
        more = len(shown) - MAX_UNCLEAR
        rest = f", nor of {more} more setting{'s' * (more > 1)}" * (more > 0)
        parts.append(f"Whether {'; whether '.join(shown[:MAX_UNCLEAR])}{rest}.")
    alone = [_subject(names) for names in subjects(study) if names not in found]
    if alone:
        lacking = len({c.name for names in subjects(study) if names not in found for c in left_out(study, names)})
        incomplete = f" ({lacking} lack seeds)" if lacking else ""
        differ = " or ".join(f"{name} alone" for name in alone)
        parts.append(f"No two complete configurations that compare differ in {differ}{incomplete}.")
    return " ".join([*parts, correction(adjusted)]).strip()


def _shown(effect: Effect) -> str:
    return f"{effect.difference.in_words()} with {named(effect.settings)} instead of {named(effect.reference)}"


def _subject(names: Sequence[str]) -> str:
    return text.symbol(names[0]) if len(names) == 1 else "the feature map"


# --- the best configuration ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Winner:
    """The best complete configuration of a group by validation, and the comparisons of all others with it."""

    configuration: Configuration
    compared: list[Comparison]
    """Empty with one seed. Differences are losses: positive is worse."""
    next_best: Configuration | None
    objective: Objective

    @property
    def n_worse(self) -> int:
        return sum(each.is_worse(0.0) for each in self.compared)

    @property
    def nearest(self) -> Comparison | None:
        return min(self.compared, key=lambda each: each.difference, default=None)

    def gap(self) -> str:
        """The next best minus the best: `+0.012 ± 0.020`."""
        nearest, sign = self.nearest, _sign(self.objective)
        if nearest is None:
            return text.NOTHING
        return f"{text.signed(sign * nearest.difference)} ± {text.number(nearest.half_width)}"


def _sign(objective: Objective) -> float:
    return 1.0 if objective[1] == "min" else -1.0


def winner(group: Sequence[Configuration], objective: Objective) -> Winner | None:
    """The best of the complete configurations of a group; None without one."""
    metric, sign = objective[0], _sign(objective)
    measured = sorted(complete(group, metric), key=lambda c: sign * c.validated(metric))
    if not measured:
        return None
    compared: list[Comparison] = []
    if measured[0].n_seeds > 1:
        losses = {c.name: {s: sign * v for s, v in c.validation[metric].items()} for c in measured}
        compared = against_best(losses, error_rate=ERROR_RATE, n_configurations=len(measured))
    return Winner(measured[0], compared, measured[1] if len(measured) > 1 else None, objective)


def best(group: Sequence[Configuration], objective: Objective) -> str:
    """The best configuration of a group by validation, and whether it is told apart from the next best."""
    metric = objective[0]
    found = winner(group, objective)
    if found is None:
        first = ranked(group, metric)[0]
        at = f", at {text.number(first.validated(metric))} on the validation split"
        seeds = f"{len(first.finished_seeds)} of {first.n_seeds} seeds"
        return f"No configuration has all its seeds. The best so far is {first.label}{at} ({seeds})."
    level = (
        f"{found.configuration.label} ({text.number(found.configuration.validated(metric))} on the validation split)"
    )
    if found.next_best is None:
        return f"The only complete configuration is {level}."
    total = len(complete(group, metric))
    first_words = f"The best of {total} complete configurations is {level}."
    nearest = found.nearest
    if nearest is None:
        return f"{first_words} With one seed it cannot be told from the next best, {found.next_best.label}."
    verb = "is told apart" if nearest.is_worse(0.0) else "cannot be told"
    return (
        f"{first_words} It {verb} from the next best, {found.next_best.label} ({found.gap()}); of the "
        f"{len(found.compared)} others {found.n_worse} can be told to be worse, at an error rate of "
        f"{100 * ERROR_RATE:.0f} % for all."
    )


# --- against the base model and baselines ----------------------------------------------------------------------


def against(study: StudySummary, group: Sequence[Configuration], metric: str) -> str:
    """The best of a group against the base model and each named baseline, chosen without the seed that is scored."""
    chosen = select(group, metric)
    if chosen is None:
        return ""
    tests = [(name, gap) for name, gap in _gaps(study, chosen, group[0], metric) if gap.n]
    if not tests:
        return ""
    adjusted = holm([gap.p_value for _, gap in tests])
    told = [_told(name, gap, p) for (name, gap), p in zip(tests, adjusted, strict=True)]
    labels = " or ".join(c.label for c in chosen.configurations)
    whose = f"The best, chosen for each seed by the other seeds ({labels})," if chosen.is_choice else "It"
    return " ".join(filter(None, [f"{whose} {text.listed(told)}.", correction(adjusted), missing_of(chosen).strip()]))


def _gaps(study: StudySummary, chosen: Selected, of_group: Configuration, metric: str) -> list[tuple[str, Interval]]:
    """Differences to the base model and to baselines that compare with the group."""
    is_heldout = study.has_heldout(metric)
    ours = _values(study, chosen, metric)
    gaps = [("the base model", chosen.minus(ours, chosen.base(metric)))] if is_heldout else []
    key = of_group.map_of(metric, at_one_length=is_heldout)
    rivals = [c for c in study.configurations if c.baseline and c.map_of(metric, at_one_length=is_heldout) == key]
    for candidates in grouped(rivals, lambda c: c.baseline).values():
        rival = select(candidates, metric)
        if rival and rival.by_seed.keys() & chosen.by_seed.keys():
            gap = chosen.minus(ours, _values(study, rival, metric), other=rival)
            gaps.append((" or ".join(c.label for c in rival.configurations), gap))
    return gaps


def _values(study: StudySummary, chosen: Selected, metric: str) -> BySeed:
    by_seed = {seed: study.outcome(c, metric) for seed, c in chosen.by_seed.items()}
    return {seed: values[seed] for seed, values in by_seed.items() if seed in values}


def correction(adjusted: Sequence[float]) -> str:
    """A note on p-values that were adjusted together; none for a single test."""
    tested = sum(not math.isnan(p) for p in adjusted)
    return f"Holm's correction is for {tested} comparisons." if tested > 1 else ""


def _told(name: str, gap: Interval, p: float) -> str:
    """`is below SFT: −0.2 (...)`, or that it cannot be told."""
    side = "below" if gap.mean < 0 else "above"
    words = f"is {side} {name}" if p < ERROR_RATE else f"cannot be told from {name}"
    return f"{words}: {gap.in_words()}"


# --- its model -------------------------------------------------------------------------------------------------


def _model(study: StudySummary, group: Sequence[Configuration], objective: Objective) -> Model | None:
    row = best_trial(group, objective[0])
    if row is None:
        return None
    trial_id = str(row["trial_id"])
    command = f"ebft-study export {shlex.quote(study.name)} {trial_id} --to {shlex.quote(f'models/{study.name}')}"
    where = last_checkpoint(row)
    in_folder = f": {where} in the study's folder" if where else ""
    return Model(f"Its model at its best seed is that of trial {trial_id}{in_folder}.", command)


def last_checkpoint(row: Mapping[Any, Any]) -> str:
    """The folder of the checkpoint at the end of a finished trial, below that of its study; '' where none is known.

    Args:
        row: of the table `trials`.
    """
    if not row["steps_done"] >= 0:
        return ""
    return f"train/{row['trial_id']}-{int(row['attempt'])}/checkpoint_{int(row['steps_done']):08d}"
