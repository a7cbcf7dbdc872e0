"""The answers of a study to the questions of the notebooks (`analysis/`), each computed, in a sentence or a few.

Every comparison comes with its 95 % interval. Where several are made for one answer, they are told apart from nothing
only after Holm's correction for their number. A study that cannot answer a question says which part it lacks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from ebft_study import text
from ebft_study.analysis import lengths
from ebft_study.analysis.effects import Effect, effects, feature_settings, left_out
from ebft_study.analysis.importance import complete, importances, obstacle
from ebft_study.analysis.methods import tasks
from ebft_study.analysis.selection import comparable
from ebft_study.analysis.statistics import CONFIDENCE, Interval, holm
from ebft_study.analysis.summary import MAX_GROUPS, Configuration, StudySummary
from ebft_study.analysis.usage import savings
from ebft_study.report import claims, conclusion, scaling
from ebft_study.report.content import NAMES, overview
from ebft_study.report.effects import named
from ebft_study.report.methods import column_name
from ebft_study.report.verdicts import Verdict, missing_trials

ALPHA_GAMMA = ("alpha", "gamma")
MAX_SENTENCES = 3
Test = tuple[str, Interval]
"""What a difference is of, and the difference."""


def cannot(reason: str) -> str:
    return f"This study cannot answer it: {reason}."


# --- 01: a study's results -------------------------------------------------------------------------------------


def reading(study: StudySummary) -> str:
    """How much is done, and the answer to the study's own question, as its report opens with it."""
    concluded = conclusion.conclusions(study)
    if not concluded:
        return cannot(f"{overview(study)}, and no finished trial has held-out values that can be compared")
    return _joined([f"{overview(study)}.", *(sentence for each in concluded for sentence in each.sentences())])


def _more(groups: Sequence[object]) -> str:
    return f" And {len(groups) - MAX_GROUPS} more groups." * (len(groups) > MAX_GROUPS)


# --- 02: alpha and gamma ---------------------------------------------------------------------------------------


def alpha_gamma(study: StudySummary) -> str:
    """The effects of the largest alpha and gamma against the smallest, on CE and CFM."""
    found = {name: [_largest(study, (name,), metric) for metric in ("ce_loss", "cfm_loss")] for name in ALPHA_GAMMA}
    present = {name: [each for each in both if each] for name, both in found.items()}
    if not any(present.values()):
        short = _incomplete([c for name in ALPHA_GAMMA if name in study.varying for c in left_out(study, (name,))])
        return cannot(
            f"it takes EBFT at two values of alpha or of gamma, all else equal, with all seeds finished{short}"
        )
    tested = [each for both in present.values() for each in both]
    adjusted = _adjusted(each.difference for each in tested)
    told = iter(_told(NAMES[each.metric], each.difference, p) for each, p in zip(tested, adjusted, strict=True))
    parts = []
    for name, both in present.items():
        if both:
            low, high = (text.setting(settings[0][1]) for settings in (both[0].reference, both[0].settings))
            change = text.listed([next(told) for _ in both])
            parts.append(f"Raising {text.symbol(name)} from {low} to {high} {change}.")
        else:
            parts.append(f"{text.symbol(name).capitalize()} alone does not vary between finished configurations.")
    rest = [c for name in ALPHA_GAMMA if name in study.varying for c in left_out(study, (name,))]
    return _joined([*parts, conclusion.correction(adjusted), _missing(rest).strip()])


def _largest(study: StudySummary, names: Sequence[str], metric: str) -> Effect | None:
    return next(iter(effects(study, names, metric)[-1:]), None)


# --- 03: feature matching by length ----------------------------------------------------------------------------


