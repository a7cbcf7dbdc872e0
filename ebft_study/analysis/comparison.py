"""Studies compared: configurations that are the same in both, with the difference of their held-out values.

The first study is the reference. Configurations are joined by `identity`, compared by as much as both share, seeds and
held-out sequences (`difference`), and judged together: Holm's correction counts every difference that was tested.
Values that are equal to the last digit, or of the very same trials, need no test.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ebft_study import text
from ebft_study.analysis.configuration import BySeed, Configuration, grouped
from ebft_study.analysis.identity import Identity, different, identifying, identity
from ebft_study.analysis.selection import comparable
from ebft_study.analysis.settings import NOT_AN_AXIS
from ebft_study.analysis.statistics import (
    CONFIDENCE,
    Interval,
    Score,
    difference,
    holm,
    mean_interval,
    mean_value,
    pairs_seeds,
)
from ebft_study.analysis.summary import COMPARED, StudySummary
from ebft_study.errors import ResultsError
from ebft_study.plugins import name_of
from ebft_study.results import METRICS, schema

Ruling = Literal["same trials", "equal", "lower", "higher", "cannot tell"]
_OF_SEQUENCES = ("heldout_sequences",)
"""Settings, besides those of the data, that choose the held-out sequences."""
_NETWORKS = {"cfm_loss": ("model", "feature_network"), "judge_cfm_loss": ("judge",)}
"""Metric -> the settings that name the networks whose features it compares."""
_SHOWN = 3


@dataclass(frozen=True)
class Pair:
    """A configuration of the reference, and the same one of another study."""

    study: str
    reference: Configuration
    other: Configuration

    @property
    def label(self) -> str:
        return self.reference.label


@dataclass(frozen=True)
class Difference:
    """Held-out values of a metric in `study`, minus those of the reference: of one configuration, or of all on average.

    `p_value` is corrected for all differences that were tested, NaN where nothing could be, or had to be.
    """

    study: str
    label: str
    metric: str
    levels: tuple[Interval, Interval]
    """Of the reference, and of the study."""
    interval: Interval
    by_seed: tuple[float, ...]
    """Single differences; empty where seeds are not paired."""
    shared: str
    """What both share: `3 seeds, 64 sequences`."""
    ruling: Ruling
    is_average: bool = False
    p_value: float = math.nan

    @property
    def is_better(self) -> bool:
        """Whether the study is on the better side; only of use where the ruling is a side."""
        return (METRICS[self.metric].direction == "max") == (self.ruling == "higher")


@dataclass(frozen=True)
class Comparison:
    """Studies against the first one of them."""

    studies: dict[str, StudySummary]
    """By name; the first one is the reference."""
    pairs: tuple[Pair, ...]
    differences: tuple[Difference, ...]
    length: int | None
    """Completion length at which cfm_loss is compared."""
    across: tuple[str, ...]
    notes: tuple[str, ...]
    """What is not compared, and why."""

    @property
    def reference(self) -> str:
        return next(iter(self.studies))

    @property
    def n_tested(self) -> int:
        return sum(not math.isnan(each.p_value) for each in self.differences)

    def of(self, study: str) -> list[Difference]:
        return [each for each in self.differences if each.study == study]


def compare(studies: Mapping[str, StudySummary], *, across: Sequence[str] = ()) -> Comparison:
    """Compare studies with the first one of them.

    Args:
        studies: by name.
        across: short names of settings that are compared: configurations may differ in them.

    Raises:
        ResultsError: they cannot be compared, in one line that says why.
    """
    names = list(studies)
    if len(names) < 2:
        raise ResultsError("compare: needs two studies or more. Name another one")
    for name, study in studies.items():
        if not any(c.is_measured for c in study.configurations):
            raise ResultsError(f"{name}: has no finished trial with held-out values. Compare it when one has finished")
    _check_data(studies)
    pairs, notes = _joined(studies, across)
    length = _length(studies, pairs)
    compared, of_metrics = _differences(studies, pairs, length)
    if not compared:
        raise ResultsError(f"{' and '.join(names)}: no metric compares. {' '.join(of_metrics)}")
    return Comparison(dict(studies), tuple(pairs), _judged(compared), length, tuple(across), (*of_metrics, *notes))


# --- what can be compared --------------------------------------------------------------------------------------


def _check_data(studies: Mapping[str, StudySummary]) -> None:
    """Refuse data of one name and different content."""
    (reference, first), *others = studies.items()
    ours = fingerprints(first.results.spec, "data")
    for name, study in others:
        theirs = fingerprints(study.results.spec, "data")
        for data in sorted(ours.keys() & theirs.keys()):
            if ours[data] != theirs[data]:
                raise ResultsError(
                    f"{reference} and {name}: their data {data!r} differ (fingerprints {ours[data][:12]} and "
                    f"{theirs[data][:12]}), and so do their held-out texts. Compare studies of the same data"
                )


def fingerprints(spec: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Name -> fingerprint of the `data` or `models` that a study recorded."""
    provenance = spec.get("provenance")
    entries = provenance.get(kind) if isinstance(provenance, Mapping) else None
    return {
        str(name): str(record["fingerprint"])
        for name, record in (entries.items() if isinstance(entries, Mapping) else ())
        if isinstance(record, Mapping) and record.get("fingerprint")
    }


