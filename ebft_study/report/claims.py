"""The paper's claims put to the test: each claim is a function from a study to a verdict with its numbers.

A verdict follows from 95 % intervals over seeds alone: `agrees` or `disagrees` when the whole interval lies on one
side of zero, `cannot tell` when it contains zero, when one seed allows no interval, or when the study lacks the
configurations. Where the paper's statement covers several settings, it agrees when all of them do and disagrees when
one of them does. Configurations are chosen by their validation values, so that the held-out numbers stay unbiased.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ebft_study import text
from ebft_study.analysis.statistics import Interval, mean_interval, paired_difference
from ebft_study.analysis.summary import Configuration, StudySummary, best

Ruling = Literal["agrees", "disagrees", "cannot tell"]
# Two amounts of data count as equal within this fraction: the last batch may be cut differently.
EQUAL_DATA = 0.01


@dataclass(frozen=True)
class Verdict:
    """Whether a study agrees with one claim of the paper; `sentence` has the numbers, or names the missing data."""

    claim: str
    reference: str
    ruling: Ruling
    sentence: str


CLAIMS: list[Callable[[StudySummary], Verdict]] = []


def judge(study: StudySummary) -> list[Verdict]:
    """A verdict per claim, in the order of this file."""
    return [claim(study) for claim in CLAIMS]


def _claim(
    statement: str, reference: str
) -> Callable[[Callable[[StudySummary], tuple[Ruling, str]]], Callable[[StudySummary], Verdict]]:
    """Add a test of a claim to `CLAIMS`; the test returns a ruling and its sentence."""

    def register(test: Callable[[StudySummary], tuple[Ruling, str]]) -> Callable[[StudySummary], Verdict]:
        @functools.wraps(test)
        def claim(study: StudySummary) -> Verdict:
            return Verdict(statement, reference, *test(study))

        CLAIMS.append(claim)
        return claim

    return register


@_claim("EBFT (α=1) lowers the held-out feature-matching loss below the base model's.", "Figure 2, Table 1")
def ebft_lowers_cfm(study: StudySummary) -> tuple[Ruling, str]:
    """EBFT lowers CFM."""
    pure = _pure(study)
    if pure is None:
        return "cannot tell", _lacks("EBFT with alpha=1")
    change = pure.change("cfm_loss")
    base, level = text.number(study.base("cfm_loss")), pure.level("cfm_loss").as_level()
    return _expect(change, "below"), (
        f"CFM{_at(study)}: base {base}, {_named(pure)} {level}; difference {change.in_words()}.{_left_out(pure)}"
    )


@_claim("At equal data, EBFT (α=1) reaches a lower held-out feature-matching loss than SFT.", "Figure 2, Table 1")
def ebft_beats_sft_on_cfm(study: StudySummary) -> tuple[Ruling, str]:
    """EBFT ends below SFT on CFM at equal data."""
    return _against_sft(study, "cfm_loss")


@_claim("At α=1 the held-out cross-entropy does not rise above the base model's.", "Figure 11, appendix C")
def ce_does_not_rise(study: StudySummary) -> tuple[Ruling, str]:
    """Pure feature matching does not raise CE."""
    pure = _pure(study)
    if pure is None:
        return "cannot tell", _lacks("EBFT with alpha=1")
    change, base = pure.change("ce_loss"), text.number(study.base("ce_loss"))
    return _expect(change, "below"), f"CE of {_named(pure)} minus base ({base}): {change.in_words()}.{_left_out(pure)}"


@_claim("Adding γ lowers the cross-entropy further without giving the feature-matching gain back.", "Figure 6")
def gamma_lowers_ce_and_keeps_the_gain(study: StudySummary) -> tuple[Ruling, str]:
    """The largest gamma lowers CE below gamma=0's, and keeps at least half of the CFM gain."""
    pure = _pure(study)
    weighted = _differing_in(study, pure, "gamma") if pure else []
    if pure is None or not weighted:
        return "cannot tell", _lacks("EBFT with alpha=1 at two values of gamma")
    strongest = max(weighted, key=lambda c: c.settings["gamma"])
    ce, cfm, gain = strongest.versus(pure, "ce_loss"), strongest.change("cfm_loss"), pure.change("cfm_loss")
    remaining = cfm.mean / gain.mean if gain.mean < 0 else math.nan
    given_back = strongest.versus(pure, "cfm_loss").side == "above" and not remaining >= 0.5
    if ce.side == "below" and cfm.side == "below" and remaining >= 0.5:
        ruling: Ruling = "agrees"
    else:
        ruling = "disagrees" if ce.side == "above" or given_back else "cannot tell"
    share = f", {remaining:.0%} of the gain at γ={_value(pure, 'gamma')}" if gain.side == "below" else ""
    others = [
        f"γ={_value(c, 'gamma')}: {c.versus(pure, 'ce_loss').as_difference()}" for c in weighted if c != strongest
    ]
    also = f" Other weights, CE: {'; '.join(others)}." if others else ""
    return ruling, (
        f"{strongest.label} against {pure.label}: CE {ce.in_words()}; its CFM{_at(study)} minus the base model's: "
        f"{cfm.in_words()}{share}.{also}{_left_out(strongest, pure)}"
    )


