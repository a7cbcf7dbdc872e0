"""The sections of a study file, one pydantic model each. `study_file.load_study` reads and checks a file."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from ebft_study import plugins
from ebft_study.config import EARLIER_DEFAULTS, RunConfig, Section, all_keys, flatten
from ebft_study.study.spec.axis import Axis, as_axis, in_lists
from ebft_study.study.spec.links import Link

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
MOST_SEEDS = 1000
NEVER_IN_A_PROFILE = (
    "study",
    "question",
    "axes",
    "linked",
    "exclude",
    "seeds",
    "search",
    "stopping",
    "objective",
    "method",
)


class SeedsSpec(Section):
    """The seeds of every configuration: a list, or `start` of them for all, and more for the best (`promotion`).

    In a study file `seeds: [0, 1, 2]` or `seeds: {start: 1, promote: [3, 5]}`.
    """

    start: PositiveInt | None = Field(
        None, le=MOST_SEEDS, description="every configuration is run with the seeds 0 .. start-1"
    )
    promote: tuple[Annotated[int, Field(ge=1, le=MOST_SEEDS)], ...] = Field(
        (), description="the best of these get this many seeds, the best of those the next number, ..."
    )
    listed: tuple[int, ...] = ()
    """The seeds of a list, all of which every configuration gets."""

    @model_validator(mode="before")
    @classmethod
    def _a_list_or_levels(cls, seeds: Any) -> Any:
        if isinstance(seeds, Mapping | SeedsSpec):
            return seeds
        if not isinstance(seeds, list | tuple) or not seeds:
            raise ValueError("is no list of seeds. Write [0, 1, 2], or {start: 1, promote: [3, 5]}")
        return {"listed": seeds}

    @model_validator(mode="after")
    def _rules(self) -> SeedsSpec:
        if len(set(self.listed)) != len(self.listed):
            raise ValueError("lists a seed twice. Statistics need independent seeds: list each once")
        if min(self.listed, default=0) < 0:
            raise ValueError("seeds are not negative. Use 0, 1, 2, ...")
        if self.listed and (self.start is not None or self.promote):
            raise ValueError("is either a list of seeds, or start and promote. Keep one of the two")
        if not self.listed and (self.start is None or not self.promote):
            raise ValueError("needs both start and promote. Write {start: 1, promote: [3, 5]}, or a list of seeds")
        if any(after <= before for before, after in itertools.pairwise(self.levels)):
            numbers = ", ".join(map(str, self.promote))
            raise ValueError(
                f"promote: [{numbers}] does not rise from start: {self.start}. Each level has more seeds than the one "
                "before it, as in {start: 1, promote: [3, 5]}"
            )
        return self

    @model_serializer
    def _as_in_the_file(self) -> list[int] | dict[str, Any]:
        return list(self.listed) or {"start": self.start, "promote": list(self.promote)}

    @property
    def levels(self) -> tuple[int, ...]:
        """Numbers of seeds: of all configurations, then of those that were promoted once, twice, ..."""
        return (len(self.listed),) if self.listed else (self.start or 0, *self.promote)

    @property
    def promotes(self) -> bool:
        """Whether only the best configurations get all seeds."""
        return bool(self.promote)

    @property
    def all(self) -> tuple[int, ...]:
        return self.listed or tuple(range(self.levels[-1]))


PLUGIN = "package.module:name"
"""All plug-ins, where one of them is named with our own."""


def _one_of(names: Iterable[str]) -> WithJsonSchema:
    """The values of a setting in the reference of study files."""
    return WithJsonSchema({"enum": [*names, PLUGIN]})


SAMPLERS = ("tpe", "gp", "qmc", "random", "nsga2")
LEARN_FROM_OTHERS = ("tpe", "gp")
"""Samplers that learn from every result; nsga2 chooses parents among its own, qmc and random learn nothing."""


class SearchSpec(Section):
    """Choice of configurations from the axes."""

    algorithm: Literal["grid", "random", "optuna"] = "grid"
    num_configurations: PositiveInt | None = Field(None, le=100_000, description="random and optuna: how many to try")
    sampler: Annotated[str, AfterValidator(plugins.choice(SAMPLERS)), _one_of(SAMPLERS)] = Field(
        "tpe",
        description="optuna: how to suggest; gp: Gaussian process; qmc: evenly spread, whatever the results; nsga2: "
        "evolution, for several objectives; package.module:name: a sampler of Optuna's or of your own",
    )
    sampler_options: dict[str, Any] = Field(
        default_factory=dict, description="package.module:name: what it is called with, besides a seed"
    )
    population_size: int = Field(10, ge=2, description="nsga2: configurations of a generation")
    search_seed: int = Field(0, ge=0, description="random and optuna: seed of the choice of configurations")
    known: tuple[dict[str, Any], ...] = Field(
        (), description="random and optuna: points that are tried first, as axis -> value; other axes are drawn"
    )
    warm_start_from: tuple[str, ...] = Field(
        (), description="optuna: names or folders of earlier studies, of whose results the sampler is told"
    )

    @field_validator("sampler", mode="before")
    @classmethod
    def _no_grid_sampler(cls, value: Any) -> Any:
        if value in ("grid", "brute_force"):
            raise ValueError("an Optuna search cannot be a grid. Use algorithm: grid, or another sampler")
        return value

    @model_validator(mode="after")
    def _number_where_needed(self) -> SearchSpec:
        if self.algorithm == "grid" and self.num_configurations is not None:
            raise ValueError("a grid runs every combination. Drop num_configurations, or use algorithm: random")
        if self.algorithm != "grid" and self.num_configurations is None:
            raise ValueError(f"a {self.algorithm} search needs num_configurations. Say how many to try")
        return self

    @model_validator(mode="after")
    def _options_of_plugins(self) -> SearchSpec:
        if self.sampler_options and not plugins.is_path(self.sampler):
            raise ValueError(f"sampler_options: only a package.module:name has any, and not {self.sampler}. Drop it")
        return self

    @model_validator(mode="after")
    def _reuse_where_it_has_an_effect(self) -> SearchSpec:
        if self.known and self.algorithm == "grid":
            raise ValueError("known: a grid runs every combination. Drop known, or use algorithm: random")
        if self.known and len(self.known) > (self.num_configurations or 0):
            raise ValueError(f"known: lists {len(self.known)} points. Use num_configurations >= {len(self.known)}")
        learns = self.algorithm == "optuna" and self.sampler in LEARN_FROM_OTHERS
        if self.warm_start_from and not learns:
            names = " or ".join(LEARN_FROM_OTHERS)
            raise ValueError(f"warm_start_from: only these samplers learn from it. Use algorithm: optuna with {names}")
        return self


SCHEDULERS = ("none", "asha", "hyperband", "median", "extrapolation", "race", "pbt")
USED_BY = {
    "grace_period_steps": ("asha", "hyperband", "median", "extrapolation", "race", PLUGIN),
    "options": (PLUGIN,),
    "reduction_factor": ("asha", "hyperband"),
    "brackets": ("asha",),
    "min_samples_required": ("median",),
    "confidence": ("extrapolation",),
    "error_rate": ("race",),
    "margin": ("race",),
    "perturbation_interval_steps": ("pbt",),
    "quantile_fraction": ("pbt",),
    "resample_probability": ("pbt",),
    "perturbed_axes": ("pbt",),
    "perturbation_seed": ("pbt",),
}
"""Setting -> the schedulers that use it."""


def is_used(setting: str, kind: str) -> bool:
    """Whether a scheduler of this kind uses a setting."""
    return (PLUGIN if plugins.is_path(kind) else kind) in USED_BY.get(setting, (PLUGIN, *SCHEDULERS))


class SchedulerSpec(Section):
    """Early stopping of configurations that fall behind, or (pbt) continue from better ones. Baselines are exempt.

    docs/schedulers.md and docs/population.md compare them.
    """

    kind: Annotated[str, AfterValidator(plugins.choice(SCHEDULERS)), _one_of(SCHEDULERS)] = "none"
    grace_period_steps: PositiveInt = Field(50, description="no trial is stopped before this step")
    reduction_factor: int = Field(3, ge=2, description="about one of this many configurations continues at each rung")
    brackets: PositiveInt = Field(1, description="asha: groups of configurations, each with its first rung one later")
    min_samples_required: PositiveInt = Field(3, description="median: other trials at its seeds needed to stop one")
    confidence: float = Field(
        0.95, gt=0.0, lt=1.0, description="extrapolation: of the intervals of final values that must not overlap"
    )
    error_rate: float = Field(
        0.05, gt=0.0, lt=1.0, description="race: probability that any configuration is stopped wrongly in the study"
    )
    margin: float = Field(
        0.0, ge=0.0, description="race: how much worse than the best is worse, in units of the objective"
    )
    perturbation_interval_steps: PositiveInt = Field(50, description="pbt: trials are compared this often")
    quantile_fraction: float = Field(
        0.25,
        gt=0.0,
        le=0.5,
        description="pbt: this fraction, the worst, continues from the states of as many of the best",
    )
    resample_probability: float = Field(
        0.25, ge=0.0, le=1.0, description="pbt: a setting is drawn anew rather than moved a little"
    )
    perturbed_axes: tuple[str, ...] | None = Field(
        None, description="pbt: axes that are perturbed; default: all. The others are copied from the donor"
    )
    perturbation_seed: int = Field(0, ge=0, description="pbt: seed of the choice of donors and settings")
    options: dict[str, Any] = Field(default_factory=dict, description="package.module:name: what it is called with")

    @model_validator(mode="after")
    def _only_what_is_used(self) -> SchedulerSpec:
        """`kind: none` switches the section off; any other kind refuses settings that it does not use."""
        for name, kinds in USED_BY.items():
            if self.kind != "none" and name in self.model_fields_set and not is_used(name, self.kind):
                given, users = getattr(self, name), " and ".join(kinds)
                raise ValueError(f"{name}={given}: is a setting of {users}, and kind is {self.kind}. Drop it")
        return self

    @model_serializer(mode="wrap")
    def _what_is_used(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: v for k, v in handler(self).items() if is_used(k, self.kind)}

    @property
    def compares(self) -> bool:
        """Whether configurations are compared, to stop those that are behind."""
        return self.kind not in ("none", "pbt")

    @property
    def takes_turns(self) -> bool:
        """Whether trials pause for others, so that more of them are under way than there are slots."""
        return self.kind in ("race", "pbt")

    def comparison_steps(self, evaluated: Iterable[int], *, warm_start_steps: int, total_steps: int) -> list[int]:
        """race: the evaluations that compare, from the grace period on, after warm starts, before the end."""
        first = max(self.grace_period_steps, warm_start_steps + 1)
        return [step for step in sorted(set(evaluated)) if first <= step < total_steps]

    def given(self) -> dict[str, Any]:
        """The settings of the file, without defaults: profiles and overrides are merged into these."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class DivergenceRule(Section):
    """Cross-entropy above the base model's."""

    margin: float = Field(0.05, ge=0.0, description="nats/token above the base model")
    evaluations: PositiveInt = Field(3, description="in a row")


