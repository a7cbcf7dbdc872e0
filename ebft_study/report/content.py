"""Texts and tables of the report's page, as plain rows: the template only arranges them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from ebft_study import text
from ebft_study.analysis.downstream import BenchmarkScores, benchmark_scores
from ebft_study.analysis.elimination import RACE_EVENT
from ebft_study.analysis.equal_cost import AMOUNTS, difference
from ebft_study.analysis.importance import obstacle, varied_groups
from ebft_study.analysis.precision import precision as precision_of
from ebft_study.analysis.selection import comparable, ranked
from ebft_study.analysis.settings import assignments
from ebft_study.analysis.statistics import Interval, Score, bootstrap, is_paired, mean_interval
from ebft_study.analysis.summary import Configuration, StudySummary, best
from ebft_study.analysis.usage import PLAN_EVENT, REDONE_EVENT
from ebft_study.results import SKIPPED
from ebft_study.results.lineage import EXPLOIT, lineage
from ebft_study.results.metrics import COST

ROUTINE_EVENTS = (
    *("session", "started", "resumed", "finished", "evaluated", "features", "cache", "promoted"),
    *(PLAN_EVENT, EXPLOIT, RACE_EVENT, REDONE_EVENT),
)
"""Kinds of events that are no news: they are among the details of their trial, or in a section of their own."""
MAX_INCIDENTS = 30
MAX_CONFIGURATIONS = 100
"""Configurations on the axes in the tables of a page; nobody reads more, and `ebft_study.tables` has all."""
MAX_UNFINISHED = 100


class _Names(dict[str, str]):
    """Names to display; a metric of the user has its own name."""

    def __missing__(self, metric: str) -> str:
        return metric


NAMES = _Names(ce_loss="CE", ce_answer_loss="Answer CE", cfm_loss="CFM", judge_cfm_loss="Judge CFM")


def overview(study: StudySummary) -> str:
    """One line: how much of the study is done."""
    statuses = study.results.trials["status"].value_counts()
    skipped = int(statuses.get(SKIPPED, 0))
    total, finished = int(statuses.sum()) - skipped, int(statuses.get("finished", 0))
    others = [f"{count} {status}" for status, count in statuses.items() if status not in ("finished", SKIPPED)]
    others += [f"{skipped} more not needed"] * (skipped > 0)
    seeds, at_most = study.results.trials["seed"].nunique(), "up to " * (skipped > 0)
    line = f"{finished} of {total} trials finished" + (f" ({', '.join(others)})" if others else "")
    return f"{line} · {len(study.configurations)} configurations × {at_most}{seeds} seed{'s' * (seeds != 1)}"


Rivals = Mapping[str, Mapping[str, Configuration | None]]
"""Metric -> name of a configuration -> the one that it is compared with; None without one."""

# --- configurations --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConfigurationRow:
    """A line of the configurations table: held-out means, and differences to the base model and to SFT, by metric.

    `since_start` has differences to the end of the warm start; empty without one.
    `to_sft_at` has differences to SFT at equal cost, by the amount that is equal, on the validation split.
    `validation` is the mean of the objective on the validation split, by which the lines are ordered.
    """

    label: str
    seeds: str
    validation: str
    levels: dict[str, str]
    to_base: dict[str, str]
    since_start: dict[str, str]
    to_sft: dict[str, str]
    to_sft_at: dict[str, dict[str, str]]
    is_best: bool


def listed(study: StudySummary, limit: int | None = None) -> list[Configuration]:
    """The configurations on the axes from the best to the worst, at most `limit`, and the baselines.

    The order is that of the objective on the validation split, with incomplete configurations after complete ones.
    """
    unmeasured = [c for c in study.on_axes if not c.is_measured]
    baselines = [c for c in study.configurations if c.baseline is not None]
    return [*[*ranked(study.on_axes), *unmeasured][:limit], *baselines]


def omitted(study: StudySummary) -> str:
    """A sentence on what the tables of a page leave out; empty where they have all."""
    number = len(study.on_axes)
    if number <= MAX_CONFIGURATIONS:
        return ""
    return (
        f"Of {text.count(number)} configurations, tables list the {MAX_CONFIGURATIONS} best by validation "
        f"{study.objective[0]}, and the baselines; ebft_study.tables({study.results.folder.name!r}) has all."
    )


def configuration_rows(study: StudySummary, limit: int | None = None) -> list[ConfigurationRow]:
    """The base models, and the configurations as `listed`.

    "Best" is EBFT's best, within each feature map where the objective compares no further; one alone is no best.
    """
    groups = comparable(study.ebft, study.objective[0])
    winners = {c.name for group in groups if len(group) > 1 or len(groups) == 1 if (c := best(group))}
    rivals = _rivals(study)
    lines = [_configuration_row(study, c, rivals, c.name in winners) for c in listed(study, limit)]
    return [*_base_rows(study), *lines]


def _base_rows(study: StudySummary) -> list[ConfigurationRow]:
    """One line for each base model and feature map: their values are not averaged."""
    groups = study.of_one_base("cfm_loss") or [[]]
    nothing, rows = dict.fromkeys(study.compared, text.NOTHING), []
    at = dict.fromkeys(AMOUNTS, nothing)
    for group in groups:
        part = replace(study, configurations=tuple(group))
        label = f"base model, {study.map_label(group[0].base_of('cfm_loss'))}" if len(groups) > 1 else "base model"
        levels = {metric: text.number(part.base(metric)) for metric in (*study.compared, "ce_answer_loss")}
        rows.append(
            ConfigurationRow(label, text.NOTHING, text.NOTHING, levels, nothing, nothing, nothing, at, is_best=False)
        )
    return rows


def _configuration_row(study: StudySummary, c: Configuration, best_sft: Rivals, is_best: bool) -> ConfigurationRow:
    incomplete = " (incomplete)" if c.n_finished and not c.is_complete else ""
    incomplete = " (not promoted)" if c.is_left_out else incomplete
    compared = study.compared
    rivals = {metric: sft for metric in compared if (sft := best_sft[metric].get(c.name)) is not c}
    return ConfigurationRow(
        c.label,
        f"{len(c.finished_seeds)} of {c.n_seeds}{incomplete}",
        text.number(c.validated()),
        {metric: c.level(metric).as_level() for metric in (*compared, "ce_answer_loss")},
        {metric: c.change(metric).as_difference() for metric in compared},
        {m: c.since_start(m).as_difference() if c.warm_start_steps else text.NOTHING for m in compared},
        {m: c.versus(sft, m).as_difference() if (sft := rivals.get(m)) else text.NOTHING for m in compared},
        {amount: _to_sft_at(study, c, rivals, amount) for amount in AMOUNTS},
        is_best,
    )


def _to_sft_at(
    study: StudySummary, c: Configuration, rivals: Mapping[str, Configuration | None], amount: str
) -> dict[str, str]:
    """Differences to SFT at equal cost, by metric."""
    rows = study.validation_rows
    return {
        metric: difference(c, sft, rows, metric, amount).as_difference()
        if (sft := rivals.get(metric))
        else text.NOTHING
        for metric in study.compared
    }


def _rivals(study: StudySummary) -> Rivals:
    """The best SFT configuration by a metric of the same base model and, for CFM, the same feature map."""
    rivals: dict[str, dict[str, Configuration | None]] = {metric: {} for metric in study.compared}
    for metric, of_metric in rivals.items():
        for group in study.of_one_base(metric):
            of_metric |= dict.fromkeys((c.name for c in group), best([c for c in group if c.is_sft], metric))
    return rivals


def precision(study: StudySummary) -> str:
    """How sure one model's value is, the difference of two, and which difference this study could see."""
    seeds = study.results.trials["seed"].nunique()
    return " ".join(_precision(study, metric, seeds) for metric in study.compared).strip()


