"""The task of a trial's processes: the only object that the driver passes to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from ebft_study.config import RunConfig
from ebft_study.study.spec.study_spec import ObjectiveSpec, ResourcesSpec
from ebft_study.study.spec.trials import Replicate


@dataclass(frozen=True)
class TrialTask:
    """Plain values, so that Tune can show, save and send them: this is the `config` of a Tune trial."""

    study: str
    study_folder: str
    """A path or a URL."""
    trial_id: str
    label: str
    """Configuration and seed, as tables show them."""
    is_baseline: bool
    total_steps: int
    run: dict[str, Any]
    """A `RunConfig`; see `run_config`."""
    settings: dict[str, Any]
    """Dotted path -> value of the settings on the axes that are in force."""
    resources: dict[str, Any]
    """A `ResourcesSpec`; see `resources_spec`."""
    objective: dict[str, Any]
    """An `ObjectiveSpec`, the first of the study; see `objective_spec`."""
    loop: str
    """The training loop, as `module:function`."""
    lineage: dict[str, Any] | None = None
    """The checkpoint that the trial continues after an exploit of population-based training (`exploit.Lineage`)."""
    generation: int = 0
    """Of the driver, in a store; see `results.fence`."""
    plugins: dict[str, Any] = field(default_factory=dict)
    """Where plug-ins are found, and their digests: arguments of `plugins.search_in`; empty without any."""
    failed: str = ""
    """Why the trial is not to be tried again; its process only reports it."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TrialTask:
        """The task in the `config` of a Tune trial, or in the arguments of its function."""
        return cls(**config)

    def to_config(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def run_config(self) -> RunConfig:
        return RunConfig.model_validate(self.run)

    @cached_property
    def resources_spec(self) -> ResourcesSpec:
        return ResourcesSpec.model_validate(self.resources)

    @cached_property
    def objective_spec(self) -> ObjectiveSpec:
        return ObjectiveSpec.model_validate(self.objective)

    @property
    def seed(self) -> int:
        return int(self.run["seed"])

    @property
    def replicate(self) -> Replicate:
        configuration, steps = self.label.removesuffix(f" seed={self.seed}"), self.run["training"]["warm_start_steps"]
        return Replicate(self.trial_id, configuration, self.seed, self.total_steps, int(steps))

    @property
    def since_attempt(self) -> int:
        """The first attempt whose checkpoints are the trial's own past; earlier ones were given up by an exploit."""
        return int(self.lineage["attempt"]) if self.lineage else 0