class CollapseRule(Section):
    """Samples that are all alike."""

    duplicate_rate: float = Field(
        0.9,
        gt=0.0,
        le=1.0,
        description="metric duplicate_rate over its largest possible value, 1 - 1/n_samples",
    )
    entropy: float = Field(0.05, ge=0.0, description="of the policy, nats/token")
    evaluations: PositiveInt = Field(2, description="in a row")


class StagnationRule(Section):
    """No progress in the objective."""

    improvement: float = Field(0.0, ge=0.0, description="what counts as progress, in units of the objective")
    evaluations: PositiveInt = Field(5, description="without it")


class RewardHackingRule(Section):
    """A reward that rises with the validation feature-matching loss."""

    evaluations: PositiveInt = Field(3, description="rises in a row")


def _by_path(given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return dict(zip(plugins.as_paths(given), given.values(), strict=True))


Plugins = Annotated[dict[str, dict[str, Any]], AfterValidator(_by_path)]
"""Import path -> options."""


class StoppingSpec(Section):
    """Rules that look at one trial alone (`stopping.rules`); none applies unless it is named. Baselines are exempt."""

    divergence: DivergenceRule | None = None
    collapse: CollapseRule | None = None
    stagnation: StagnationRule | None = None
    reward_hacking: RewardHackingRule | None = None
    functions: Plugins = Field(
        default_factory=dict, description="rules of your own: package.module:name -> what it is called with"
    )


class ObjectiveSpec(Section):
    """The validation metric that search and early stopping look at; a study file may list several."""

    metric: str = "cfm_loss"
    mode: Literal["min", "max"] = "min"
    further: tuple[ObjectiveSpec, ...] = ()
    """The other objectives, where a study file lists several; schedulers and stopping rules look at the first."""

    @property
    def all(self) -> tuple[ObjectiveSpec, ...]:
        return (self, *self.further)

    @property
    def further_metrics(self) -> tuple[str, ...]:
        return tuple(one.metric for one in self.further)


class BudgetSpec(Section):
    max_concurrent_trials: PositiveInt | None = Field(None, description="default: as many as the machine holds")
    max_hours: PositiveFloat | None = Field(
        None, description="of all sessions together; trials that run then are stopped, and can be resumed"
    )


class TrialResources(Section):
    """Resources of trials with one value of a setting; those that are not given stay as they are for all."""

    workers_per_trial: int | None = Field(None, ge=0)
    cpus_per_worker: PositiveInt | None = None
    gpus_per_worker: float | None = Field(None, ge=0.0)


class ResourcesSpec(Section):
    """The resources of one trial."""

    workers_per_trial: int = Field(1, ge=0, description="0: in the trial's own process, which starts much sooner")
    cpus_per_worker: PositiveInt = 1
    gpus_per_worker: float = Field(0.0, ge=0.0)
    feature_gpus: float = Field(0.0, ge=0.0, description="GPUs of a feature service, if trials are on GPUs")
    max_failures: int = Field(
        1,
        ge=0,
        description="how often a crashed trial is started again from its checkpoint; a lost node is no crash",
    )
    by: dict[str, dict[str, TrialResources]] = Field(
        default_factory=dict,
        description="setting -> value -> the resources of trials with it, e.g. larger models more GPUs",
    )

    @field_validator("by", mode="before")
    @classmethod
    def _values_as_text(cls, by: Any) -> Any:
        """Values are keys here, whatever their type."""
        if not isinstance(by, Mapping):
            return by
        return {k: {str(v): r for v, r in of.items()} if isinstance(of, Mapping) else of for k, of in by.items()}

    @field_serializer("by")
    def _only_what_is_given(self, by: dict[str, dict[str, TrialResources]]) -> dict[str, Any]:
        return {
            key: {v: resources.model_dump(exclude_none=True) for v, resources in of.items()} for key, of in by.items()
        }

    @model_validator(mode="after")
    def _gpus_are_whole_above_one(self) -> ResourcesSpec:
        for gpus in (self.gpus_per_worker, *(r.gpus_per_worker or 0.0 for of in self.by.values() for r in of.values())):
            if gpus > 1 and not gpus.is_integer():
                raise ValueError(f"gpus_per_worker={gpus:g}: a part of a GPU, or whole ones. Use 0.5, 1, 2, ...")
        return self

    def for_run(self, run: RunConfig) -> ResourcesSpec:
        """The resources of a trial with these settings; of several overrides of one key the last one counts."""
        if not self.by:
            return self
        settings = flatten(run)
        changes: dict[str, Any] = {"by": {}}
        for name, values in self.by.items():
            for value, resources in values.items():
                if key_matches(value, settings.get(name)):
                    changes |= resources.model_dump(exclude_none=True)
        return self.model_copy(update=changes)

    def device_of(self, run: RunConfig) -> Literal["cpu", "cuda"]:
        """The kind of device that the workers of a trial compute on."""
        return "cuda" if self.for_run(run).gpus_per_worker and run.training.device != "cpu" else "cpu"

    @property
    def has_workers(self) -> bool:
        """Whether any trial has worker processes of its own."""
        return bool(self.workers_per_trial) or any(r.workers_per_trial for of in self.by.values() for r in of.values())

    @property
    def processes(self) -> int:
        """Processes of a trial that train concurrently."""
        return max(1, self.workers_per_trial)

    @property
    def gpu_fraction(self) -> float:
        """The part of a GPU that a worker may use; without effect on a CPU."""
        return min(self.gpus_per_worker, 1.0) or 1.0

    @property
    def gpus(self) -> float:
        """All GPUs of one trial."""
        return self.processes * self.gpus_per_worker


class Profile(Section):
    """Model, sizes and resources for one type of machine."""

    run: dict[str, Any] = Field(default_factory=dict)
    choices: dict[str, dict[str, dict[str, Any]]] = Field(
        default_factory=dict, description="axis -> choice -> its settings in this profile"
    )
    baselines: dict[str, dict[str, Any]] = Field(default_factory=dict, description="further settings of baselines")
    scheduler: dict[str, Any] = Field(default_factory=dict)
    budget: dict[str, Any] = Field(default_factory=dict)
    resources: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _only_sizes(cls, profile: Any) -> Any:
        for key in NEVER_IN_A_PROFILE:
            if isinstance(profile, Mapping) and key in profile:
                raise ValueError(f"{key}: is part of what is studied, the same everywhere. Move it out of the profile")
        return profile


class StudySize(Section):
    """The axes, seeds and baselines of a study before it was extended."""

    axes: dict[str, Any]
    seeds: tuple[int, ...]
    baselines: tuple[str, ...]
    num_configurations: PositiveInt | None = None

    @classmethod
    def from_spec(cls, spec: StudySpec) -> StudySize:
        return cls(
            axes=spec.model_dump(mode="json")["axes"],
            seeds=spec.seeds.all,
            baselines=tuple(spec.baselines),
            num_configurations=spec.search.num_configurations,
        )

    def applied(self, spec: StudySpec) -> StudySpec:
        """The study, which was extended since, at this size."""
        content = spec.model_dump(mode="json", exclude={"profiles", "extended_from"})
        search = {**content["search"], "num_configurations": self.num_configurations}
        baselines = {name: content["baselines"][name] for name in self.baselines}
        return StudySpec.model_validate(
            {**content, "axes": self.axes, "seeds": self.seeds, "baselines": baselines, "search": search}
        )


class EarlierPoint(Section):
    """A configuration of an earlier study, on the axes of this one."""

    configuration: str
    assignment: dict[str, Any] = Field(description="axis -> value; a choice by its name")
    values: tuple[float, ...] = Field(description="each objective's mean over its seeds, on the validation split")


class EarlierStudy(Section):
    """What a search was told of an earlier study: complete, so that a resumed search needs that study no more."""

    study: str
    sha256: str = Field(description="of the points")
    data: dict[str, str] = Field(description="fingerprints of its data")
    models: dict[str, str] = Field(description="fingerprints of its models")
    points: tuple[EarlierPoint, ...]
    not_used: dict[str, int] = Field(description="reason -> configurations")


class StudySpec(Section):
    """One study. After `load_study`, `run` and `baselines` are nested by section and `profiles` is empty."""

    study: str = Field(pattern=NAME_PATTERN, max_length=100)
    question: str = Field(min_length=1)
    run: dict[str, Any] = Field(default_factory=dict)
    axes: dict[str, Axis] = Field(default_factory=dict)
    linked: dict[str, Link] = Field(default_factory=dict, description="setting -> how it is computed from others")
    exclude: tuple[dict[str, tuple[Any, ...]], ...] = Field(
        (), description="combinations that are not run; all of one must match"
    )
    seeds: SeedsSpec = SeedsSpec(listed=(0,))
    baselines: dict[str, dict[str, Any]] = Field(default_factory=dict)
    search: SearchSpec = SearchSpec()
    scheduler: SchedulerSpec = SchedulerSpec()
    stopping: StoppingSpec = StoppingSpec()
    objective: ObjectiveSpec = ObjectiveSpec()
    budget: BudgetSpec = BudgetSpec()
    resources: ResourcesSpec = ResourcesSpec()
    profiles: dict[str, Profile] = Field(default_factory=dict)
    first_name: str | None = Field(None, description="its name before it was renamed; not for study files")
    extended_from: tuple[StudySize, ...] = Field((), description="its size before each --extend; not for study files")
    warm_start: tuple[EarlierStudy, ...] = Field((), description="what its search was told; not for study files")
    callbacks: Plugins = Field(
        default_factory=dict, description="what to notify: package.module:name -> what it is called with"
    )
    defaults: dict[str, Any] = Field(
        default_factory=lambda: {path: all_keys()[path] for path in EARLIER_DEFAULTS},
        description="setting -> its default when the study began, where versions differ; not for study files",
    )

    @property
    def drawn_by(self) -> str:
        """The name by which it draws at random, and of its Optuna study: a renamed study keeps the first one."""
        return self.first_name or self.study

    @property
    def told(self) -> tuple[EarlierPoint, ...]:
        """Results of earlier studies that the search begins with."""
        return tuple(point for earlier in self.warm_start for point in earlier.points)

    def with_session_of(self, other: StudySpec) -> StudySpec:
        """This study with the budget and the number of retries of `other`, which each session may set anew."""
        resources = self.resources.model_copy(update={"max_failures": other.resources.max_failures})
        return self.model_copy(update={"budget": other.budget, "resources": resources})

    @field_validator("axes", mode="before")
    @classmethod
    def _lists_are_choices(cls, axes: Any) -> Any:
        if not isinstance(axes, Mapping):
            return axes
        return {str(key): as_axis(str(key), axis) for key, axis in axes.items()}

    @field_validator("exclude", mode="before")
    @classmethod
    def _one_value_is_a_list(cls, exclude: Any) -> Any:
        if not isinstance(exclude, list | tuple) or not all(
            isinstance(exclusion, Mapping) and exclusion for exclusion in exclude
        ):
            raise ValueError("is a list of mappings. Write - {axis: value, other_axis: [first, second]}")
        return [in_lists(exclusion) for exclusion in exclude]

    @field_serializer("axes")
    def _choices_are_lists(self, axes: dict[str, Axis]) -> dict[str, Any]:
        return {key: axis.plain() for key, axis in axes.items()}

    @field_serializer("linked")
    def _one_form(self, linked: dict[str, Link]) -> dict[str, Any]:
        return {key: link.model_dump(mode="json", exclude_none=True) for key, link in linked.items()}

    @field_validator("objective", mode="before")
    @classmethod
    def _first_and_further(cls, objective: Any) -> Any:
        if isinstance(objective, Mapping) and "further" in objective:
            raise ValueError("several objectives are a list. Write - {metric: ..., mode: ...} for each")
        if not isinstance(objective, list | tuple):
            return objective
        if not objective or not all(isinstance(one, Mapping) for one in objective):
            raise ValueError("lists no objectives. Write - {metric: ce_loss, mode: min} for each")
        return {**objective[0], "further": objective[1:]}

    @field_serializer("objective")
    def _several_are_a_list(self, objective: ObjectiveSpec) -> Any:
        each = [one.model_dump(exclude={"further"}) for one in objective.all]
        return each if objective.further else each[0]

    @field_validator("baselines")
    @classmethod
    def _baseline_names(cls, baselines: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in baselines:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"{name!r} is not a name. Use letters, digits, '-' and '_'")
        return baselines


def key_matches(text: str, value: Any) -> bool:
    """Whether `text`, a key in a study file, is the value of a setting."""
    if isinstance(value, float):
        with contextlib.suppress(ValueError):
            return float(text) == value
    return text == str(value)


def paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings as dotted path -> value."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{leaf}": inner for leaf, inner in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def nested(run: RunConfig) -> dict[str, Any]:
    """The settings of a run as a study fixes them: without its name and seed, which the study gives."""
    return run.model_dump(mode="json", exclude={"name", "seed"})
