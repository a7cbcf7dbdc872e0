"""What population-based training asks of a study: which settings may change at a checkpoint, and when."""

from __future__ import annotations

from collections.abc import Sequence

from ebft_study import config
from ebft_study.config import RunConfig
from ebft_study.errors import rule_broken
from ebft_study.study.spec.study_spec import StudySpec

CHANGEABLE = (
    *("rollout.n_samples", "rollout.temperature", "reward.alpha", "reward.whitening", "reward.baseline"),
    *("loss.gamma", "loss.aggregation", "loss.kl_coefficient", "loss.kl_estimator", "loss.ce_region"),
    *("optimizer.learning_rate", "optimizer.schedule", "optimizer.final_learning_rate_fraction"),
    *("optimizer.betas", "optimizer.weight_decay", "optimizer.max_grad_norm"),
)
"""Settings that the updates after a checkpoint read anew, and nothing else depends on.

All others decide the shapes of the weights, what they were trained on so far, the data order, the length of the run,
or what the objective measures.
"""


def check(spec: StudySpec, runs: Sequence[RunConfig], source: str) -> None:
    """Refuse a study whose trials could not take over each other's state. `runs`: those on the axes, one seed."""
    if spec.scheduler.kind != "pbt":
        return
    _check_study(spec, len(runs), source)
    _check_axes(spec, source)
    for run in runs:
        _check_run(spec, run, source)


def _check_study(spec: StudySpec, members: int, source: str) -> None:
    if spec.search.algorithm == "optuna":
        rule, remedy = "a population is known from the start", "Use algorithm: random (or grid), or another scheduler"
        raise rule_broken(source=source, key="search.algorithm", given="optuna", rule=rule, remedy=remedy)
    if members < 2:
        rule, remedy = f"a population of {members} has nobody to learn from", "Choose two configurations or more"
        raise rule_broken(source=source, key="scheduler.kind", given="pbt", rule=rule, remedy=remedy)
    rules = [name for name, rule in spec.stopping if rule is not None]
    if rules:
        rule = "a trial that falls behind goes on from a better one instead of being stopped"
        remedy = "Drop the stopping rules, or use another scheduler"
        raise rule_broken(source=source, key="stopping", given=rules, rule=rule, remedy=remedy)


def _check_axes(spec: StudySpec, source: str) -> None:
    for key in spec.scheduler.perturbed_axes or ():
        if config.resolve_key(key, source=f"{source}: scheduler.perturbed_axes") not in spec.axes:
            known = ", ".join(map(config.short_name, spec.axes))
            rule, remedy = f"is no axis of this study (its axes: {known})", "Name axes only"
            raise rule_broken(source=source, key="scheduler.perturbed_axes", given=key, rule=rule, remedy=remedy)
    for path, axis in spec.axes.items():
        if axis.when:
            rule, remedy = "in a population every trial has every axis", "Drop the condition, or use another scheduler"
            key = f"axes.{config.short_name(path)}.when"
            raise rule_broken(source=source, key=key, given=axis.when, rule=rule, remedy=remedy)
        _check_changeable(f"axes.{config.short_name(path)}", "an axis", path, source)
    changing = set(spec.axes)
    for path, link in spec.linked.items():
        if changing & set(link.sources):
            changing.add(path)
            _check_changeable(f"linked.{config.short_name(path)}", "follows an axis", path, source)


def _check_changeable(key: str, what: str, path: str, source: str) -> None:
    if path not in CHANGEABLE:
        rule = (
            "with scheduler.kind=pbt trials take over each other's weights and settings half way, and this cannot "
            "change at a checkpoint"
        )
        known = ", ".join(map(config.short_name, CHANGEABLE))
        remedy = f"Fix it under run, or use another scheduler. What can change: {known}"
        raise rule_broken(source=source, key=key, given=what, rule=rule, remedy=remedy)


def _check_run(spec: StudySpec, run: RunConfig, source: str) -> None:
    interval = spec.scheduler.perturbation_interval_steps
    every = {
        "checkpoint.checkpoint_every_steps": run.checkpoint.checkpoint_every_steps,
        "evaluation.eval_every_steps": run.evaluation.eval_every_steps,
    }
    for key, steps in every.items():
        if interval % steps:
            rule = f"trials are compared every {interval} steps (scheduler.perturbation_interval_steps)"
            remedy = f"Use a divisor of {interval}, so that there is a checkpoint and an evaluation then"
            raise rule_broken(source=source, key=key, given=steps, rule=rule, remedy=remedy)
    if interval >= run.total_steps:
        rule = f"a trial has only {run.total_steps} steps, so none would take over another's state"
        remedy = "Use a shorter interval, or kind: none"
        key = "scheduler.perturbation_interval_steps"
        raise rule_broken(source=source, key=key, given=interval, rule=rule, remedy=remedy)
    if "rollout.temperature" in spec.axes and run.evaluation.evaluation_temperature is None:
        rule = "while temperature is an axis, each trial would measure cfm_loss at a temperature of its own"
        remedy = "Set evaluation_temperature, so that trials can be compared"
        key = "evaluation.evaluation_temperature"
        raise rule_broken(source=source, key=key, given=None, rule=rule, remedy=remedy)