@_claim("With γ=0, α<1 raises the cross-entropy while it trains.", "Section H.1, Figure 11")
def small_alpha_raises_ce(study: StudySummary) -> tuple[Ruling, str]:
    """Without CE term, alpha < 1 is no proper scoring rule and CE rises."""
    without = [c for c in study.ebft if c.settings["gamma"] == 0 and _alpha(c) < 1]
    alphas = sorted({_alpha(c) for c in without})
    chosen = [c for alpha in alphas if (c := best(c for c in without if _alpha(c) == alpha))]
    if not chosen:
        return "cannot tell", _lacks("EBFT with alpha<1 and gamma=0") + _left_out(*without)
    changes = [mean_interval(c.ce_rise.values()) for c in chosen]
    each = [f"α={_value(c, 'alpha')}: {change.in_words()}" for c, change in zip(chosen, changes, strict=True)]
    return _all_of([_expect(change, "above") for change in changes]), (
        f"Validation CE at the end minus that at EBFT's first step, at γ=0: {'; '.join(each)}.{_left_out(*without)}"
    )


@_claim("EBFT's feature-matching gain persists at completions longer than those trained on.", "Figure 2")
def gain_persists_at_longer_completions(study: StudySummary) -> tuple[Ruling, str]:
    """The CFM gain is there at every measured length beyond the training length."""
    pure = _pure(study)
    trained = pure.settings["completion_length"] if pure else None
    longer = [length for length in study.lengths if trained is not None and length > trained]
    if pure is None or not longer:
        return "cannot tell", _lacks("EBFT with alpha=1, evaluated at lengths beyond its completion_length")
    changes = [pure.change("cfm_loss", length) for length in longer]
    each = [f"at {length} tokens {change.in_words()}" for length, change in zip(longer, changes, strict=True)]
    return _all_of([_expect(change, "below") for change in changes]), (
        f"{_named(pure)}, trained at G={trained}: CFM minus base {text.listed(each)}.{_left_out(pure)}"
    )


@_claim(
    "At equal data, EBFT (α=1, smallest γ) reaches a lower held-out cross-entropy than SFT.",
    "Figures 3 and 6, Table 1",
)
def ebft_beats_sft_on_ce(study: StudySummary) -> tuple[Ruling, str]:
    """EBFT ends below SFT on CE at equal data, although SFT minimises CE."""
    return _against_sft(study, "ce_loss")


@_claim("The feature-matching loss grows with the completion length.", "Figure 1")
def cfm_grows_with_length(study: StudySummary) -> tuple[Ruling, str]:
    """CFM of the SFT model is larger at the longest than at the shortest measured length."""
    model = best(study.sft) or best(study.configurations)
    if model is None or len(study.lengths) < 2:
        return "cannot tell", _lacks("a trial evaluated at two completion lengths")
    short, long = study.lengths[0], study.lengths[-1]
    growth = paired_difference(*(model.final.get(("cfm_loss", length), {}) for length in (long, short)))
    levels = [model.level("cfm_loss", length).mean for length in study.lengths]
    steady = all(a < b for a, b in itertools.pairwise(levels))
    pattern = "growing at every length in between" if steady else "though not at every length in between"
    return _expect(growth, "above"), (
        f"{model.label}: {text.number(levels[0])} at {short} token{'s' * (short > 1)}, {text.number(levels[-1])} at "
        f"{long}; difference {growth.in_words()}, {pattern}."
    )