def _joined(studies: Mapping[str, StudySummary], across: Sequence[str]) -> tuple[list[Pair], list[str]]:
    """Pairs of measured configurations that are the same, and notes on the others."""
    known = {column.name for column in schema.hyperparameters()} - {*NOT_AN_AXIS}
    for name in across:
        if name not in known:
            raise ResultsError(f"compare: across={name!r}: is no setting that studies can differ in")
    also = sorted({name for study in studies.values() for name in _telling_apart(study)})
    tables = {name: _by_identity(name, study, also, across) for name, study in studies.items()}
    (reference, ours), *others = tables.items()
    pairs, notes = list[Pair](), list[str]()
    for name, theirs in others:
        shared = [Pair(name, ours[key], theirs[key]) for key in ours if key in theirs]
        if not shared:
            raise ResultsError(_nothing_in_common(reference, name, studies, also, across))
        pairs += shared
        for of, missing in ((reference, ours.keys() - theirs.keys()), (name, theirs.keys() - ours.keys())):
            if missing:
                labels = [c.label for key, c in tables[of].items() if key in missing]
                notes.append(f"Only in {of}: {_some(labels)}.")
    return pairs, notes


def _telling_apart(study: StudySummary) -> set[str]:
    """Settings that identify no configuration, but tell apart configurations of this study that are else the same."""
    names = {column.name for column in schema.hyperparameters()} - {*NOT_AN_AXIS, *identifying()}
    found: set[str] = set()
    for alike in grouped(study.configurations, lambda c: tuple(identity(c.settings).items())).values():
        found |= {name for name in names if len({repr(c.settings[name]) for c in alike}) > 1}
    return found


def _by_identity(
    name: str, study: StudySummary, also: Sequence[str], across: Sequence[str]
) -> dict[tuple[Any, ...], Configuration]:
    table: dict[tuple[Any, ...], Configuration] = {}
    for c in study.configurations:
        if not c.is_measured:
            continue
        key = tuple(item for item in identity(c.settings, also=also).items() if item[0] not in across)
        same = table.setdefault(key, c)
        if across and same is not c and same.baseline is None and c.baseline is None:
            raise ResultsError(
                f"{name}: varies {text.listed(list(across))} itself ({same.label} and {c.label}), so that it is not "
                "clear which to compare. Compare across settings of which each study has one value"
            )
    return table


def _nothing_in_common(
    reference: str, name: str, studies: Mapping[str, StudySummary], also: Sequence[str], across: Sequence[str]
) -> str:
    """The nearest configurations, and in what they differ."""

    def identities(study: str) -> list[tuple[Configuration, Identity]]:
        measured = [c for c in studies[study].configurations if c.is_measured]
        return [(c, identity(c.settings, also=also)) for c in measured]

    nearest = min(
        (
            (one, other, {k: v for k, v in different(ours, theirs).items() if k not in across})
            for (one, ours), (other, theirs) in itertools.product(identities(reference), identities(name))
        ),
        key=lambda each: len(each[2]),
    )
    one, other, settings = nearest
    shown = text.listed([f"{k} ({text.setting(a)}, {text.setting(b)})" for k, (a, b) in settings.items()])
    apart = [k for k in settings if all(k in METRICS[metric].comparable_within for metric in COMPARED)]
    remedy = f"To compare across settings, name them: --across {' --across '.join([*across, *settings])}"
    if apart:
        remedy = f"No metric compares across {text.listed(apart)}"
    return (
        f"{reference} and {name}: have no configuration in common. The nearest, {one.label} and {other.label}, differ "
        f"in {shown}. {remedy}"
    )


