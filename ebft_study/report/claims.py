"""The paper's claims put to the test: each claim is a function from a study to a verdict with its numbers.

A verdict follows from 95 % intervals over seeds alone: `agrees` or `disagrees` when the whole interval lies on one
side of zero, `cannot tell` when it contains zero, when one seed allows no interval, or when the study lacks the
configurations. Where the paper's statement covers several settings, it agrees when all of them do and disagrees when
one of them does. Configurations are chosen by their validation values, so that the held-out numbers stay unbiased.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ebft_study import text
from ebft_study.analysis.statistics import Interval, mean_interval, paired_difference
from ebft_study.report.tables import Configuration, Study, best

Ruling = Literal["agrees", "disagrees", "cannot tell"]
# Two amounts of data count as equal within this fraction: the last batch may be cut differently.
EQUAL_DATA = 0.01


@dataclass(frozen=True)
class Verdict:
    """Whether a study agrees with one claim of the paper; `sentence` holds the numbers or says what is missing."""

    claim: str
    reference: str
    ruling: Ruling
    sentence: str


def ebft_lowers_cfm(study: Study) -> Verdict:
    """EBFT lowers CFM."""
    claim = "EBFT (α=1) lowers the held-out feature-matching loss below the base model's."
    verdict = _verdict(claim, "Figure 2, Table 1")
    pure = _pure(study)
    if pure is None:
        return verdict("cannot tell", _lacks("EBFT with alpha=1"))
    change = pure.change("cfm_loss")
    values = f"base {text.number(study.base('cfm_loss'))}, {_named(pure)} {text.level(pure.level('cfm_loss'))}"
    return verdict(
        _expect(change, "below"), f"CFM{_at(study)}: {values}; difference {text.spoken(change)}.{_lost(pure)}"
    )


def ebft_beats_sft_on_cfm(study: Study) -> Verdict:
    """At equal data EBFT ends below SFT on CFM."""
    claim = "At equal data, EBFT (α=1) reaches a lower held-out feature-matching loss than SFT."
    return _against_sft(study, "cfm_loss", claim, "Figure 2, Table 1")


def ebft_beats_sft_on_ce(study: Study) -> Verdict:
    """At equal data EBFT ends below SFT on CE, although SFT minimises CE."""
    claim = "At equal data, EBFT (α=1, smallest γ) reaches a lower held-out cross-entropy than SFT."
    return _against_sft(study, "ce_loss", claim, "Figures 3 and 6, Table 1")


def ce_does_not_rise(study: Study) -> Verdict:
    """Pure feature matching does not raise CE."""
    verdict = _verdict(
        "At α=1 the held-out cross-entropy does not rise above the base model's.", "Figure 11, appendix C"
    )
    pure = _pure(study)
    if pure is None:
        return verdict("cannot tell", _lacks("EBFT with alpha=1"))
    change = pure.change("ce_loss")
    return verdict(
        _expect(change, "below"),
        f"CE of {_named(pure)} minus base ({text.number(study.base('ce_loss'))}): {text.spoken(change)}.{_lost(pure)}",
    )


def gamma_lowers_ce_and_keeps_the_gain(study: Study) -> Verdict:
    """The largest gamma lowers CE below gamma=0's, and keeps at least half of the CFM gain."""
    verdict = _verdict(
        "Adding γ lowers the cross-entropy further without giving the feature-matching gain back.", "Figure 6"
    )
    pure = _pure(study)
    weighted = _differing_in(study, pure, "gamma") if pure else []
    if pure is None or not weighted:
        return verdict("cannot tell", _lacks("EBFT with alpha=1 at two values of gamma"))
    strongest = max(weighted, key=lambda c: c.settings["gamma"])
    ce, cfm, gain = strongest.versus(pure, "ce_loss"), strongest.change("cfm_loss"), pure.change("cfm_loss")
    kept = cfm.mean / gain.mean if gain.mean < 0 else math.nan
    given_back = strongest.versus(pure, "cfm_loss").side == "above" and not kept >= 0.5
    if ce.side == "below" and cfm.side == "below" and kept >= 0.5:
        ruling: Ruling = "agrees"
    else:
        ruling = "disagrees" if ce.side == "above" or given_back else "cannot tell"
    share = f", {kept:.0%} of the gain at γ={_value(pure, 'gamma')}" if gain.side == "below" else ""
    others = [
        f"γ={_value(c, 'gamma')}: {text.difference(c.versus(pure, 'ce_loss'))}" for c in weighted if c != strongest
    ]
    also = f" Other weights, CE: {'; '.join(others)}." if others else ""
    return verdict(
        ruling,
        f"{strongest.label} against {pure.label}: CE {text.spoken(ce)}; its CFM{_at(study)} minus the base model's: "
        f"{text.spoken(cfm)}{share}.{also}{_lost(strongest, pure)}",
    )


