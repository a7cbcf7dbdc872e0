"""What a study must satisfy before anything runs; each broken rule is one line for people."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ebft_study import config
from ebft_study.config import RunConfig
from ebft_study.errors import ConfigError, rule_broken
from ebft_study.results import METRICS
from ebft_study.study.cluster.capacity import ClusterCapacity, this_machine
from ebft_study.study.cluster.requests import concurrent_trials, resource_requests, shared_gpus, wants_gpus
from ebft_study.study.resolving import population_rules
from ebft_study.study.spec import enumeration, trials
from ebft_study.study.spec.study_spec import ObjectiveSpec, StudySpec, key_matches
from ebft_study.study.spec.trials import Configuration

OBJECTIVES = ("cfm_loss", "ce_loss", "ce_answer_loss", "perplexity", "reward")
_MOST_CORNERS = 256


def check(spec: StudySpec, source: str) -> list[RunConfig]:
    """Refuse a study that cannot run as a whole; returns the run of each configuration checked, at the first seed."""
    _check_search(spec, source)
    check_objective(spec, source)
    check_compared(spec, source)
    checked, members = [], []
    for configuration in _to_check(spec):
        run = trials.build(spec, configuration, seed=spec.seeds[0], source=source)
        _check_size(spec, run, source)
        _check_services(spec, run, source)
        if configuration.baseline is None:
            _check_reports(spec, run, source)
            members.append(run)
        checked.append(run)
    population_rules.check(spec, members, source)
    check_resources_by(spec, checked, source)
    return checked


def _to_check(spec: StudySpec) -> Iterator[Configuration]:
    """Everything a grid or random search runs; for Optuna, baselines and the corners of the space."""
    yield from trials.enumerated(spec)
    if spec.search.algorithm == "optuna":
        for assignment in enumeration.corners(spec, _MOST_CORNERS):
            yield trials.on_axes(spec, assignment)


def _check_search(spec: StudySpec, source: str) -> None:
    search, number = spec.search, spec.search.num_configurations or 0
    for path, axis in spec.axes.items():
        if search.algorithm == "grid" and axis.finite is None:
            raise rule_broken(
                source=source,
                key=f"axes.{config.short_name(path)}",
                given=axis.distribution,
                rule="a grid needs a list of values or steps, not a continuous range",
                remedy="List the values, give the range a step, or use search.algorithm: random or optuna",
            )
    if search.algorithm != "grid" and not spec.axes:
        raise ConfigError(f"{source}: axes: a {search.algorithm} search has nothing to choose. Name at least one axis")
    if enumeration.is_empty(spec):
        raise ConfigError(f"{source}: exclude: leaves no configuration to run. Exclude less")
    there = enumeration.number_of_choices(spec) if search.algorithm == "random" else number
    if number > there:
        raise rule_broken(
            source=source,
            key="search.num_configurations",
            given=number,
            rule=f"the axes hold only {there:.0f} different configurations",
            remedy="Use algorithm: grid to run them all, or fewer",
        )


def check_objective(spec: StudySpec, source: str) -> None:
    """Each objective must be a metric that trials report, and its mode the better side of it."""
    metrics = [objective.metric for objective in spec.objective.all]
    for objective in spec.objective.all:
        _check_metric(objective, source)
        if metrics.count(objective.metric) > 1:
            rule, given = "is listed twice", objective.metric
            raise rule_broken(source=source, key="objective", given=given, rule=rule, remedy="List each metric once")
    if spec.search.algorithm == "optuna" and spec.search.sampler == "nsga2" and len(metrics) == 1:
        rule = "evolution by ranks of a Pareto front has one objective only"
        remedy = "List several objectives, or use sampler: tpe"
        raise rule_broken(source=source, key="search.sampler", given="nsga2", rule=rule, remedy=remedy)
    number, size = spec.search.num_configurations or 0, spec.search.population_size
    if spec.search.algorithm == "optuna" and spec.search.sampler == "nsga2" and number <= size:
        rule = f"the first generation is drawn at random, and {number} configurations hold no other"
        remedy = f"Use a smaller population_size, or num_configurations > {size}"
        raise rule_broken(source=source, key="search.population_size", given=size, rule=rule, remedy=remedy)


def _check_metric(objective: ObjectiveSpec, source: str) -> None:
    metric, mode = objective.metric, objective.mode
    if metric not in OBJECTIVES:
        close = difflib.get_close_matches(metric, OBJECTIVES, n=1, cutoff=0.5)
        nearest = f" Did you mean {close[0]!r}?" if close else ""
        raise rule_broken(
            source=source,
            key="objective.metric",
            given=metric,
            rule=f"no trial reports this metric at evaluations.{nearest} Reported are {', '.join(OBJECTIVES)}",
            remedy="Use one of them",
        )
    better = METRICS[metric].direction
    if better != mode:
        rule, remedy = f"the better {metric} is the {better}imum", f"Use mode: {better}"
        raise rule_broken(source=source, key="objective.mode", given=mode, rule=rule, remedy=remedy)


def _check_size(spec: StudySpec, run: RunConfig, source: str) -> None:
    workers, batch = spec.resources.for_run(run).processes, run.training.batch_size
    if batch % workers:
        raise rule_broken(
            source=source,
            key="training.batch_size",
            given=batch,
            rule=f"each of {workers} workers takes an equal part of the batch",
            remedy="Use a multiple of resources.workers_per_trial",
        )
    check_scheduler(spec, run, source)


def check_scheduler(spec: StudySpec, run: RunConfig, source: str) -> None:
    """A scheduler must be able to stop a trial of `run`'s length; `perturbation.check` has the rules of pbt."""
    scheduler, steps = spec.scheduler, run.total_steps
    if scheduler.kind in ("none", "pbt"):
        return
    if scheduler.grace_period_steps >= steps:
        raise rule_broken(
            source=source,
            key="scheduler.grace_period_steps",
            given=scheduler.grace_period_steps,
            rule=f"a trial has only {steps} steps, so none could be stopped early",
            remedy="Use a shorter grace period, or kind: none",
        )
    first_rung = scheduler.grace_period_steps * scheduler.reduction_factor ** (scheduler.brackets - 1)
    if scheduler.kind == "asha" and first_rung >= steps:
        raise rule_broken(
            source=source,
            key="scheduler.brackets",
            given=scheduler.brackets,
            rule=f"the first rung of the last bracket is at step {first_rung}, and a trial has only {steps} steps",
            remedy="Use fewer brackets, or a shorter grace period",
        )