def _some(labels: Sequence[str]) -> str:
    more = [f"{len(labels) - _SHOWN} more"] if len(labels) > _SHOWN + 1 else []
    return text.listed([*labels[: _SHOWN if more else None], *more])


def _length(studies: Mapping[str, StudySummary], pairs: Sequence[Pair]) -> int | None:
    """The completion length at which cfm_loss is compared: that of the reference's report if all have measured it."""
    common = set.intersection(*(set(study.lengths) for study in studies.values()))
    preferred = [study.length for study in studies.values() if study.length in common]
    return preferred[0] if preferred else max(common, default=None)


def _why_not(pair: Pair, metric: str, studies: Mapping[str, StudySummary], reference: str) -> str:
    """Why values of a metric do not compare; '' where they do."""
    maps = [dict(c.map_of(metric, at_one_length=True)) for c in (pair.reference, pair.other)]
    names = [name for name in maps[0] if maps[0][name] != maps[1].get(name)]
    if names:
        return f"they measure it by different {text.listed(names)}"
    ours, theirs = (fingerprints(studies[name].results.spec, "models") for name in (reference, pair.study))
    for model in (str(pair.reference.settings.get(key)) for key in _NETWORKS.get(metric, ())):
        if model in ours and model in theirs and ours[model] != theirs[model]:
            return f"{model} is another model in each (fingerprints {ours[model][:12]} and {theirs[model][:12]})"
    codes = [_code_of(metric, studies[name].results.spec) for name in (reference, pair.study)]
    return f"its code is another one in each ({' and '.join(codes)})" if codes[0] != codes[1] else ""


def _code_of(metric: str, spec: Mapping[str, Any]) -> str:
    """The plug-in that measured a metric in a study, with its fingerprint; '' for a metric of ours."""
    used = fingerprints(spec, "plugins")
    named = (f"{path} {used[path][:12]}" for path in used if name_of(path) == metric)
    return next(named, "") if METRICS[metric].plugin else ""


# --- differences -----------------------------------------------------------------------------------------------


def _differences(
    studies: Mapping[str, StudySummary], pairs: Sequence[Pair], length: int | None
) -> tuple[list[Difference], list[str]]:
    """Differences, with uncorrected p-values, and why metrics are left out."""
    reference, found, notes = next(iter(studies)), list[Difference](), dict[str, list[str]]()
    for study, metric in itertools.product(list(studies)[1:], next(iter(studies.values())).compared):
        if metric not in studies[study].compared:
            continue
        position = length if metric == "cfm_loss" else None
        if metric == "cfm_loss" and length is None:
            notes.setdefault("cfm_loss is not compared: the studies measured it at no common length", [])
            continue
        usable = []
        for pair in (pair for pair in pairs if pair.study == study):
            reason = _why_not(pair, metric, studies, reference)
            values = [c.final.get((metric, position), {}) for c in (pair.reference, pair.other)]
            if reason:
                notes.setdefault(f"{metric} is not compared with {study}: {reason}", []).append(pair.label)
            elif all(values):
                usable.append((pair, values[0], values[1]))
        found += _of_metric(study, metric, usable)
    return found, [f"{note} ({_some(labels)})." if labels else f"{note}." for note, labels in notes.items()]


def _of_metric(study: str, metric: str, usable: Sequence[tuple[Pair, BySeed, BySeed]]) -> Iterator[Difference]:
    for pair, ours, theirs in usable:
        same_trials = _same_trials(pair, ours, theirs)
        yield _difference(study, pair.label, metric, theirs, ours, _same_sequences(pair), same_trials=same_trials)
    maps = comparable([pair.reference for pair, *_ in usable], metric, at_one_length=True)
    if len(usable) > 1 and len(maps) == 1:
        ours, theirs = _average([ours for _, ours, _ in usable]), _average([theirs for *_, theirs in usable])
        if ours and theirs:
            same = all(_same_trials(*each) for each in usable)
            sequences = all(_same_sequences(pair) for pair, *_ in usable)
            average = _difference(study, "average", metric, theirs, ours, sequences, same_trials=same)
            yield dataclasses.replace(average, is_average=True)