def small_alpha_raises_ce(study: Study) -> Verdict:
    """Without CE term, alpha < 1 is no proper scoring rule and CE rises."""
    verdict = _verdict("With γ=0, α<1 raises the cross-entropy while it trains.", "Section H.1, Figure 11")
    without = [c for c in study.ebft if c.settings["gamma"] == 0 and _alpha(c) < 1]
    alphas = sorted({_alpha(c) for c in without})
    chosen = [c for alpha in alphas if (c := best(c for c in without if _alpha(c) == alpha))]
    if not chosen:
        return verdict("cannot tell", _lacks("EBFT with alpha<1 and gamma=0") + _lost(*without))
    changes = [mean_interval(c.ce_rise.values()) for c in chosen]
    spoken = [f"α={_value(c, 'alpha')}: {text.spoken(d)}" for c, d in zip(chosen, changes, strict=True)]
    return verdict(
        _all_of([_expect(change, "above") for change in changes]),
        f"Validation CE at the end minus that at EBFT's first step, at γ=0: {'; '.join(spoken)}.{_lost(*without)}",
    )


def gain_persists_at_longer_completions(study: Study) -> Verdict:
    """The CFM gain is there at every measured length beyond the training length."""
    verdict = _verdict("EBFT's feature-matching gain persists at completions longer than those trained on.", "Figure 2")
    pure = _pure(study)
    trained = pure.settings["completion_length"] if pure else None
    longer = [length for length in study.lengths if trained is not None and length > trained]
    if pure is None or not longer:
        return verdict("cannot tell", _lacks("EBFT with alpha=1, evaluated at lengths beyond its completion_length"))
    changes = [pure.change("cfm_loss", length) for length in longer]
    spoken = [f"at {length} tokens {text.spoken(d)}" for length, d in zip(longer, changes, strict=True)]
    return verdict(
        _all_of([_expect(change, "below") for change in changes]),
        f"{_named(pure)}, trained at G={trained}: CFM minus base {text.listed(spoken)}.{_lost(pure)}",
    )


def cfm_grows_with_length(study: Study) -> Verdict:
    """CFM of the SFT model is larger at the longest than at the shortest measured length."""
    verdict = _verdict("The feature-matching loss grows with the completion length.", "Figure 1")
    model = best(study.sft) or best(study.configurations)
    if model is None or len(study.lengths) < 2:
        return verdict("cannot tell", _lacks("a trial evaluated at two completion lengths"))
    short, long = study.lengths[0], study.lengths[-1]
    growth = _between(model, short, long)
    levels = [model.level("cfm_loss", length).mean for length in study.lengths]
    steady = all(a < b for a, b in itertools.pairwise(levels))
    pattern = "growing at every length in between" if steady else "though not at every length in between"
    return verdict(
        _expect(growth, "above"),
        f"{model.label}: {text.number(levels[0])} at {short} token{'s' * (short > 1)}, {text.number(levels[-1])} at "
        f"{long}; difference {text.spoken(growth)}, {pattern}.",
    )


