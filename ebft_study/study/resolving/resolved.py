"""The resolved study: a study file with everything derived from it, made once by `study_file.resolve`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ebft_study.config import RunConfig
from ebft_study.study.cluster.capacity import ClusterCapacity
from ebft_study.study.cluster.requests import ResourceRequest, shared_gpus
from ebft_study.study.folder.study_yaml import StudySource
from ebft_study.study.resolving import plugin_use
from ebft_study.study.spec import promotion
from ebft_study.study.spec.study_spec import StudySpec
from ebft_study.study.spec.trials import Trial

if TYPE_CHECKING:
    from ebft_study.study.resolving.service_plan import ServicePlan


@dataclass(frozen=True, eq=False)
class ResolvedStudy:
    """A checked study on the machines where it is to run. Values derived from its fields are computed once."""

    spec: StudySpec
    source: StudySource
    trials: tuple[Trial, ...]
    """Trials that are known from the start, in the order in which they run; Optuna chooses further ones later."""
    candidates: tuple[Trial, ...]
    """Corners of Optuna's search space, checked instead of the trials that it may choose; otherwise empty."""
    capacity: ClusterCapacity
    plugin_folder: str | None = None
    """Where plug-ins are looked for that Python does not find: the folder of the study file."""

    def on(self, capacity: ClusterCapacity) -> ResolvedStudy:
        """The same study on other machines."""
        return dataclasses.replace(self, capacity=capacity)

    @property
    def name(self) -> str:
        return self.spec.study

    @cached_property
    def n_trials(self) -> int:
        """All trials that run, those that Optuna has yet to choose included."""
        if self.spec.seeds.promotes:
            n_promoted = sum(promotion.number_of_trials(len(group), self.spec.seeds) for group in self.rivals)
            return n_promoted + len(self.spec.seeds.all) * len(self.spec.baselines)
        to_choose = self.spec.search.num_configurations or 0 if self.spec.search.algorithm == "optuna" else 0
        return len(self.trials) + to_choose * len(self.spec.seeds.all)

    @cached_property
    def examples(self) -> tuple[Trial, ...]:
        """One trial of each configuration, at the first seed, and the candidates."""
        return (*(trial for trial in self.trials if trial.seed == self.spec.seeds.all[0]), *self.candidates)

    @cached_property
    def rivals(self) -> list[list[Trial]]:
        """One trial of each configuration on the axes, in groups whose objective may be compared."""
        on_axes = (trial for trial in self.examples if trial.configuration.baseline is None)
        return promotion.rivals(on_axes, self.spec.objective.metric, lambda trial: trial.run)

    @property
    def n_scoring_seeds(self) -> int:
        """Seeds that score claims: all, or those after the last promotion that leaves a configuration out."""
        return min(
            (promotion.scoring_seeds(len(group), self.spec.seeds) for group in self.rivals),
            default=len(self.spec.seeds.all),
        )

    @cached_property
    def runs(self) -> tuple[RunConfig, ...]:
        """The settings of the examples."""
        return tuple(trial.run for trial in self.examples)

    @cached_property
    def longest_run_steps(self) -> int:
        return max(run.total_steps for run in self.runs)

    @cached_property
    def requests(self) -> dict[ResourceRequest, Trial]:
        """Every different resource request, each with a trial that makes it."""
        first: dict[ResourceRequest, Trial] = {}
        for trial in self.examples:
            first.setdefault(ResourceRequest.for_trial(trial), trial)
        return first

    @cached_property
    def shared_gpus(self) -> float:
        """GPUs of the services that all trials share."""
        return shared_gpus(self.spec.resources, self.examples)

    @cached_property
    def trial_capacity(self) -> ClusterCapacity:
        """The machines without the GPUs of shared services."""
        return self.capacity.without_gpus(self.shared_gpus)

    @cached_property
    def concurrency(self) -> int:
        """Trials that run at a time: as many of the smallest as fit, and as the budget allows; at least one.

        Engines and services take no CPU cores of their own: a trial waits while they work for it.
        """
        fits = max([1, *(request.fit(self.trial_capacity) for request in self.requests)])
        return min(fits, self.spec.budget.max_concurrent_trials or fits)

    @cached_property
    def plugins(self) -> dict[str, Any]:
        """What the processes of trials need to find the same plug-ins."""
        return plugin_use.for_tasks(self.spec, self.runs, self.plugin_folder)

    @cached_property
    def service_plan(self) -> ServicePlan:
        """The services that trials share. Reads the shapes of models."""
        from ebft_study.study.resolving.service_plan import plan_services

        return plan_services(self.runs, self.spec.resources, concurrency=self.concurrency)