def by_length(study: StudySummary) -> str:
    """Whether CFM grows with the length, whether EBFT's gain persists beyond training's, and EBFT against SFT."""
    if len(study.lengths) < 2 or not any(c.is_measured for c in study.configurations):
        return cannot("it takes finished trials with held-out CFM at two completion lengths (profile_lengths) or more")
    questions = ("CFM grows with the completion length", "EBFT's gain persists beyond the length of its training")
    own = _verdicts(study, claims.cfm_grows_with_length, claims.gain_persists_at_longer_completions)
    compared = lengths.against_sft(study)
    if all(math.isnan(verdict.p_value) for verdict in own) and not any(
        g.n > 1 for _, gaps in compared for g in gaps.values()
    ):
        return cannot("no configuration has held-out CFM at two lengths over two seeds")
    parts = [f"{question}: {v.ruling}. {v.sentence}" for question, v in zip(questions, own, strict=True)]
    if not compared:
        parts.append("EBFT and SFT are not both measured on one feature map.")
    adjusted = _adjusted(gap for _, gaps in compared for gap in gaps.values())
    p_values = iter(adjusted)
    parts += [_length_gaps(label, [(n, gap, next(p_values)) for n, gap in gaps.items()]) for label, gaps in compared]
    return _joined([*parts, conclusion.correction(adjusted)])


def _length_gaps(label: str, gaps: Sequence[tuple[int, Interval, float]]) -> str:
    """Where EBFT's CFM is below SFT's, above it, or cannot be told from it."""
    below = [str(n) for n, gap, p in gaps if gap.mean < 0 and _is_clear(p)]
    above = [str(n) for n, gap, p in gaps if gap.mean > 0 and _is_clear(p)]
    unclear = [str(n) for n, _, p in gaps if not _is_clear(p)]
    states = [("is below SFT's", below), ("is above SFT's", above), ("cannot be told from SFT's", unclear)]
    told = text.listed([f"{words} at length{'s' * (len(at) > 1)} {text.listed(at)}" for words, at in states if at])
    longest, gap, _ = gaps[-1]
    return f"{_where(label)}EBFT's CFM {told}; at {longest} the difference is {gap.in_words()}."


# --- 04: feature networks --------------------------------------------------------------------------------------


def feature_networks(study: StudySummary) -> str:
    """Each change of the feature map against the reference, by cross-entropy and the CFM of the judge."""
    names = feature_settings(study)
    if not names:
        return cannot("it varies no setting of the feature map (feature_network, whitening, pooling, depths, ...)")
    by_judge = effects(study, names, "judge_cfm_loss")
    found = [*by_judge, *effects(study, names, "ce_loss")]
    if not found:
        rest = _incomplete(left_out(study, names))
        return cannot(f"no two configurations differ in the feature map alone, with all seeds finished{rest}")
    adjusted = _adjusted(each.difference for each in found)
    tested = list(zip(found, adjusted, strict=True))
    parts = []
    for settings in dict.fromkeys(each.settings for each in found):
        told = [_told(NAMES[each.metric], each.difference, p) for each, p in tested if each.settings == settings]
        parts.append(f"Against {named(found[0].reference)}, {named(settings)} {text.listed(told)}.")
    judge = "" if by_judge else "No judge measured feature matching, so only cross-entropy compares feature maps."
    return _joined([*parts, judge, conclusion.correction(adjusted), _missing(left_out(study, names)).strip()])


# --- 05: methods -----------------------------------------------------------------------------------------------

RIVALS = (("EBFT", "SFT"), ("EBFT", "RLVR"), ("EBFT (ws.)", "RLVR (ws.)"))