def _precision(study: StudySummary, metric: str, seeds: int) -> str:
    measured = precision_of(study.configurations, metric)
    if measured is None:
        return ""
    errors = (measured.level_error, measured.difference_error, math.sqrt(2) * measured.level_error)
    level, difference, apart = map(text.number, errors)
    at = f" at {study.length} tokens" if metric == "cfm_loss" else ""
    shown = (
        f"{NAMES.get(metric, metric)}{at}, on {measured.n_sequences} sequences: one model's value has a standard error "
        f"of {level}, the difference of two {difference}; on sequences of their own it would have {apart}."
    )
    visible = measured.detectable(seeds=seeds)
    if math.isnan(visible):
        return shown
    return f"{shown} Differences of configurations above {text.number(visible)} are seen in 80 of 100 such studies."


@dataclass(frozen=True)
class EvidenceRow:
    """A difference to the best SFT configuration, or to the base model without one, by three kinds of interval."""

    label: str
    metric: str
    difference: str
    """Over seeds and sequences, as in all tables and claims."""
    over_seeds: str
    bootstrap: str


def evidence_rows(study: StudySummary, limit: int | None = None) -> list[EvidenceRow]:
    """The differences of which values of single sequences are known; empty for older studies."""
    rows, rivals = [], _rivals(study)
    chosen = {c.name for c in listed(study, limit)}
    for c, metric in itertools.product((c for c in study.configurations if c.name in chosen), study.compared):
        sft = rivals[metric].get(c.name)
        if sft is c:
            continue
        values = c.final.get((metric, None), {})
        reference = (sft.final if sft else c.base).get((metric, None), {})
        differences = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
        scores = [d for d in differences if isinstance(d, Score)]
        if len(scores) > 1 and is_paired(differences):
            low, high = bootstrap(scores)
            both, alone = mean_interval(scores), mean_interval(map(float, scores))
            name = f"{NAMES.get(metric, metric)} − {'SFT' if sft else 'base'}"
            bounds = f"{text.signed(low)} to {text.signed(high)}"
            rows.append(EvidenceRow(c.label, name, both.as_difference(), alone.as_difference(), bounds))
    return rows