def check_compared(spec: StudySpec, source: str) -> None:
    """A trial must have enough others to be compared with."""
    if spec.scheduler.kind != "median":
        return
    compared = trials.number_of_trials(spec) - len(spec.seeds) * len(spec.baselines)
    if spec.scheduler.min_samples_required >= compared:
        raise rule_broken(
            source=source,
            key="scheduler.min_samples_required",
            given=spec.scheduler.min_samples_required,
            rule=f"the study has {compared} trials on its axes, so none would ever be stopped",
            remedy=f"Use at most {max(compared - 1, 1)}, or kind: none",
        )


def _check_services(spec: StudySpec, run: RunConfig, source: str) -> None:
    """What runs beside the trials must be installed, and have a place."""
    resources = spec.resources.for_run(run)
    if run.uses_engine and importlib.util.find_spec("vllm") is None:
        raise rule_broken(
            source=source,
            key="rollout.backend",
            given="vllm",
            rule="vLLM is not installed here",
            remedy="Install it (GPU: pip install 'ebft-study[vllm]'; CPU: make setup), or use backend: strided",
        )
    if run.features.backend == "service" and resources.gpus_per_worker and not resources.feature_gpus:
        raise rule_broken(
            source=source,
            key="resources.feature_gpus",
            given=0,
            rule="trials are on GPUs, so their feature service needs one, or a part of one",
            remedy="Use feature_gpus: 1 (or 0.5), or features.backend: local",
        )


def _check_reports(spec: StudySpec, run: RunConfig, source: str) -> None:
    """The objective must be something that this configuration measures."""
    for objective in spec.objective.all:
        _check_reported(objective.metric, run, source)


def _check_reported(metric: str, run: RunConfig, source: str) -> None:
    if metric == "ce_answer_loss" and _is_raw_text(run):
        rule, remedy = f"data set {run.data.dataset!r} is raw text without answers, so no trial reports it", "ce_loss"
    elif metric == "reward" and run.method != "ebft":
        rule, remedy = f"method={run.method} has no reward, so such a trial does not report it", "cfm_loss"
    else:
        return
    raise rule_broken(source=source, key="objective.metric", given=metric, rule=rule, remedy=f"Use metric: {remedy}")


def _is_raw_text(run: RunConfig) -> bool:
    return run.data.dataset in ("stdlib", "unstructured") or run.data.text_column is not None