def methods(study: StudySummary) -> str:
    """EBFT minus SFT and RLVR in every task: CE, CFM, and the score of one sampled answer."""
    all_tasks = tasks(study)
    if not all_tasks:
        own = _verdicts(study, claims.ebft_beats_sft_on_ce, claims.ebft_beats_sft_on_cfm)
        if all(math.isnan(verdict.p_value) for verdict in own):
            return cannot("it takes finished trials of two methods on one data set")
        names = ("CE", "CFM")
        parts = [f"EBFT below SFT on {name}: {v.ruling}. {v.sentence}" for name, v in zip(names, own, strict=True)]
        return _joined([*parts, "The study has no benchmark, so pass@k is not answered."])
    gaps: dict[tuple[str, str, str], list[Test]] = {}
    for task, (left, right) in itertools.product(all_tasks, RIVALS):
        if left in task.methods and right in task.methods:
            columns = [column for column in task.columns if not column.benchmark or column.is_sampled_once]
            found = [(column_name(c), task.methods[left].gap(task.methods[right], c)) for c in columns]
            gaps[task.label, left, right] = [(name, gap) for name, gap in found if gap.n]
    if not any(gaps.values()):
        return cannot("it takes finished trials of EBFT and of SFT or RLVR on one data set")
    adjusted = _adjusted(gap for tests in gaps.values() for _, gap in tests)
    p_values = iter(adjusted)
    parts = [
        f"{_where(label)}{left} against {right}: "
        f"{', '.join(_compared(name, gap, next(p_values)) for name, gap in tests)}."
        for (label, left, right), tests in gaps.items()
    ]
    return _joined([*parts, conclusion.correction(adjusted)])


# --- 06: scaling -----------------------------------------------------------------------------------------------


def scaling_laws(study: StudySummary) -> str:
    """The law of each method or the reason why there is none, and the effective speedup over SFT."""
    section = scaling.section(study)
    if section is None:
        return cannot("no method has two sizes or two amounts of data with finished trials")
    parts = [
        f"{name}, {measure}: no law, {score}."
        if values == text.NOTHING
        else f"{name}, {measure}: {form} with {values}; {score}."
        for measure, name, _, form, values, score in section.rows
    ]
    parts += [
        f"Whether {name} saves {amount} ({measure}) cannot be told: speedup over SFT "
        f"{factor.removesuffix(scaling.UNCLEAR)}."
        if factor.endswith(scaling.UNCLEAR)
        else f"The effective speedup of {name} over SFT in {amount} ({measure}) is {factor}."
        for measure, name, amount, factor, _ in section.speedups
    ]
    none = "" if section.speedups else "There is no speedup over SFT to tell, without laws of both methods over data."
    return _joined([*parts, none, *section.notes])


# --- 07: search and early stopping -----------------------------------------------------------------------------


def search(study: StudySummary) -> str:
    """The best configuration and how many can be told from it, the settings that matter, and what stopping saved."""
    groups = [group for group in comparable(study.on_axes, study.objective[0]) if complete(group)]
    if not groups:
        return cannot(f"{overview(study)}, and no configuration on the axes has all its seeds")
    parts = [_winner(study, group, len(groups) > 1) for group in groups[:MAX_GROUPS]]
    return _joined([*parts, _more(groups).strip(), _stopping(study)])


def _winner(study: StudySummary, group: Sequence[Configuration], is_part: bool) -> str:
    metric = study.objective[0]
    found = conclusion.winner(group, study.objective)
    if found is None:
        return ""
    first = found.configuration
    where = _where(study.map_label(first.map_of(metric))) if is_part else ""
    best = (
        f"{where}The best of {len(complete(group))} complete configurations by validation {metric} is {first.label} "
        f"({text.number(first.validated())})"
    )
    if found.next_best is None:
        return f"{best}, the only one."
    if not found.compared:
        return f"{best}; with one seed it cannot be told from the others. {_important(study, group)}"
    return (
        f"{best}. Of the {len(found.compared)} others {found.n_worse} can be told to be worse, at an error rate of "
        f"{conclusion.ERROR_RATE:.0%} for all, and {len(found.compared) - found.n_worse} cannot be told from it; the "
        f"nearest is {found.next_best.label}, by {found.gap()}. {_important(study, group)}"
    )


def _important(study: StudySummary, group: Sequence[Configuration]) -> str:
    if len(study.varying) < 2:
        return "One setting varies, so there is no ranking of settings."
    if reason := obstacle(study, group):
        return f"Which settings matter cannot be told: {reason}."
    ranking = importances(study, group)
    clear = [f"{text.symbol(e.name)} ({e.share:.2f}, {e.low:.2f} to {e.high:.2f})" for e in ranking if e.is_clear]
    unclear = [text.symbol(each.name) for each in ranking if not each.is_clear]
    matter = f"Of the settings, {text.listed(clear)} clearly matter{'s' * (len(clear) == 1)}" if clear else ""
    rest = f"whether {text.listed(unclear)} matter{'s' * (len(unclear) == 1)} cannot be told" if unclear else ""
    sentence = "; ".join(filter(None, (matter, rest)))
    return f"{sentence[0].upper()}{sentence[1:]}."