# --- benchmarks ------------------------------------------------------------------------------------------------

SCORE_NAMES = {
    "greedy_pass_rate": "Greedy",
    "pass_at_k": "pass@{k}",
    "greedy_bleu": "BLEU, greedy",
    "best_of_k_bleu": "BLEU, best of {k}",
    "corpus_bleu": "Corpus BLEU",
    "greedy_comet": "COMET, greedy",
    "best_of_k_comet": "COMET, best of {k}",
    "unparsed_answers": "Unparsed",
    "unjudged_answers": "Not judged",
    "distinct_answers": "Distinct",
}


@dataclass(frozen=True)
class BenchmarkTable:
    """Scores on one benchmark, as text."""

    name: str
    contamination: str
    columns: list[str]
    rows: list[tuple[str, str, list[str]]]
    """Label, seeds, and a score per column."""


def benchmark_tables(study: StudySummary) -> list[BenchmarkTable]:
    """A table per benchmark; none for a study without any."""
    return [_benchmark_table(scores) for scores in benchmark_scores(study)]


def _benchmark_table(scores: BenchmarkScores) -> BenchmarkTable:
    names = [SCORE_NAMES.get(metric, metric).format(k=k) for metric, k in scores.columns]
    chosen = [f", best by COMET of {k}" if metric == "corpus_bleu" and k else "" for metric, k in scores.columns]
    rows = [
        (label, text.count(n) if n else text.NOTHING, [_level(of_one.get(key)) for key in scores.columns])
        for label, n, of_one in scores.rows
    ]
    return BenchmarkTable(
        scores.name, _contamination(scores), [a + b for a, b in zip(names, chosen, strict=True)], rows
    )


def _level(interval: Interval | None) -> str:
    return text.NOTHING if interval is None else interval.as_level()


def _contamination(scores: BenchmarkScores) -> str:
    if scores.contaminated is None:
        return "Whether the training data contain its problems was not measured."
    low, high = (f"{100 * fraction:.1f}" for fraction in scores.contaminated)
    amount = f"{low} %" if low == high else f"{low} to {high} %, by data set,"
    return (
        f"The training data repeat the text of {amount} of its problems (13 words in a row, or a shorter text whole)."
    )


# --- trials and events -----------------------------------------------------------------------------------------