def check_machine(spec: StudySpec, runs: Sequence[RunConfig], capacity: ClusterCapacity | None = None) -> None:
    """Refuse a study of which some trial does not even fit alone on these machines, by default on this one."""
    capacity = capacity or this_machine(gpus=wants_gpus(spec.resources))
    shared = shared_gpus(spec.resources, runs)
    left = capacity.without_gpus(shared)
    for need, run in resource_requests(spec.resources, runs).items():
        if need.fit(left):
            continue
        own = spec.resources.for_run(run) if run else spec.resources
        cpus = need.processes * need.cpus
        key = "cpus_per_worker" if replace(need, gpus=0.0, engine_gpus=0.0).fit(capacity) == 0 else "gpus_per_worker"
        needed, there, what = (
            (cpus, capacity.cpus, "CPU cores")
            if key == "cpus_per_worker"
            else (need.all_gpus + shared, capacity.gpus, "GPUs")
        )
        of_services = needed - need.processes * need.gpus if what == "GPUs" else 0
        services = f" (of which {of_services:g} for services)" if of_services else ""
        spread = f", on {len(capacity.nodes)} machines" if len(capacity.nodes) > 1 else ""
        raise rule_broken(
            source=spec.study,
            key=f"resources.{key}",
            given=getattr(own, key),
            rule=f"a trial of {own.processes} worker(s) needs {needed:g} {what}{services}; here are {there:g}{spread}",
            remedy="Use another --profile, fewer workers_per_trial, or a larger machine",
        )
    if len(capacity.nodes) > 1:
        _check_engines(spec, runs)


def _check_engines(spec: StudySpec, runs: Sequence[RunConfig]) -> None:
    """An engine reads the trainer's weights from /dev/shm, so both are on one machine."""
    for run in runs:
        if not run.uses_engine:
            continue
        if run.vllm.engine_scope == "study":
            key, given, remedy = "vllm.engine_scope", "study", "Use engine_scope: trial"
        elif spec.resources.for_run(run).gpus_per_worker and run.vllm.placement == "own":
            key, given, remedy = "vllm.placement", "own", "Use placement: colocated"
        else:
            continue
        rule = "an engine gets weights through /dev/shm; on several machines nothing keeps it a place beside its trial"
        raise rule_broken(source=spec.study, key=key, given=given, rule=rule, remedy=f"{remedy}, or one machine")


def check_population(spec: StudySpec, runs: Sequence[RunConfig], capacity: ClusterCapacity) -> None:
    """On a cluster that was joined nothing counts places, so that all trials of a population run at once."""
    needed, there = trials.number_of_trials(spec), concurrent_trials(spec, runs, capacity)
    if spec.scheduler.kind == "pbt" and needed > there:
        raise rule_broken(
            source=spec.study,
            key="scheduler.kind",
            given="pbt",
            rule=f"on a cluster that was joined, all {needed} trials run side by side, and only {there} fit",
            remedy="Use fewer trials or seeds, or run it without --address",
        )


def check_resources_by(spec: StudySpec, runs: Sequence[RunConfig], source: str) -> None:
    """Overrides of resources must name settings and values that trials of the study have."""
    if spec.scheduler.kind == "pbt" and len(resource_requests(spec.resources, runs)) > 1:
        raise rule_broken(
            source=source,
            key="resources.by",
            given=", ".join(spec.resources.by),
            rule="trials of a population take turns at places of one size",
            remedy="Use the same resources for all, or another scheduler.kind",
        )
    settings = [config.flatten(run) for run in runs] if spec.resources.by else []
    for name, values in spec.resources.by.items():
        existing = [*(given[name] for given in settings), *_on_axes(spec, config.short_names()[name])]
        for value in values:
            if not any(key_matches(value, given) for given in existing):
                there = ", ".join(dict.fromkeys(map(str, existing)))
                raise rule_broken(
                    source=source,
                    key=f"resources.by.{name}",
                    given=value,
                    rule=f"no trial has this {name}. Trials have {there}",
                    remedy="Use one of these values",
                )


def _on_axes(spec: StudySpec, path: str) -> Iterator[Any]:
    """Values that the axes may give a setting, of which a large search checks only some."""
    for name, axis in spec.axes.items():
        if axis.choices is not None:
            yield from (settings[path] for settings in axis.choices.values() if path in settings)
        elif name == path:
            yield from axis.extremes()
