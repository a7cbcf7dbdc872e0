"""The trials of a study in groups of those that cost the same."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from ebft_study.cost import StepShape
from ebft_study.study.forecast.benchmarks import benchmark_evaluations, benchmark_settings
from ebft_study.study.forecast.throughput import Work, flops
from ebft_study.study.resolving.resolved import ResolvedStudy
from ebft_study.study.spec import promotion
from ebft_study.study.spec.trials import Trial

TO_CHOOSE = "chosen by the search (at most)"


@dataclass(frozen=True)
class TrialGroup:
    """Trials that cost the same."""

    label: str
    """The first configuration of the group."""
    example: Trial
    number: int
    trial_ids: tuple[str, ...]
    """Empty for trials that a search has yet to choose."""
    work: Work


def trial_groups(study: ResolvedStudy) -> list[TrialGroup]:
    """Groups by their first trials; trials that a search has yet to choose count as the most expensive corner.

    Of rivals that are promoted to more seeds, the most expensive ones count as the best.
    """
    members: dict[Any, list[Trial]] = {}
    for trial in study.trials:
        members.setdefault(_cost_key(trial), []).append(trial)
    skipped = _skipped(study)
    groups = [
        _group(
            group[0].configuration.label,
            group[0],
            sum((trial.configuration.label, trial.seed) not in skipped for trial in group),
            tuple(trial.trial_id for trial in group),
        )
        for group in members.values()
    ]
    to_choose = study.n_trials - len(study.trials) + len(skipped)
    if to_choose:
        most_expensive = max(study.examples, key=lambda trial: flops(trial.run))
        groups.append(_group(TO_CHOOSE, most_expensive, to_choose, ()))
    return groups


def _skipped(study: ResolvedStudy) -> set[tuple[str, int]]:
    """Configurations and seeds that do not run if the most expensive configurations are promoted."""
    seeds, skipped = study.spec.seeds, set[tuple[str, int]]()
    if not seeds.promotes:
        return skipped
    for group in study.rivals:
        ordered = sorted(group, key=lambda trial: -flops(trial.run))
        sizes = promotion.numbers(len(group), seeds)
        for (before, after), size in zip(itertools.pairwise(seeds.levels), sizes[1:], strict=True):
            skipped |= {(trial.configuration.label, s) for trial in ordered[size:] for s in range(before, after)}
    return skipped


def _group(label: str, example: Trial, number: int, trial_ids: tuple[str, ...]) -> TrialGroup:
    return TrialGroup(label, example, number, trial_ids, Work.from_trial(example))


def _cost_key(trial: Trial) -> tuple[Any, ...]:
    """All that the cost of a trial depends on."""
    run, resources = trial.run, trial.resources
    workers = (resources.processes, resources.cpus_per_worker, resources.gpus_per_worker)
    length = (run.training.steps, run.training.warm_start_steps, run.evaluation.eval_every_steps)
    benchmarks = (benchmark_evaluations(run), benchmark_settings(run))
    network = (run.model, run.features.feature_network, run.lora, run.training.memory_budget_gib)
    return (workers, length, network, benchmarks, StepShape.from_config(run))
