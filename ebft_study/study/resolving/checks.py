"""Rules that a study must satisfy before anything runs; each broken one is an error of one line.

Functions named `*_rules` yield broken rules as (key, given, rule, remedy); the first one is raised.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ebft_study import config, text
from ebft_study.analysis.extrapolation import MIN_POINTS
from ebft_study.config import RunConfig
from ebft_study.errors import Broken, ConfigError, refuse
from ebft_study.results import METRICS
from ebft_study.results.metrics import JUDGE
from ebft_study.study.resolving import population_rules, race_rules
from ebft_study.study.resolving.resolved import ResolvedStudy
from ebft_study.study.spec import enumeration, promotion
from ebft_study.study.spec.study_spec import StudySpec, key_matches
from ebft_study.study.spec.trials import Trial


def check_search(spec: StudySpec, source: str) -> None:
    """Refuse axes from which no trials can be made."""
    if spec.search.algorithm != "grid" and not spec.axes:
        raise ConfigError(
            f"{source}: axes: a {spec.search.algorithm} search has nothing to choose. Name at least one axis"
        )
    refuse(_axes_rules(spec), source=source)
    if enumeration.is_empty(spec):
        raise ConfigError(f"{source}: exclude: leaves no configuration to run. Exclude less")
    refuse(_search_rules(spec), source=source)
    refuse(_promotion_rules(spec), source=source)


def check(study: ResolvedStudy) -> None:
    """Refuse a study that cannot run as a whole, on any machines."""
    spec, source = study.spec, study.source.name
    check_stopping(spec, n_trials=study.n_trials, runs=(), source=source)
    for trial in study.examples:
        refuse(_trial_rules(spec, trial), source=source)
    members = [trial.run for trial in study.examples if trial.configuration.baseline is None]
    refuse(population_rules.broken_rules(spec, members, source), source=source)
    refuse(race_rules.broken_rules(spec, members), source=source)
    refuse(_resources_by_rules(study), source=source)


def check_stopping(spec: StudySpec, *, n_trials: int, runs: Iterable[RunConfig], source: str) -> None:
    """Refuse objectives that trials do not report, and schedulers that could stop none of `n_trials`.

    Args:
        runs: the settings of the trials, for `_scheduler_rules`.
    """
    refuse(_objective_rules(spec), source=source)
    refuse(_comparison_rules(spec, n_trials), source=source)
    for run in runs:
        refuse(_scheduler_rules(spec, run), source=source)


def check_comparable(spec: StudySpec, runs: Sequence[RunConfig], source: str) -> None:
    """Refuse to search or to stop trials by an objective that each of their configurations measures in its own way.

    Args:
        runs: the settings of trials on the axes; baselines are compared with none.
    """
    refuse(_comparable_rules(spec, runs), source=source)


def check_capacity(study: ResolvedStudy) -> None:
    """Refuse a study of which some trial does not fit on its machines, even alone."""
    refuse(_capacity_rules(study), source=study.name)


# --- the search and its objectives -----------------------------------------------------------------------------


def _axes_rules(spec: StudySpec) -> Iterator[Broken]:
    for path, axis in spec.axes.items():
        if spec.search.algorithm == "grid" and axis.finite is None:
            rule = "a grid needs a list of values or steps, not a continuous range"
            remedy = "List the values, give the range a step, or use search.algorithm: random or optuna"
            yield f"axes.{config.short_name(path)}", axis.distribution, rule, remedy


def _search_rules(spec: StudySpec) -> Iterator[Broken]:
    number = spec.search.num_configurations or 0
    available = enumeration.number_of_choices(spec) if spec.search.algorithm == "random" else number
    if number > available:
        rule = f"the axes hold only {available:.0f} different configurations"
        yield "search.num_configurations", number, rule, "Use algorithm: grid to run them all, or fewer"
    for index, point in enumerate(spec.search.known):
        if enumeration.is_excluded(spec, point):
            yield f"search.known.{index}", point, "is excluded by the study", "Drop it, or exclude less"


def _promotion_rules(spec: StudySpec) -> Iterator[Broken]:
    """All configurations are known when the best are promoted."""
    if spec.seeds.promotes and spec.search.algorithm == "optuna":
        rule = "Optuna is told of a configuration when all its seeds are over, and which get more depends on all others"
        yield "seeds.promote", spec.seeds.promote, rule, "List the seeds, or use search.algorithm: random (or grid)"


def check_promotion(study: ResolvedStudy) -> None:
    """Refuse promotions that would leave out no configuration."""
    refuse(_left_out_rules(study), source=study.source.name)


def _left_out_rules(study: ResolvedStudy) -> Iterator[Broken]:
    seeds, sizes = study.spec.seeds, [len(group) for group in study.rivals]
    if seeds.promotes and all(promotion.numbers(size, seeds)[-1] == size for size in sizes):
        rule = f"every configuration would get all seeds: no more than {max(sizes, default=0)} can be compared by "
        remedy = "List the seeds, use a more comparable objective, or more configurations"
        yield "seeds.promote", seeds.promote, f"{rule}{study.spec.objective.metric}", remedy


def _objective_rules(spec: StudySpec) -> Iterator[Broken]:
    """Each objective is a metric that trials report, and its mode is the better side of it."""
    objectives, search = spec.objective.all, spec.search
    metrics = [objective.metric for objective in objectives]
    for metric, mode in ((objective.metric, objective.mode) for objective in objectives):
        reported = [entry.name for entry in METRICS.values() if entry.is_objective]
        if metric not in reported:
            close = difflib.get_close_matches(metric, reported, n=1, cutoff=0.5)
            nearest = f" Did you mean {close[0]!r}?" if close else ""
            rule = f"no trial reports this metric at evaluations.{nearest} Reported are {', '.join(reported)}"
            yield "objective.metric", metric, rule, "Use one of them, or package.module:name for one of your own"
        elif (better := METRICS[metric].direction) != mode:
            yield "objective.mode", mode, f"the better {metric} is the {better}imum", f"Use mode: {better}"
        if metrics.count(metric) > 1:
            yield "objective", metric, "is listed twice", "List each metric once"
    if search.algorithm != "optuna" or search.sampler != "nsga2":
        return
    if len(metrics) == 1:
        rule = "evolution by ranks of a Pareto front has one objective only"
        yield "search.sampler", "nsga2", rule, "List several objectives, or use sampler: tpe"
    number, size = search.num_configurations or 0, search.population_size
    if number <= size:
        rule = f"the first generation is drawn at random, and {number} configurations hold no other"
        remedy = f"Use a smaller population_size, or num_configurations > {size}"
        yield "search.population_size", size, rule, remedy


def _comparison_rules(spec: StudySpec, n_trials: int) -> Iterator[Broken]:
    """A trial has enough others to be compared with."""
    compared = n_trials - len(spec.seeds.all) * len(spec.baselines)
    required = spec.scheduler.min_samples_required
    if spec.scheduler.kind == "median" and required >= compared:
        rule = f"the study has {compared} trials on its axes, so none would ever be stopped"
        yield "scheduler.min_samples_required", required, rule, f"Use at most {max(compared - 1, 1)}, or kind: none"


def _comparable_rules(spec: StudySpec, runs: Sequence[RunConfig]) -> Iterator[Broken]:
    if spec.search.algorithm == "optuna":
        decides, remedy, objectives = "search.algorithm=optuna", "use a grid or random search", spec.objective.all
    elif spec.scheduler.kind != "none":
        decides, remedy, objectives = (
            f"scheduler.kind={spec.scheduler.kind}",
            "use scheduler.kind: none",
            spec.objective.all[:1],
        )
    else:
        return
    for metric in (objective.metric for objective in objectives):
        own_temperature = all(run.evaluation.evaluation_temperature is not None for run in runs)
        different = _different(METRICS[metric].defined_by(own_temperature=own_temperature), runs)
        if different:
            names = text.listed(different)
            rule = f"{decides} compares trials by it, but its values at different {names} measure different things"
            is_evaluated = "evaluation_temperature" in METRICS[metric].comparable_within
            fixed = "set evaluation_temperature, " if is_evaluated and different == ["temperature"] else ""
            judge = ", judge_cfm_loss with evaluation.judge" if _could_be_judged(metric, different) else ""
            other = (
                f"Use a comparable objective such as ce_loss{judge}, {fixed}{remedy}, or run a study for each {names}"
            )
            yield "objective.metric", metric, rule, other


def _could_be_judged(metric: str, different: Sequence[str]) -> bool:
    """Whether one judge for all would measure what a metric of many feature maps cannot compare."""
    return metric == "cfm_loss" and not set(different) & set(JUDGE)


def _different(names: Sequence[str], runs: Sequence[RunConfig]) -> list[str]:
    """Those of the settings that are not the same in all runs."""

    def values(name: str) -> set[str]:
        path = config.short_names()[name].split(".")
        return {repr(functools.reduce(getattr, path, run)) for run in runs}

    return [name for name in names if len(values(name)) > 1]


def _scheduler_rules(spec: StudySpec, run: RunConfig) -> Iterator[Broken]:
    """A scheduler can stop a trial of this length; `population_rules` has the rules of pbt."""
    scheduler, total_steps = spec.scheduler, run.total_steps
    if scheduler.kind in ("none", "pbt"):
        return
    if scheduler.grace_period_steps >= total_steps:
        rule = f"a trial has only {total_steps} steps, so none could be stopped early"
        remedy = "Use a shorter grace period, or kind: none"
        yield "scheduler.grace_period_steps", scheduler.grace_period_steps, rule, remedy
    first_rung = scheduler.grace_period_steps * scheduler.reduction_factor ** (scheduler.brackets - 1)
    if scheduler.kind == "asha" and first_rung >= total_steps:
        rule = f"the first rung of the last bracket is at step {first_rung}, and a trial has only {total_steps} steps"
        yield "scheduler.brackets", scheduler.brackets, rule, "Use fewer brackets, or a shorter grace period"
    every, warm = run.evaluation.eval_every_steps, run.training.warm_start_steps
    evaluations = len(range(every, total_steps, every)) - warm // every
    if scheduler.kind == "extrapolation" and evaluations < MIN_POINTS:
        rule = f"{evaluations} evaluations between the start and the last step: {MIN_POINTS} are needed to extrapolate"
        yield "evaluation.eval_every_steps", every, rule, "Evaluate more often, or use another scheduler.kind"


# --- each configuration ----------------------------------------------------------------------------------------


def _trial_rules(spec: StudySpec, trial: Trial) -> Iterator[Broken]:
    run, resources = trial.run, trial.resources
    if run.training.batch_size % resources.processes:
        rule = f"each of {resources.processes} workers takes an equal part of the batch"
        remedy = "Use a multiple of resources.workers_per_trial"
        yield "training.batch_size", run.training.batch_size, rule, remedy
    yield from _scheduler_rules(spec, run)
    if run.uses_engine and importlib.util.find_spec("vllm") is None:
        remedy = "Install it (GPU: pip install 'ebft-study[vllm]'; CPU: make setup), or use backend: strided"
        yield "rollout.backend", "vllm", "vLLM is not installed here", remedy
    if run.features.backend == "service" and resources.gpus_per_worker and not resources.feature_gpus:
        rule = "trials are on GPUs, so their feature service needs one, or a part of one"
        yield "resources.feature_gpus", 0, rule, "Use feature_gpus: 1 (or 0.5), or features.backend: local"
    if trial.configuration.baseline is None:
        for objective in spec.objective.all:
            yield from _reported_rules(objective.metric, run)
        yield from _score_rules(spec, run)


def _reported_rules(metric: str, run: RunConfig) -> Iterator[Broken]:
    """A trial with these settings measures the objective."""
    is_raw_text = run.data.dataset in ("stdlib", "unstructured") or run.data.text_column is not None
    if metric == "ce_answer_loss" and is_raw_text:
        rule = f"data set {run.data.dataset!r} is raw text without answers, so no trial reports it"
        yield "objective.metric", metric, rule, "Use metric: ce_loss"
    if METRICS[metric].plugin and METRICS[metric].plugin not in run.evaluation.extra_metrics:
        rule = "evaluation.extra_metrics does not have it"
        yield "objective.metric", metric, rule, f"Add {METRICS[metric].plugin}"
    if metric == "judge_cfm_loss" and run.evaluation.judge is None:
        rule = "no judge measures it"
        yield "objective.metric", metric, rule, "Name a network in evaluation.judge, or use metric: cfm_loss"
    if metric == "benchmark_score" and not run.evaluation.benchmarks:
        rule = "no benchmark measures it"
        yield "objective.metric", metric, rule, "List one in evaluation.benchmarks, or use metric: ce_loss"
    if metric == "verifier_reward" and not run.samples_answers:
        rule = f"method={run.method} asks no verifier, so such a trial does not report it"
        yield "objective.metric", metric, rule, "Use method: rlvr, or metric: cfm_loss"
    if metric == "reward" and run.method != "ebft":
        rule = f"method={run.method} has no reward, so such a trial does not report it"
        yield "objective.metric", metric, rule, "Use metric: cfm_loss"


def _score_rules(spec: StudySpec, run: RunConfig) -> Iterator[Broken]:
    """What looks at the first objective while trials run has a value of it at each of their evaluations."""
    evaluation, decides = run.evaluation, spec.scheduler.kind != "none" or spec.stopping.stagnation is not None
    every = evaluation.eval_every_steps
    if spec.objective.metric == "benchmark_score" and decides and evaluation.benchmark_every_steps != every:
        rule = "schedulers and stopping rules need the objective at every evaluation"
        yield "evaluation.benchmark_every_steps", evaluation.benchmark_every_steps, rule, f"Use {every}, or neither"


# --- resources -------------------------------------------------------------------------------------------------


def _resources_by_rules(study: ResolvedStudy) -> Iterator[Broken]:
    """Overrides of resources name settings and values that trials of the study have."""
    spec = study.spec
    if spec.scheduler.takes_turns and len(study.requests) > 1:
        rule = f"with scheduler.kind={spec.scheduler.kind} trials take turns in slots of one size"
        remedy = "Use the same resources for all, or another scheduler.kind"
        yield "resources.by", ", ".join(spec.resources.by), rule, remedy
    settings = [config.flatten(run) for run in study.runs] if spec.resources.by else []
    for name, values in spec.resources.by.items():
        existing = [*(flat[name] for flat in settings), *_axis_values(spec, config.short_names()[name])]
        for value in values:
            if not any(key_matches(value, one) for one in existing):
                there = ", ".join(dict.fromkeys(map(str, existing)))
                rule = f"no trial has this {name}. Trials have {there}"
                yield f"resources.by.{name}", value, rule, "Use one of these values"


def _axis_values(spec: StudySpec, path: str) -> Iterator[Any]:
    """Values that the axes may give a setting, of which a large search checks only some."""
    for name, axis in spec.axes.items():
        if axis.choices is not None:
            yield from (settings[path] for settings in axis.choices.values() if path in settings)
        elif name == path:
            yield from axis.extremes()


def _capacity_rules(study: ResolvedStudy) -> Iterator[Broken]:
    capacity, n_nodes = study.capacity, len(study.capacity.nodes)
    spread = f", on {n_nodes} machines" if n_nodes > 1 else ""
    for request, trial in study.requests.items():
        if request.fit(study.trial_capacity):
            continue
        without_gpus = replace(request, gpus=0.0, engine_gpus=0.0)
        if without_gpus.fit(capacity) == 0:
            key, needed, there, what = "cpus_per_worker", request.processes * request.cpus, capacity.cpus, "CPU cores"
            services = ""
        else:
            needed, there = request.all_gpus + study.shared_gpus, capacity.gpus
            of_services = needed - request.processes * request.gpus
            key, what = "gpus_per_worker", "GPUs"
            services = f" (of which {of_services:g} for services)" if of_services else ""
        rule = f"a trial of {request.processes} worker(s) needs {needed:g} {what}{services}; here are {there:g}{spread}"
        remedy = "Use another --profile, fewer workers_per_trial, or a larger machine"
        yield f"resources.{key}", getattr(trial.resources, key), rule, remedy
    if n_nodes > 1:
        for trial in study.examples:
            yield from _engine_rules(trial)
    yield from _turns_rules(study)


def _turns_rules(study: ResolvedStudy) -> Iterator[Broken]:
    """Trials that take turns can pause: they find a checkpoint of the step at which they did."""
    kind = study.spec.scheduler.kind
    if not study.spec.scheduler.takes_turns or study.n_trials <= study.concurrency:
        return
    if study.capacity.is_existing:
        rule = (
            f"on an existing cluster all {study.n_trials} trials run at the same time, and only {study.concurrency} fit"
        )
        yield "scheduler.kind", kind, rule, "Use fewer trials or seeds, or run it without --address"
    for run in study.runs if kind == "race" else ():
        every, saved = run.evaluation.eval_every_steps, run.checkpoint.checkpoint_every_steps
        if every % saved:
            rule = f"{study.n_trials} trials take turns in {study.concurrency} slots, and pause every {every} steps"
            remedy = f"Use a divisor of {every} (evaluation.eval_every_steps), so that there is a checkpoint then"
            yield "checkpoint.checkpoint_every_steps", saved, rule, remedy


def _engine_rules(trial: Trial) -> Iterator[Broken]:
    """An engine reads the trainer's weights from /dev/shm, so both are on one machine."""
    rule = "an engine gets weights through /dev/shm; on several machines nothing keeps it on the machine of its trial"
    if trial.run.uses_engine and trial.run.vllm.engine_scope == "study":
        yield "vllm.engine_scope", "study", rule, "Use engine_scope: trial, or one machine"
    elif trial.run.uses_engine and trial.resources.gpus_per_worker and trial.run.vllm.placement == "own":
        yield "vllm.placement", "own", rule, "Use placement: colocated, or one machine"
