"""Early stopping by ASHA, whose memory is the results tables rather than a snapshot of Ray's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from ebft_study.study.spec import StudySpec

Curve = Sequence[tuple[float, float]]
"""A trial's (step, objective) in order of steps."""


@dataclass(frozen=True)
class _Named:
    """A trial as ASHA sees it: by our identifier, which a resumed study keeps, not by Tune's."""

    trial_id: str


class Rungs(ASHAScheduler):  # type: ignore[misc]
    """ASHA over our trial identifiers. The reports of earlier sessions are replayed into it when a study resumes.

    Never stopped: baselines, which every configuration is compared with, and a trial that has done its last step,
    whose held-out evaluation is still to come. Reports without a finite objective are passed over.
    """

    def __init__(self, spec: StudySpec, *, longest: int, history: Mapping[str, Curve]) -> None:
        """`longest`: steps of the longest trial. `history`: curves of trials that earlier sessions ran."""
        super().__init__(
            time_attr="step",
            metric=spec.objective.metric,
            mode=spec.objective.mode,
            max_t=longest,
            grace_period=spec.scheduler.grace_period_steps,
            reduction_factor=spec.scheduler.reduction_factor,
            stop_last_trials=False,
        )
        for trial_id, curve in history.items():
            self._replay(_Named(trial_id), curve)

    def _replay(self, trial: _Named, curve: Curve) -> None:
        super().on_trial_add(None, trial)
        for step, value in curve:
            if math.isfinite(value):
                super().on_trial_result(None, trial, {self._time_attr: step, self._metric: value})
        super().on_trial_remove(None, trial)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, _named(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        settings = trial.config
        over = "outcome/status" in result or result[self._time_attr] >= settings["total_steps"]
        if settings["is_baseline"] or over or not math.isfinite(result.get(self._metric, math.nan)):
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, _named(trial), result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Everything worth knowing was seen when it was reported."""
        super().on_trial_remove(tune_controller, _named(trial))

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_remove(tune_controller, _named(trial))


def _named(trial: Any) -> _Named:
    return _Named(trial.config["trial_id"])
