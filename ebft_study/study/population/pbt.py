"""Population-based training: every so many steps, trials that do badly go on from the state of those that do well.

Ray's `PopulationBasedTraining` compares, chooses and swaps; what it swaps is ours. The record is the results tables
and the trials' folders (`takeover`): a resumed study rebuilds from them what each trial is and where it stood.

Each seed is a population of its own. Its members share data order and sampling noise, so a trial goes on exactly as
its donor would with these settings, and seeds stay independent for statistics.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from ray.tune import Checkpoint
from ray.tune.schedulers import FIFOScheduler, PopulationBasedTraining, TrialScheduler

from ebft_study import config
from ebft_study.study.population import exploit
from ebft_study.study.population.exploit import LastScore, Lineage
from ebft_study.study.population.explore import applied, explore
from ebft_study.study.spec.study_spec import StudySpec

_WAITING = ("PENDING", "PAUSED")


class PopulationListener(Protocol):
    """Who learns of what the scheduler does to trials (`monitor.Monitor`)."""

    def exploited(self, trial_id: str, attempt: int, details: Mapping[str, Any]) -> None: ...
    def paused(self, trial_id: str, attempt: int) -> None: ...


@dataclass(frozen=True)
class _Controller:
    """Tune's controller as one population sees it: its own trials, and no searcher, which Ray's PBT would refuse."""

    whole: Any
    seed: int
    search_alg: None = None

    def get_trials(self) -> list[Any]:
        return [trial for trial in self.whole.get_trials() if _is_member(trial) and _seed(trial) == self.seed]

    def pause_trial(self, trial: Any, should_checkpoint: bool = True) -> None:
        self.whole.pause_trial(trial, should_checkpoint=should_checkpoint)


class Populations(FIFOScheduler):  # type: ignore[misc]
    """A population for each seed. Baselines belong to none: they neither give nor take."""

    def __init__(
        self,
        spec: StudySpec,
        folder: Path,
        told: PopulationListener,
        *,
        warm_start_steps: int,
        places: int,
        released: Callable[[str, int], None] = lambda trial_id, attempt: None,
    ) -> None:
        """
        Args:
            places: trials that can run side by side; more than that take turns, one comparison each.
            released: called with a trial and its attempt when the attempt is over, though the trial is not.
        """
        super().__init__()
        self._spec, self._folder, self._told, self._places = spec, folder, told, places
        self._released = released
        self._warm_start_steps = warm_start_steps
        interval = spec.scheduler.perturbation_interval_steps
        self._past = exploit.last_scores(
            folder, metric=spec.objective.metric, interval=interval, after=warm_start_steps
        )
        self._of_seed: dict[int, _Population] = {}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        if _is_member(trial):
            self._population(trial).on_trial_add(_Controller(tune_controller, _seed(trial)), trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        over = "outcome/status" in result or result["step"] >= trial.config["total_steps"]
        if not _is_member(trial) or over or not math.isfinite(result.get(self._metric, math.nan)):
            return str(TrialScheduler.CONTINUE)
        view = _Controller(tune_controller, _seed(trial))
        decision = str(self._population(trial).on_trial_result(view, trial, result))
        if decision == TrialScheduler.PAUSE and self._room_for_all(tune_controller):
            return str(TrialScheduler.CONTINUE)
        if decision != TrialScheduler.CONTINUE:
            self._told.paused(_id(trial), int(result["attempt"]))
            self._released(_id(trial), int(result["attempt"]))
        return decision

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Of the trials that wait: baselines, then whoever is furthest behind."""
        waiting = [trial for trial in tune_controller.get_trials() if trial.status in _WAITING]
        return min(waiting, key=lambda t: (_is_member(t), self._time(t), _id(t)), default=None)

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles it into snapshots that nothing here ever reads."""
        return {}

    @property
    def _metric(self) -> str:
        return str(self._spec.objective.metric)

    def _room_for_all(self, tune_controller: Any) -> bool:
        return sum(not trial.is_finished() for trial in tune_controller.get_trials()) <= self._places

    def _time(self, trial: Any) -> int:
        return self._population(trial).time(trial) if _is_member(trial) else 0

    def _population(self, trial: Any) -> _Population:
        seed = _seed(trial)
        if seed not in self._of_seed:
            self._of_seed[seed] = _Population(
                self._spec, self._folder, self._told, warm_start_steps=self._warm_start_steps, past=self._past
            )
        return self._of_seed[seed]


class _Population(PopulationBasedTraining):  # type: ignore[misc]
    """The trials of one seed."""

    def __init__(
        self,
        spec: StudySpec,
        folder: Path,
        told: PopulationListener,
        *,
        warm_start_steps: int,
        past: Mapping[str, LastScore],
    ) -> None:
        scheduler = spec.scheduler
        super().__init__(
            time_attr="step",
            metric=spec.objective.metric,
            mode=spec.objective.mode,
            perturbation_interval=scheduler.perturbation_interval_steps,
            quantile_fraction=scheduler.quantile_fraction,
            custom_explore_fn=dict,  # Ray insists on one; `_get_new_config` explores
            log_config=False,
            require_attrs=False,
        )
        self._spec, self._folder, self._told, self._past = spec, folder, told, past
        self._warm_start_steps = warm_start_steps
        self._taken: dict[str, Lineage] = {}

    def time(self, trial: Any) -> int:
        """The step at which a trial was last compared."""
        return int(self._trial_state[trial].last_train_time)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        state, last_score = self._trial_state[trial], self._past.get(_id(trial))
        state.last_perturbation_time = self._compared_at(self._warm_start_steps)
        if last_score is not None:
            state.last_score = self._metric_op * last_score.value if math.isfinite(last_score.value) else None
            state.last_train_time = last_score.step
            state.last_perturbation_time = self._compared_at(last_score.step)

    def _compared_at(self, step: int) -> int:
        """The last multiple of the interval: comparisons are at these, whatever step a donor's checkpoint is of."""
        return step - step % int(self._perturbation_interval)

    def _checkpoint_or_exploit(self, trial: Any, tune_controller: Any, upper: list[Any], lower: list[Any]) -> None:
        """A trial of the lower quantile goes on from a better one of the upper, once every member has been measured."""
        own = self._trial_state[trial].last_score
        better = [other for other in upper if self._trial_state[other].last_score > own]
        if trial not in lower or not better or not self._all_measured(tune_controller):
            return
        donor = _generator(self._spec, trial, self.time(trial)).choice(better)
        line = self._take_over(trial, donor)
        if line is None:
            return
        self._taken[_id(trial)] = line
        folder = self._folder / "train" / f"{_id(trial)}-{line.attempt}"
        self._trial_state[donor].last_checkpoint = Checkpoint.from_directory(str(folder))
        self._exploit(tune_controller, trial, donor)
        state = self._trial_state[trial]
        state.last_train_time = line.donor_step
        state.last_perturbation_time = self._compared_at(line.donor_step)

    def _all_measured(self, tune_controller: Any) -> bool:
        members = [trial for trial in tune_controller.get_trials() if not trial.is_finished()]
        return all(self._trial_state[trial].last_score is not None for trial in members)

    def _take_over(self, trial: Any, donor: Any) -> Lineage | None:
        """Put the donor's checkpoint into the trial's folder and the takeover on record."""
        generator = _generator(self._spec, trial, self.time(trial), "settings")
        before, theirs = trial.config["settings"], donor.config["settings"]
        after = explore(self._spec, trial.config["run"], theirs, generator)
        donor_attempt = (donor.config["lineage"] or asdict(Lineage()))["attempt"]
        scores = [self._metric_op * self._trial_state[t].last_score for t in (trial, donor)]

        def record(attempt: int, checkpoint: Path, step: int) -> None:
            details = {
                "step": self.time(trial), "donor": _id(donor), "donor_step": step, "donor_attempt": donor_attempt,
                "score": scores[0], "donor_score": scores[1],
                "checkpoint": str(checkpoint.relative_to(self._folder)),
                "before": _short(before), "after": _short(after),
            }  # fmt: skip
            self._told.exploited(_id(trial), attempt, details)

        taken = exploit.take_over(
            self._folder, _id(trial), donor=_id(donor), donor_attempt=donor_attempt, record=record
        )
        if taken is None:
            return None
        attempt, _, step = taken
        return Lineage(attempt, _id(donor), step, donor_attempt, scores[0], after)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The trial stays who it is; its line and the settings on the axes are new."""
        line = self._taken[_id(trial)]
        run = applied(self._spec, trial.config["run"], line.settings).model_dump(mode="json")
        return {**trial.config, "run": run, "settings": line.settings, "lineage": asdict(line)}, {}


def _generator(spec: StudySpec, trial: Any, *what: Any) -> random.Random:
    """A function of the study's seed, the trial and the step: a resumed study does not draw again what it drew."""
    return random.Random("-".join(map(str, (spec.scheduler.perturbation_seed, _id(trial), *what))))


def _short(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {config.short_name(path): value for path, value in settings.items()}


def _is_member(trial: Any) -> bool:
    return not trial.config["is_baseline"]


def _seed(trial: Any) -> int:
    return int(trial.config["run"]["seed"])


def _id(trial: Any) -> str:
    return str(trial.config["trial_id"])