def trial_rows(study: StudySummary, limit: int | None = None) -> list[dict[str, str]]:
    """One line per trial of the configurations as `listed`: state, settings that vary, held-out values."""
    chosen = {c.name for c in listed(study, limit)}
    return _trial_rows(study, [c for c in study.configurations if c.name in chosen])


def unfinished_rows(study: StudySummary) -> list[dict[str, str]]:
    """The same of all trials that did not finish."""
    rows = _trial_rows(study, [c for c in study.configurations if c.n_finished < len(c.trials)])
    return [row for row in rows if row["status"] != "finished"]


def _trial_rows(study: StudySummary, configurations: Sequence[Configuration]) -> list[dict[str, str]]:
    return [
        {
            "trial": row["trial_id"],
            "status": row["status"],
            "configuration": c.label,
            **{name: text.NOTHING if c.baseline else text.setting(c.settings[name]) for name in study.varying},
            "seed": text.count(row["seed"]),
            "steps": text.count(row["steps_done"]),
            "ce": text.number(_of_seed(c, "ce_loss", row)),
            "cfm": text.number(_of_seed(c, "cfm_loss", row)),
            "time": text.duration(row["total_seconds"]),
            "reason": "; ".join(str(row[key]) for key in ("stop_reason", "error") if not text.is_missing(row[key])),
        }
        for c in configurations
        for row in c.trials[_OF_TRIAL].sort_values("seed").to_dict("records")
    ]


_OF_TRIAL = ["trial_id", "status", "seed", "steps_done", "total_seconds", "stop_reason", "error"]


def cost_rows(study: StudySummary, limit: int | None = None) -> list[dict[str, str]]:
    """One line per trial of the configurations as `listed` that recorded its cost."""
    columns: dict[str, Callable[[Any], str]] = {
        name: text.power for name in COST if name.endswith("_flops") or name == "flops"
    }
    columns |= {
        **dict.fromkeys(("parameters", "trainable_parameters", "feature_parameters"), text.count),
        **dict.fromkeys(("tokens_seen", "sampled_tokens"), text.count),
        **dict.fromkeys(("update_seconds", "cpu_seconds", "gpu_seconds"), text.duration),
        "energy_joules": text.count,
    }
    trials = pd.concat([c.trials for c in listed(study, limit)] or [study.results.trials])
    return [
        {"trial": row["trial_id"], **{name: show(row[name]) for name, show in columns.items()}}
        for row in trials[["trial_id", *columns]].sort_values("trial_id").to_dict("records")
        if not text.is_missing(row["flops"])
    ]


def _of_seed(configuration: Configuration, metric: str, row: Mapping[Any, Any]) -> float | None:
    if row["status"] != "finished" or text.is_missing(row["seed"]):
        return None
    return configuration.final.get((metric, None), {}).get(int(row["seed"]))


def incidents(study: StudySummary) -> list[dict[str, str]]:
    """Events out of the ordinary, the last ones first."""
    events = study.results.events
    unusual = events[~events["kind"].isin(ROUTINE_EVENTS)].sort_values("time", ascending=False)
    return [
        {
            "time": row["time"].strftime("%Y-%m-%d %H:%M:%S"),
            "trial": text.NOTHING if text.is_missing(row["trial_id"]) else row["trial_id"],
            "kind": row["kind"],
            "message": row["message"],
        }
        for row in unusual.head(MAX_INCIDENTS).to_dict("records")
    ]


def lineage_rows(study: StudySummary) -> list[dict[str, str]]:
    """A line per exploit of population-based training, in order of time; empty for a study without any."""
    return [
        {
            "trial": row["trial_id"],
            "step": text.count(row["step"]),
            "donor": row["donor"],
            "donor_step": text.count(row["donor_step"]),
            "score": text.number(row["score"]),
            "donor_score": text.number(row["donor_score"]),
            "before": assignments(row["before"], list(row["before"])),
            "after": assignments(row["after"], list(row["after"])),
        }
        for row in lineage(study.results).to_dict("records")
    ]