def _stopping(study: StudySummary) -> str:
    trials = study.results.trials
    stopped = int((trials["status"] == "stopped").sum())
    if not stopped:
        return "No trial was stopped early."
    saved = savings(trials, study.results.spec.get("resources") or {})
    return f"Early stopping ended {stopped} of {len(trials)} trials" + (f" and saved {saved}." if saved else ".")


# --- 08: the paper's tables ------------------------------------------------------------------------------------


def paper_tables(study: StudySummary) -> str:
    """How many of the paper's claims the study can test, and how they come out."""
    verdicts = claims.judge(study)
    tested = [verdict for verdict in verdicts if not math.isnan(verdict.p_value)]
    if not tested:
        return cannot("it has no finished trials over two seeds or more for any of the paper's claims")
    rulings = [verdict.ruling for verdict in tested]
    decided = [f"It {ruling}: {v.claim}" for ruling in ("agrees", "disagrees") for v in tested if v.ruling == ruling]
    return _joined(
        [
            f"Of {len(verdicts)} claims of the paper this study tests {len(tested)}: it agrees with "
            f"{rulings.count('agrees')}, disagrees with {rulings.count('disagrees')}, and cannot tell "
            f"{rulings.count('cannot tell')}, after Holm's correction for all.",
            *decided,
        ]
    )


# --- words -----------------------------------------------------------------------------------------------------


def _verdicts(study: StudySummary, *wanted: Callable[[StudySummary], Verdict]) -> list[Verdict]:
    """Verdicts of some claims, corrected for all that the report tests."""
    judged = dict(zip(claims.CLAIMS, claims.judge(study), strict=False))
    return [judged[claim] for claim in wanted]


def _adjusted(intervals: Iterable[Interval]) -> list[float]:
    return holm([interval.p_value for interval in intervals])


def _is_clear(p: float) -> bool:
    return p < 1 - CONFIDENCE


def _told(name: str, difference: Interval, p: float) -> str:
    """`lowers CE: −0.22 (...)`, or that it cannot be told."""
    verb = "lowers" if difference.mean < 0 else "raises"
    return f"{_if_clear(difference, p, f'{verb} {name}', f'cannot be told to change {name}')}: {difference.in_words()}"


def _compared(name: str, difference: Interval, p: float) -> str:
    """`CE is lower: ...`, or that it cannot be told."""
    side = "lower" if difference.mean < 0 else "higher"
    return f"{_if_clear(difference, p, f'{name} is {side}', f'{name} cannot be told apart')}: {difference.in_words()}"


def _if_clear(difference: Interval, p: float, clear: str, unclear: str) -> str:
    """One of two phrases; the interval of a single comparison excludes zero more often than the correction lets it."""
    if _is_clear(p):
        return clear
    return f"{unclear} after the correction" if difference.side != "unclear" else unclear


def _where(label: str) -> str:
    return f"[{label}] " if label else ""


def _joined(parts: Iterable[str]) -> str:
    """Sentences in one line, or as a list in Markdown where there are more than a reader takes in at once."""
    sentences = [part for part in parts if part]
    if len(sentences) <= MAX_SENTENCES:
        return " ".join(sentences)
    return "\n\n" + "\n".join(f"- {sentence}" for sentence in sentences)


def _incomplete(configurations: Sequence[Configuration]) -> str:
    count = len({c.name for c in configurations})
    return f" ({count} configuration{'s' * (count != 1)} lack seeds)" if count else ""


def _missing(configurations: Sequence[Configuration]) -> str:
    return missing_trials(list({c.name: c for c in configurations}.values()))