# --- configurations that claims are about ----------------------------------------------------------------------


def _pure(study: StudySummary) -> Configuration | None:
    """EBFT nearest to pure feature matching: alpha=1 and the smallest gamma that has a finished trial."""
    proper = [c for c in study.ebft if _alpha(c) == 1 and _is_measured(c)]
    smallest = min((c.settings["gamma"] for c in proper), default=None)
    return best(c for c in proper if c.settings["gamma"] == smallest)


def _is_measured(configuration: Configuration) -> bool:
    return bool(configuration.n_finished and configuration.final)


def _differing_in(study: StudySummary, reference: Configuration, setting: str) -> list[Configuration]:
    """Finished EBFT configurations that agree with `reference` in every varying setting but this one."""
    same = [name for name in study.varying if name != setting]
    return [
        c
        for c in study.ebft
        if _is_measured(c)
        and c.baseline == reference.baseline
        and c.settings[setting] != reference.settings[setting]
        and all(c.settings[name] == reference.settings[name] for name in same)
    ]


def _against_sft(study: StudySummary, metric: str) -> tuple[Ruling, str]:
    pure = _pure(study)
    if pure is None:
        return "cannot tell", _lacks("EBFT with alpha=1")
    finished = [c for c in study.sft if _is_measured(c) and c.settings["model"] == pure.settings["model"]]
    if not finished:
        return "cannot tell", _lacks("SFT of the same model")
    sequences = text.count(pure.sequences_seen)
    sft = best(c for c in finished if _equal_data(pure, c))
    if sft is None:
        return "cannot tell", f"The data are not equal: EBFT saw {sequences} sequences, no SFT trial did."
    gap = pure.versus(sft, metric)
    name = "CE" if metric == "ce_loss" else f"CFM{_at(study)}"
    levels = f"{sft.label} {sft.level(metric).as_level()}, {_named(pure)} {pure.level(metric).as_level()}"
    return _expect(gap, "below"), (
        f"{name}: {levels}; difference {gap.in_words()}, each after {sequences} sequences.{_left_out(pure, sft)}"
    )


def _equal_data(left: Configuration, right: Configuration) -> bool:
    return abs(left.sequences_seen - right.sequences_seen) <= EQUAL_DATA * left.sequences_seen


# --- rulings and words -----------------------------------------------------------------------------------------


def _expect(interval: Interval, side: Literal["below", "above"]) -> Ruling:
    """Agreement when the whole interval lies on the expected side of zero, disagreement on the other."""
    if interval.side == "unclear":
        return "cannot tell"
    return "agrees" if interval.side == side else "disagrees"


def _all_of(rulings: Sequence[Ruling]) -> Ruling:
    if "disagrees" in rulings:
        return "disagrees"
    return "cannot tell" if "cannot tell" in rulings else "agrees"


def _alpha(configuration: Configuration) -> float:
    alpha = configuration.settings["alpha"]
    return math.nan if alpha is None else float(alpha)


def _value(configuration: Configuration, setting: str) -> str:
    return text.setting(configuration.settings[setting])


def _named(configuration: Configuration) -> str:
    """The label, with alpha and gamma added where the study does not vary them: the claims are about those."""
    fixed = [f"{text.symbol(s)}={_value(configuration, s)}" for s in ("alpha", "gamma")]
    return ", ".join([f"EBFT {configuration.label}", *(part for part in fixed if part not in configuration.label)])


def _at(study: StudySummary) -> str:
    return f" at {study.length} tokens" if study.length is not None else ""


def _lacks(what: str) -> str:
    return f"The study has no finished trials of {what}."


def _left_out(*configurations: Configuration) -> str:
    """A note on trials that are missing from the numbers, because leaving them out flatters a configuration."""
    notes = []
    for c in configurations:
        statuses = c.trials.loc[c.trials["status"] != "finished", "status"].value_counts()
        if len(statuses):
            notes.append(f"{c.label}: {', '.join(f'{count} {status}' for status, count in statuses.items())}")
    return f" Left out: {'; '.join(notes)}." if notes else ""
