"""`--extend`: a study gets more trials or more steps, and everything that was done stays.

`extended_from` records the sizes that a study had before, because trials keep the numbers that they began with
(`trials.listed`): a resumed study finds the very same numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ebft_study import config
from ebft_study.config import RunConfig
from ebft_study.errors import ConfigError, rule_broken
from ebft_study.study.folder import study_yaml
from ebft_study.study.folder.history import History
from ebft_study.study.resolving.resolved import ResolvedStudy
from ebft_study.study.spec.axis import Axis
from ebft_study.study.spec.normalize import dump
from ebft_study.study.spec.study_spec import StudySize, StudySpec

STEPS = "training.steps"
_MAY_GROW = "values of axes, seeds, baselines, search.num_configurations and steps"
_MAY_GROW_PROMOTED = "seeds.promote (at its end) and baselines"


def extended(old: StudySpec, study: ResolvedStudy) -> StudySpec:
    """The spec of `study`, which contains everything of `old` and more, with the size of `old` recorded in it.

    Raises:
        ConfigError: something other than its size differs, or it has become smaller.
    """
    new, source = study.spec, study.source.name
    if new.seeds.promotes or old.seeds.promotes:
        _check_promotion(old, new, source)
    _check_rest(old, new, source)
    _check_size(old, new, source)
    _check_steps(old, study)
    if not differences(old, new):
        raise ConfigError(f"{source}: --extend: nothing is added to the study. Add to {_MAY_GROW}, or use 'resume'")
    sizes = (*old.extended_from, StudySize.from_spec(old))
    kept = {name: getattr(old, name) for name in ("first_name", "defaults", "warm_start")}
    return new.model_copy(update={"extended_from": sizes, **kept})


def differences(recorded: StudySpec, asked: StudySpec) -> list[str]:
    """Keys in which a study and a file differ; files do not contain what a study records of its own history.

    Budget and retries are no part of what is studied: each session may have others.
    """
    history = {name: getattr(recorded, name) for name in ("first_name", "extended_from", "defaults", "warm_start")}
    return study_yaml.differences(recorded, asked.model_copy(update=history).with_session_of(recorded))


def reopened(study: ResolvedStudy, past: History) -> History:
    """The history with the trials' steps of now, without the results of finished ones that have more to do."""
    if not study.spec.extended_from:
        return past
    total_steps = {trial.trial_id: trial.run.total_steps for trial in study.trials}
    over = {
        trial_id: result
        for trial_id, result in past.trial_results.items()
        if result.kind != "finished" or result.step >= total_steps.get(trial_id, 0)
    }
    curves = {
        replace(trial, total_steps=total_steps.get(trial.trial_id, trial.total_steps)): curve
        for trial, curve in past.curves.items()
    }
    return replace(past, trial_results=over, curves=curves)


def _steps(spec: StudySpec) -> int:
    default = RunConfig().training.steps
    return int(spec.run.get("training", {}).get("steps", default))


def _check_rest(old: StudySpec, new: StudySpec, source: str) -> None:
    """Refuse changes of anything but the size of the study."""
    length = {"training": {"steps": _steps(old)}}
    before = old.model_copy(update={"run": config.merge(old.run, length)})
    run = config.merge(new.run, length)
    search = new.search.model_copy(update={"num_configurations": old.search.num_configurations})
    same = {"axes": old.axes, "seeds": old.seeds, "baselines": old.baselines}
    different = differences(before, new.model_copy(update={**same, "search": search, "run": run}))
    if different:
        raise ConfigError(
            f"{source}: --extend: {different[0]} is another study, for another --name. Can be extended: {_MAY_GROW}"
        )


def _check_promotion(old: StudySpec, new: StudySpec, source: str) -> None:
    """Further levels may follow: they rank configurations that have run. Anything else changes who was promoted."""
    before, after = old.seeds, new.seeds
    if after.levels[: len(before.levels)] != before.levels or after.all[: len(before.all)] != before.all:
        rule = f"the study promoted by {dump(old)['seeds']}, and only further levels may follow"
        given, remedy = dump(new)["seeds"], "Add larger numbers at the end of promote, or use another --name"
        raise rule_broken(source=source, key="--extend: seeds", given=given, rule=rule, remedy=remedy)
    same = {"seeds": old.seeds, "baselines": old.baselines}
    different = differences(old, new.model_copy(update=same))
    if different:
        raise ConfigError(
            f"{source}: --extend: {different[0]} changes the ranks by which configurations were promoted. Can be "
            f"extended: {_MAY_GROW_PROMOTED}"
        )


def _check_size(old: StudySpec, new: StudySpec, source: str) -> None:
    fixed = {
        "grid": (),
        "random": ("axes",),
        "optuna": ("axes", "seeds", "baselines"),
    }[old.search.algorithm]
    for key in fixed:
        if getattr(old, key) != getattr(new, key):
            raise ConfigError(
                f"{source}: --extend: with search.algorithm={old.search.algorithm}, {key} cannot be extended, because "
                "all samples depend on them. Raise search.num_configurations, or use another --name"
            )
    if list(old.axes) != list(new.axes):
        raise ConfigError(f"{source}: --extend: the axes are others ({', '.join(new.axes)}). Use another --name")
    lost = [f"axes.{name}={value!r}" for name, axis in old.axes.items() for value in _gone(axis, new.axes[name])]
    lost += [f"seeds={seed}" for seed in old.seeds.all if seed not in new.seeds.all]
    lost += [f"baselines.{name}" for name, settings in old.baselines.items() if new.baselines.get(name) != settings]
    if (new.search.num_configurations or 0) < (old.search.num_configurations or 0):
        lost.append(f"search.num_configurations={old.search.num_configurations}")
    if lost:
        raise ConfigError(f"{source}: --extend: {lost[0]} was run and is not in the file. Put it back")


def _gone(old: Axis, new: Axis) -> list[Any]:
    """Values of an axis that its new form lacks; a range must be the same."""
    if not (old.is_choice and new.is_choice):
        return [] if old == new else [old.distribution]
    if old.when != new.when:
        return list(old.finite or ())
    if old.choices is None:
        return [value for value in old.values or () if value not in (new.values or ())]
    return [name for name, settings in old.choices.items() if (new.choices or {}).get(name) != settings]


def _check_steps(old: StudySpec, study: ResolvedStudy) -> None:
    before, after = _steps(old), _steps(study.spec)
    if after == before:
        return
    problem = ""
    if after < before:
        problem, remedy = f"trials have done {before} already", f"Use steps >= {before}"
    elif old.search.algorithm == "optuna":
        problem, remedy = "Optuna has the results of its configurations for fewer", "Use another --name"
    elif any(run.optimizer.schedule != "constant" for run in study.runs):
        problem = f"the learning rate is at the end of a schedule of {before} steps"
        remedy = "Only trials with schedule: constant can continue; use another --name"
    if problem:
        key = f"--extend: {STEPS}"
        raise rule_broken(source=study.source.name, key=key, given=after, rule=problem, remedy=remedy)