CLAIMS: tuple[Callable[[Study], Verdict], ...] = (
    ebft_lowers_cfm,
    ebft_beats_sft_on_cfm,
    ce_does_not_rise,
    gamma_lowers_ce_and_keeps_the_gain,
    small_alpha_raises_ce,
    gain_persists_at_longer_completions,
    ebft_beats_sft_on_ce,
    cfm_grows_with_length,
)


def judge(study: Study) -> list[Verdict]:
    """A verdict per claim, in a fixed order."""
    return [claim(study) for claim in CLAIMS]


# --- what the claims share -------------------------------------------------------------------------------------


def _verdict(claim: str, reference: str) -> Callable[[Ruling, str], Verdict]:
    return lambda ruling, sentence: Verdict(claim, reference, ruling, sentence)


def _pure(study: Study) -> Configuration | None:
    """EBFT nearest to pure feature matching: alpha=1 and the smallest gamma that has a finished trial."""
    proper = [c for c in study.ebft if _alpha(c) == 1 and c.n_finished and c.final]
    smallest = min((c.settings["gamma"] for c in proper), default=None)
    return best(c for c in proper if c.settings["gamma"] == smallest)


def _differing_in(study: Study, reference: Configuration, setting: str) -> list[Configuration]:
    """Finished EBFT configurations that agree with `reference` in every varying setting but this one."""
    same = [name for name in study.varying if name != setting]
    return [
        c
        for c in study.ebft
        if c.n_finished and c.final and c.baseline == reference.baseline
        if c.settings[setting] != reference.settings[setting]
        if all(c.settings[name] == reference.settings[name] for name in same)
    ]


def _against_sft(study: Study, metric: str, claim: str, reference: str) -> Verdict:
    verdict = _verdict(claim, reference)
    pure = _pure(study)
    finished = [
        c for c in study.sft if c.n_finished and c.final and pure and c.settings["model"] == pure.settings["model"]
    ]
    if pure is None or not finished:
        return verdict("cannot tell", _lacks("EBFT with alpha=1" if pure is None else "SFT of the same model"))
    equal = [c for c in finished if _equal_data(pure, c)]
    sft = best(equal or finished)
    if sft is None or not equal:
        seen = f"EBFT saw {text.count(pure.sequences_seen)} sequences"
        return verdict("cannot tell", f"The data are not equal: {seen}, no SFT trial did.")
    gap = pure.versus(sft, metric)
    name = "CE" if metric == "ce_loss" else f"CFM{_at(study)}"
    return verdict(
        _expect(gap, "below"),
        f"{name}: {sft.label} {text.level(sft.level(metric))}, {_named(pure)} {text.level(pure.level(metric))}; "
        f"difference {text.spoken(gap)}, each after {text.count(pure.sequences_seen)} sequences.{_lost(pure, sft)}",
    )


def _equal_data(left: Configuration, right: Configuration) -> bool:
    return abs(left.sequences_seen - right.sequences_seen) <= EQUAL_DATA * left.sequences_seen


def _between(model: Configuration, short: int, long: int) -> Interval:
    return paired_difference(model.final.get(("cfm_loss", long), {}), model.final.get(("cfm_loss", short), {}))


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


def _at(study: Study) -> str:
    return f" at {study.length} tokens" if study.length is not None else ""


def _lacks(what: str) -> str:
    return f"The study has no finished trials of {what}."


def _lost(*configurations: Configuration) -> str:
    """A note on trials that are missing from the numbers, because leaving them out flatters a configuration."""
    notes = [f"{c.label}: {note}" for c in configurations if (note := _stopped(c))]
    return f" Left out: {'; '.join(notes)}." if notes else ""


def _stopped(configuration: Configuration) -> str:
    unfinished = configuration.trials[configuration.trials["status"] != "finished"]
    counts = unfinished["status"].value_counts()
    return ", ".join(f"{number} {status}" for status, number in counts.items())