def race_rows(study: StudySummary) -> list[dict[str, str]]:
    """A line for each configuration and comparison of a race, in order of steps; empty for a study without one."""
    events = study.results.events
    decisions = [json.loads(details) for details in events.loc[events["kind"] == RACE_EVENT, "details"]]
    return [
        {
            "step": text.count(decision["step"]),
            "configuration": each["configuration"],
            "best": each["best"],
            "difference": f"{text.signed(each['difference'])} ± {text.number(each['half_width'])}",
            "over": f"{each['n_seeds']} seeds" + (f", {each['n_sequences']} sequences" if each["n_sequences"] else ""),
            "verdict": "stopped" if each["configuration"] in decision["stopped"] else "continues",
        }
        for decision in sorted(decisions, key=lambda decision: int(decision["step"]))
        for each in decision["comparisons"]
    ]


# --- limits ----------------------------------------------------------------------------------------------------


def missing(study: StudySummary, drawn: Sequence[str]) -> list[str]:
    """Sentences on parts that the report lacks, and on the limits of its numbers; `drawn` are names of figures."""
    notes = []
    statuses = study.results.trials["status"]
    if not len(statuses):
        notes.append("No trial has been recorded yet.")
    elif not (statuses == "finished").any():
        notes.append("No trial has finished, so there are no held-out comparisons.")
    if study.results.trials["seed"].nunique() == 1:
        notes.append("One seed only: there are no intervals, and no claim can be judged.")
    if len(statuses) and not study.sft:
        notes.append("No SFT trial: differences to SFT are empty.")
    if any(c.warm_start_steps for c in study.configurations):
        notes.append(
            "Differences to the base model, in the tables and figures too, include the warm start. What a method did "
            "after it is the difference to its end."
        )
    left_out = sum(c.is_left_out for c in study.configurations)
    if left_out:
        deciding = sorted({seed for c in study.configurations for seed in c.promoted_by})
        notes.append(
            f"{left_out} configurations were not promoted to all seeds: ranked after those that were, and in no claim. "
            f"The others were chosen by seeds {text.listed(list(map(str, deciding)))}, so their intervals in tables "
            "and figures are too favourable; claims are scored on the other seeds."
        )
    incomplete = [c.label for c in study.configurations if c.n_finished and not c.is_complete and not c.is_left_out]
    if incomplete:
        notes.append(
            f"Not all seeds have finished for {text.listed(incomplete)}: ranked after the configurations that have all."
        )
    if study.not_comparable:
        names = text.listed([text.named(name) for name in study.not_comparable])
        judge = " The CFM of the judge compares them all." if "judge_cfm_loss" in study.compared else ""
        notes.append(
            f"The study varies {names}, which changes what CFM measures: compare each configuration's CFM with its "
            "own base model, not with other configurations. Ranks, the best configuration and claims on CFM are within "
            f"each feature map.{judge}"
        )
    if study.validated_at_other_lengths:
        names = text.listed([text.named(name) for name in study.validated_at_other_lengths])
        notes.append(
            f"The study varies {names}, and each trial measures validation CFM at its own length: configurations "
            "are chosen by it among those of one length only. The held-out CFM is at one length."
        )
    if len(statuses) and study.results.metrics["flops"].isna().all():
        notes.append(
            "The trials did not record their cost, as those of version 0.1 do not: there is no comparison at equal "
            "FLOPs or at equal time, no cost per trial, and no curve over cost."
        )
    notes += [note for name, note in NOT_DRAWN.items() if name not in drawn]
    notes += _untold_importance(study)
    return [*notes, *(f"Could not be read, left out: {problem}" for problem in study.results.problems)]


def _untold_importance(study: StudySummary) -> list[str]:
    """The reasons why the importance of settings cannot be told, in a study of several."""
    groups = varied_groups(study)
    reasons = [reason for group in groups if (reason := obstacle(study, group))]
    where = f" in {len(reasons)} of {len(groups)} groups of configurations that can be compared" * (len(groups) > 1)
    each = "; ".join(dict.fromkeys(reasons))
    return [f"Which settings matter most cannot be told{where}: {each}."] if reasons else []


NOT_DRAWN = {
    "learning_curves": "No learning curves: no trial has reported metrics.",
    "cfm_over_length": "No CFM over completion length: no held-out evaluation at two lengths or more.",
    "entropy": "No entropy by position: no held-out evaluation recorded it.",
}
