"""What Optuna is told of a configuration: the means of its objectives over seeds, or that there are none to tell.

With one objective, a configuration of which a trial stopped early is told as pruned, with the value that it had then.
With several, Optuna has no such value: it is told as pruned without any, so that it is never on the Pareto front (its
values are those of a shorter training) and has no offspring; step and values go on record beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ebft_study.study.spec.study_spec import ObjectiveSpec

if TYPE_CHECKING:
    import optuna

    from ebft_study.study.folder.trial_states import TrialResult

STOPPED_EARLY = "stopped_early"
"""Attribute of an Optuna trial: the step, and the objectives at that step."""


def directions(objective: ObjectiveSpec) -> list[str]:
    """Optuna's names for which way is better, for each objective."""
    return ["minimize" if one.mode == "min" else "maximize" for one in objective.all]


def means(trial_results: Sequence[TrialResult]) -> list[float]:
    """Each objective's mean over trials; nothing when there is a trial without a finite value."""
    values = [
        (trial_result.value, *trial_result.further) for trial_result in trial_results if trial_result.kind != "failed"
    ]
    if len(values) < len(trial_results) or not all(map(math.isfinite, [value for own in values for value in own])):
        return []
    return [math.fsum(one) / len(values) for one in zip(*values, strict=True)]


def tell(study: optuna.Study, number: int, trial_results: Sequence[TrialResult]) -> None:
    """End Optuna's trial `number` by how all of its seeds ended."""
    from optuna.trial import Trial as OptunaTrial
    from optuna.trial import TrialState

    frozen = study.get_trials(deepcopy=False)[number]
    if frozen.state.is_finished():
        return
    values = means(trial_results)
    if not values:
        study.tell(number, state=TrialState.FAIL)
    elif all(trial_result.kind == "finished" for trial_result in trial_results):
        study.tell(number, values)
    else:
        trial, step = OptunaTrial(study, frozen._trial_id), min(e.step for e in trial_results)
        if len(values) == 1:
            trial.report(values[0], step)  # Optuna takes the value of a pruned trial from what it reported last
        else:
            trial.set_user_attr(STOPPED_EARLY, {"step": step, "values": values})
        study.tell(number, state=TrialState.PRUNED)
