"""The trials of a study, counted by what one of them costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ebft_study.config import RunConfig
from ebft_study.cost import StepShape
from ebft_study.study.forecast import throughput
from ebft_study.study.forecast.throughput import Work
from ebft_study.study.resolving import checks
from ebft_study.study.spec import trials
from ebft_study.study.spec.study_spec import ResourcesSpec, StudySpec

CHOSEN = "chosen by the search (at most)"


@dataclass(frozen=True)
class Kind:
    """Trials that cost the same."""

    label: str
    """Of the first configuration."""
    run: RunConfig
    number: int
    trial_ids: tuple[str, ...]
    """None of trials that a search has yet to choose."""
    work: Work
    resources: ResourcesSpec
    """Of one of them."""


def kinds(spec: StudySpec) -> list[Kind]:
    """In the order of their first trials; trials that a search has yet to choose count as the dearest corner."""
    alike: dict[Any, list[trials.Trial]] = {}
    for trial in trials.listed(spec):
        alike.setdefault(_cost_key(spec, trial.run), []).append(trial)
    found = [
        _kind(spec, of[0].configuration.label, of[0].run, len(of), tuple(trial.trial_id for trial in of))
        for of in alike.values()
    ]
    to_choose = trials.number_of_trials(spec) - sum(kind.number for kind in found)
    if to_choose:
        dearest = max(checks.check(spec, spec.study), key=throughput.flops)
        found.append(_kind(spec, CHOSEN, dearest, to_choose, ()))
    return found


def wall_seconds(numbers_and_seconds: Iterable[tuple[int, float]], concurrency: int) -> float:
    """From the first start to the last end: full places all the time, and never less than the longest trial."""
    given = list(numbers_and_seconds)
    longest = max((seconds for _, seconds in given), default=0.0)
    return max(sum(number * seconds for number, seconds in given) / concurrency, longest)


def _kind(spec: StudySpec, label: str, run: RunConfig, number: int, trial_ids: tuple[str, ...]) -> Kind:
    own = spec.resources.for_run(run)
    return Kind(label, run, number, trial_ids, Work.from_run(run, own.workers_per_trial), own)


def _cost_key(spec: StudySpec, run: RunConfig) -> tuple[Any, ...]:
    """What trials of one cost have in common."""
    shape = StepShape.from_config(run)
    length = (run.training.steps, run.training.warm_start_steps, run.evaluation.eval_every_steps)
    own = spec.resources.for_run(run)
    places = (own.processes, own.cpus_per_worker, own.gpus_per_worker)
    return (places, run.model, run.features.feature_network, run.lora, shape, *length, run.training.memory_budget_gib)