def _average(values: Sequence[BySeed]) -> BySeed:
    """By seed, the mean over configurations, over the seeds that all of them have."""
    shared = set.intersection(*(set(by_seed) for by_seed in values))
    return {seed: mean_value([by_seed[seed] for by_seed in values]) for seed in sorted(shared)}


def _difference(
    study: str,
    label: str,
    metric: str,
    values: BySeed,
    reference: BySeed,
    same_sequences: bool,
    *,
    same_trials: bool,
) -> Difference:
    interval, shared = difference(values, reference, same_sequences=same_sequences), values.keys() & reference.keys()
    seeds = sorted(shared) if pairs_seeds(values, reference) else []
    is_equal = _equal(values, reference)
    ruling: Ruling = "cannot tell" if not is_equal else "same trials" if same_trials else "equal"
    return Difference(
        study=study,
        label=label,
        metric=metric,
        levels=(mean_interval(reference.values()), mean_interval(values.values())),
        interval=interval,
        by_seed=tuple(float(values[seed]) - float(reference[seed]) for seed in seeds),
        shared=_shared(interval, seeds, len(reference), len(values)),
        ruling=ruling,
        p_value=math.nan if ruling != "cannot tell" else interval.p_value,
    )


def _shared(interval: Interval, seeds: Sequence[int], ours: int, theirs: int) -> str:
    apart = f"{ours} and {theirs} seeds, not paired" if max(ours, theirs) > 1 else "one seed each"
    over_seeds = f"{len(seeds)} seeds, paired" if seeds else apart
    if not interval.n_sequences:
        return over_seeds
    paired = "" if interval.sequence_degrees is None else " in all, not paired"
    return f"{over_seeds}; {interval.n_sequences} sequences{paired}"


def _equal(values: BySeed, reference: BySeed) -> bool:
    """Whether all that is compared is equal to the last digit: the seeds that both have."""
    shared = values.keys() & reference.keys()
    if not shared or not (pairs_seeds(values, reference) or values.keys() == reference.keys()):
        return False
    return all(_is_one(values[seed], reference[seed]) for seed in shared)


def _is_one(value: float, other: float) -> bool:
    if isinstance(value, Score) and isinstance(other, Score) and not np.array_equal(value.values, other.values):
        return False
    return float(value) == float(other)


def _same_sequences(pair: Pair) -> bool:
    """Whether both were measured on the same held-out sequences, by their settings."""
    one, other = pair.reference.settings, pair.other.settings
    return all(one.get(name) == other.get(name) for name in _OF_SEQUENCES)


def _same_trials(pair: Pair, ours: BySeed, theirs: BySeed) -> bool:
    """Whether both hold the very same trials, if their values are equal: one machine started them at one moment."""
    starts = [_starts(c) for c in (pair.reference, pair.other)]
    return all(starts[0].get(seed) == starts[1].get(seed) is not None for seed in ours.keys() & theirs.keys())


def _starts(configuration: Configuration) -> dict[int, tuple[Any, ...]]:
    done = configuration.finished.dropna(subset=["seed", "started_at"])
    rows = zip(done["seed"], done["started_at"], done["finished_at"], done["host"], strict=True)
    return {int(seed): tuple(map(str, rest)) for seed, *rest in rows}


def _judged(differences: Sequence[Difference]) -> tuple[Difference, ...]:
    """The differences with Holm's correction, and what follows from it."""
    adjusted = holm([each.p_value for each in differences])
    return tuple(
        dataclasses.replace(each, p_value=p, ruling=_ruling(each, p))
        for each, p in zip(differences, adjusted, strict=True)
    )


def _ruling(each: Difference, p: float) -> Ruling:
    if each.ruling != "cannot tell" or math.isnan(p) or p >= 1 - CONFIDENCE:
        return each.ruling
    return "lower" if each.interval.mean < 0 else "higher"
