"""Rules of population-based training: which settings may change at a checkpoint, and when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ebft_study import config
from ebft_study.config import RunConfig
from ebft_study.errors import Broken
from ebft_study.study.spec.study_spec import StudySpec

CHANGEABLE = (
    *("rollout.n_samples", "rollout.temperature", "reward.alpha", "reward.whitening", "reward.baseline"),
    *("loss.gamma", "loss.aggregation", "loss.kl_coefficient", "loss.kl_estimator", "loss.ce_region"),
    *("optimizer.learning_rate", "optimizer.schedule", "optimizer.final_learning_rate_fraction"),
    *("optimizer.betas", "optimizer.weight_decay", "optimizer.max_grad_norm"),
)
"""Settings that the updates after a checkpoint read anew, and nothing else depends on.

All others decide the shapes of the weights, the data they were trained on so far, the data order, the length of the
run, or the quantity that the objective measures.
"""


def broken_rules(spec: StudySpec, runs: Sequence[RunConfig], source: str) -> Iterator[Broken]:
    """Yield reasons why trials cannot continue from each other's states. `runs`: those on the axes, at one seed."""
    if spec.scheduler.kind != "pbt":
        return
    yield from _study_rules(spec, len(runs))
    yield from _axes_rules(spec, source)
    for run in runs:
        yield from _run_rules(spec, run)


def _study_rules(spec: StudySpec, n_members: int) -> Iterator[Broken]:
    if spec.search.algorithm == "optuna":
        remedy = "Use algorithm: random (or grid), or another scheduler"
        yield "search.algorithm", "optuna", "a population is known from the start", remedy
    if n_members < 2:
        rule = f"a population of {n_members} has no donor for a trial to continue from"
        yield "scheduler.kind", "pbt", rule, "Choose two configurations or more"
    if spec.seeds.promotes:
        rule = "trials of a population continue from each other, so none is a configuration that could be promoted"
        yield "seeds.promote", spec.seeds.promote, rule, "List the seeds, or use another scheduler.kind"
    stopping_rules = [name for name, rule in spec.stopping if rule]
    if stopping_rules:
        rule = "a trial that falls behind continues from a better one instead of being stopped"
        yield "stopping", stopping_rules, rule, "Drop the stopping rules, or use another scheduler"


def _axes_rules(spec: StudySpec, source: str) -> Iterator[Broken]:
    for key in spec.scheduler.perturbed_axes or ():
        if config.resolve_key(key, source=f"{source}: scheduler.perturbed_axes") not in spec.axes:
            axes = ", ".join(map(config.short_name, spec.axes))
            yield "scheduler.perturbed_axes", key, f"is no axis of this study (its axes: {axes})", "Name axes only"
    for path, axis in spec.axes.items():
        key = f"axes.{config.short_name(path)}"
        if axis.when:
            remedy = "Drop the condition, or use another scheduler"
            yield f"{key}.when", axis.when, "in a population every trial has every axis", remedy
        yield from _changeable_rules(key, "an axis", path)
    changing = set(spec.axes)
    for path, link in spec.linked.items():
        if changing & set(link.sources):
            changing.add(path)
            yield from _changeable_rules(f"linked.{config.short_name(path)}", "follows an axis", path)


def _changeable_rules(key: str, what: str, path: str) -> Iterator[Broken]:
    if path not in CHANGEABLE:
        rule = (
            "with scheduler.kind=pbt trials continue with each other's weights and settings, and this cannot change at "
            "a checkpoint"
        )
        changeable = ", ".join(map(config.short_name, CHANGEABLE))
        yield key, what, rule, f"Fix it under run, or use another scheduler. What can change: {changeable}"


def _run_rules(spec: StudySpec, run: RunConfig) -> Iterator[Broken]:
    interval = spec.scheduler.perturbation_interval_steps
    every = {
        "checkpoint.checkpoint_every_steps": run.checkpoint.checkpoint_every_steps,
        "evaluation.eval_every_steps": run.evaluation.eval_every_steps,
    }
    for key, steps in every.items():
        if interval % steps:
            rule = f"trials are compared every {interval} steps (scheduler.perturbation_interval_steps)"
            yield key, steps, rule, f"Use a divisor of {interval}, so that there is a checkpoint and an evaluation then"
    if interval >= run.total_steps:
        rule = f"a trial has only {run.total_steps} steps, so none would continue from another's state"
        remedy = "Use a shorter interval, or kind: none"
        yield "scheduler.perturbation_interval_steps", interval, rule, remedy
    if "rollout.temperature" in spec.axes and run.evaluation.evaluation_temperature is None:
        rule = "while temperature is an axis, each trial would measure cfm_loss at another temperature"
        remedy = "Set evaluation_temperature, so that trials can be compared"
        yield "evaluation.evaluation_temperature", None, rule, remedy
