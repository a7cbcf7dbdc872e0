"""Everything that one run can be told; the rules between settings are in `rules`.

Imports neither torch nor ray: reading a configuration is instant and works on a login node.
Names are those of the paper; every setting has one name in YAML, code, Parquet and plots (`short_names`).
"""

from __future__ import annotations

import collections
import difflib
import functools
import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from ebft_study.errors import ConfigError, rule_broken
from ebft_study.rules import broken_rules

Whitening = Literal["none", "variant_i", "variant_ii", "variant_iii", "reference_code"]


class Section(BaseModel):
    """Base of all configuration models: unknown keys are refused, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


SectionT = TypeVar("SectionT", bound=Section)


class DataConfig(Section):
    """What the model is fine-tuned on."""

    dataset: str = Field("qa", description="stdlib | unstructured | qa | a preset | a .jsonl/.parquet path | a hub id")
    dataset_config: str | None = Field(None, description="configuration name of a hub data set")
    dataset_revision: str | None = Field(None, description="commit or tag of a hub data set")
    text_column: str | None = Field(None, description="raw text: the column with the text")
    prompt_column: str | None = Field(None, description="prompt and answer: the column with the prompt")
    answer_column: str | None = Field(None, description="prompt and answer: the column with the answer")
    max_examples: PositiveInt | None = Field(None, description="use at most this many training examples")
    sequence_length: int = Field(128, ge=2, description="T, tokens per training sequence")
    packing: bool = Field(False, description="fill sequences with several documents; no context crosses a boundary")

    @model_validator(mode="after")
    def _columns_belong_together(self) -> DataConfig:
        if (self.prompt_column is None) != (self.answer_column is None):
            raise ValueError("prompt_column and answer_column must be given together")
        if self.text_column and self.prompt_column:
            raise ValueError("give text_column (raw text) or prompt_column and answer_column, not both")
        return self


class RolloutConfig(Section):
    """How completions are sampled (method.md sections 1 and 2)."""

    n_samples: PositiveInt = Field(4, description="n, completions per context")
    completion_length: PositiveInt = Field(8, description="G, tokens per completion")
    stride: PositiveInt = Field(8, description="s, distance between anchors")
    first_context_length: PositiveInt | None = Field(None, description="C, shortest context; default: stride")
    temperature: float = Field(0.6, gt=0.0, description="tau of the sampling policy")
    anchor_region: Literal["all", "answer"] = "all"
    backend: Literal["strided", "vllm"] = Field("strided", description="strided: in process; vllm: an engine beside it")
    sync_every_steps: PositiveInt = Field(1, description="vllm: updates between two transfers of the weights")
    max_policy_lag: int = Field(0, ge=0, description="vllm: updates by which the weights that sample may be behind")
    importance_ratio_clip: float = Field(
        2.0, ge=1.0, description="vllm: largest weight of a completion, pi_trainer / pi_engine"
    )
    parity_threshold: float | None = Field(
        None,
        gt=0.0,
        description="vllm: largest mean difference of log-probabilities, engine against trainer, after a transfer; "
        "default: 0.0001, or 0.3 in bfloat16",
    )

    @property
    def context_length(self) -> int:
        return self.first_context_length or self.stride


class FeaturesConfig(Section):
    """The frozen feature network (method.md section 3)."""

    feature_network: str = Field("base", description="'base' (the generator before any training), a name, or a path")
    random_weights: bool = Field(False, description="same architecture, random weights (an ablation)")
    depths: tuple[float, ...] = Field((0.25, 0.5, 0.75), min_length=1, description="relative depths in (0, 1]")
    pooling: Literal["last_token", "mean", "concat"] = "last_token"
    normalize: Literal["per_layer", "joint"] = "per_layer"
    backend: Literal["auto", "local", "service"] = Field(
        "auto",
        description="local: a network per trial; service: one for all trials; auto: whatever the plan finds better",
    )
    cache_memory_gib: float = Field(0.5, ge=0.0, description="service: features kept in memory")
    cache_disk_gib: float = Field(2.0, ge=0.0, description="service: features kept on disk, for later studies too")
    service_timeout_seconds: float = Field(120.0, gt=0.0, description="service: longest wait for an answer")

    @property
    def is_base(self) -> bool:
        """Whether the network is the generator as it was before training."""
        return self.feature_network == "base" and not self.random_weights

    @model_validator(mode="after")
    def _depths_in_range(self) -> FeaturesConfig:
        for depth in self.depths:
            if not 0.0 < depth <= 1.0:
                raise ValueError(f"every depth must lie in (0, 1], but got {depth}")
        if len(set(self.depths)) != len(self.depths):
            raise ValueError("depths must differ from each other")
        return self


class VllmConfig(Section):
    """The engine of `rollout.backend: vllm`."""

    engine_scope: Literal["trial", "study"] = Field(
        "trial", description="trial: an engine each; study: one engine takes turns with the weights of all trials"
    )
    placement: Literal["own", "colocated"] = Field(
        "own", description="own: GPUs of its own; colocated: on the trainer's GPU, asleep while that trains"
    )
    tensor_parallel_size: PositiveInt = Field(
        1, description="GPUs (processes, on a CPU) that share the engine's weights"
    )
    longest_request_tokens: PositiveInt | None = Field(
        None, description="prompt and completion; default: of the trial's sequences, or of all that share the engine"
    )
    gpu_memory_utilization: float = Field(0.3, gt=0.0, le=1.0, description="fraction of its GPU that the engine takes")
    kv_cache_gib: float = Field(1.0, gt=0.0, description="on a CPU: keys and values that the engine keeps")
    engine_timeout_seconds: float = Field(600.0, gt=0.0, description="longest wait for a batch of rollouts")


class RewardConfig(Section):
    """Rewards and baseline (method.md sections 4 to 6)."""

    alpha: float = Field(1.0, ge=0.0, le=1.0, description="weight of the diversity term; 1 is the proper scoring rule")
    whitening: Whitening = "none"
    baseline: Literal["rloo", "naive", "group_norm", "none"] = "rloo"


class LossConfig(Section):
    """How rewards and cross-entropy become one loss (method.md section 6)."""

    gamma: float = Field(0.0, ge=0.0, description="weight of the cross-entropy term")
    aggregation: Literal["token_mean", "sum"] = "token_mean"
    kl_coefficient: float = Field(0.0, ge=0.0, description="weight of the KL term to the base model")
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    ce_region: Literal["all", "answer"] = Field("all", description="tokens that carry cross-entropy, SFT included")


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: float = Field(1e-4, ge=0.0)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_fraction: float = Field(0.03, ge=0.0, le=1.0)
    final_learning_rate_fraction: float = Field(0.1, ge=0.0, le=1.0, description="where cosine ends, relative")
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0.0)
    max_grad_norm: float | None = Field(1.0, gt=0.0)
    ema_decay: float | None = Field(None, gt=0.0, lt=1.0, description="evaluate an exponential average of the weights")


class TrainingConfig(Section):
    """Length and placement of a run."""

    steps: int = Field(100, ge=0, description="optimizer updates by the method, after any warm start")
    batch_size: PositiveInt = Field(8, description="sequences per optimizer update, over all workers")
    micro_batch_size: PositiveInt | None = Field(None, description="sequences per pass; default: as many as fit")
    anchors_at_once: PositiveInt | None = Field(None, description="anchors per pass; default: as many as fit")
    memory_budget_gib: float | None = Field(
        None,
        gt=0.0,
        description="what one worker may use; default: 90 % of its GPU, or 4 GiB (more if needed) on a CPU",
    )
    warm_start_steps: int = Field(0, ge=0, description="SFT updates before the method starts")
    warm_start_learning_rate: float | None = Field(None, gt=0.0, description="default: learning_rate")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="type that passes compute in; frozen networks are stored in it"
    )
    weight_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="type of trained weights, their gradients and optimizer states; bfloat16 saves memory"
    )
    sharding: Literal["none", "fsdp"] = Field(
        "none", description="fsdp: divide weights and optimizer states among a trial's workers; none: repeat them"
    )
    activation_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass instead of keeping them"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["auto", "chunked", "flex"] = Field("auto", description="auto: flex on a GPU, chunked elsewhere")
    log_every_steps: PositiveInt = 5
    sample_every_steps: PositiveInt = Field(50, description="write a few rollouts with their rewards this often")


class LoraConfig(Section):
    """Low-rank adapters: only these are trained, so the model's own weights also serve as feature network."""

    lora_rank: int = Field(0, ge=0, description="rank of the adapters; 0 trains all weights instead")
    lora_alpha: float = Field(32.0, gt=0.0, description="adapters are scaled by lora_alpha / lora_rank")
    lora_targets: Annotated[
        tuple[str, ...], BeforeValidator(lambda given: [given] if isinstance(given, str) else given)
    ] = Field(("all-linear",), min_length=1, description="names of linear layers; all-linear: all but the head")

    @model_validator(mode="after")
    def _all_or_some(self) -> LoraConfig:
        if "all-linear" in self.lora_targets and len(self.lora_targets) > 1:
            raise ValueError("lora_targets must be all-linear alone, or names of layers without it")
        return self


class EvaluationConfig(Section):
    """Validation during the run (split `validation`) and before and after it (split `heldout`)."""

    eval_every_steps: PositiveInt = 50
    validation_sequences: PositiveInt = 64
    heldout_sequences: PositiveInt = 256
    cfm_samples: int = Field(4, ge=2, description="completions per context when estimating cfm_loss")
    profile_lengths: tuple[PositiveInt, ...] = Field((1, 2, 4, 8, 16, 32), min_length=1)
    evaluation_temperature: float | None = Field(None, gt=0.0, description="default: temperature")
    evaluation_seed: int = Field(0, ge=0, description="common random numbers: the same in every trial of a study")


class CheckpointConfig(Section):
    """What is kept of a trial, to resume from and to use afterwards."""

    checkpoint_every_steps: PositiveInt = 50
    keep_checkpoints: PositiveInt = Field(2, description="the newest ones")
    keep_best: int = Field(1, ge=0, description="the best ones by the study's objective")
    keep_every_steps: PositiveInt | None = Field(None, description="checkpoints of every so many steps stay for good")


class TrackingConfig(Section):
    """Weights & Biases; nothing is sent unless asked for."""

    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "ebft-study"
    wandb_entity: str | None = Field(None, description="user or team; default: that of the login")


class RunConfig(Section):
    """One run: a method, a model, data and every setting. A study varies these keys."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    method: Literal["ebft", "sft"] = "ebft"
    model: str = Field("tiny-1m", description="tiny-1m | tiny-4m | tiny-16m | a hub id | a local folder")
    model_revision: str | None = None
    seed: int = Field(0, ge=0)
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    vllm: VllmConfig = VllmConfig()
    features: FeaturesConfig = FeaturesConfig()
    reward: RewardConfig = RewardConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    lora: LoraConfig = LoraConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def uses_engine(self) -> bool:
        """Whether its rollouts come from an inference engine."""
        return self.method == "ebft" and self.rollout.backend == "vllm"

    @property
    def feature_model(self) -> tuple[str, str | None]:
        """Name and revision of the model that the feature network is made from."""
        if self.features.feature_network == "base":
            return self.model, self.model_revision
        return self.features.feature_network, None

    @property
    def longest_request(self) -> int:
        """Tokens of prompt and completion that an engine is asked for at most."""
        return self.data.sequence_length + self.rollout.completion_length

    @property
    def total_steps(self) -> int:
        """Optimizer updates of the whole run; `step` counts up to this."""
        return self.training.warm_start_steps + self.training.steps


# --- keys: dotted paths and the short names that people type ---------------------------------------------------


@functools.cache
def all_keys() -> dict[str, Any]:
    """Every setting of a run as dotted path -> default value, in the order of the models."""
    found: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.default, Section):
            found |= {f"{name}.{leaf}": getattr(field.default, leaf) for leaf in type(field.default).model_fields}
        else:
            found[name] = field.default
    return found


@functools.cache
def short_names() -> dict[str, str]:
    """Short name -> dotted path."""
    return {short_name(path): path for path in all_keys()}


def resolve_key(key: str, *, source: str = "command line") -> str:
    """The dotted path of `key`, which may be a path or a short name; refuses others with the nearest name."""
    if key in all_keys():
        return key
    if key in short_names():
        return short_names()[key]
    raise ConfigError(f"{source}: unknown key {key!r}.{_nearest(key, [*short_names(), *all_keys()])}")


def short_name(path: str) -> str:
    """The one name of a setting in tables and plots: `reward.alpha` -> `alpha`.

    Where two sections have a setting of one name, it goes with the section's: `rollout.backend` -> `rollout_backend`.
    """
    section, _, leaf = path.rpartition(".")
    return f"{section}_{leaf}" if leaf in _shared_leaves() else leaf


@functools.cache
def _shared_leaves() -> frozenset[str]:
    counts = collections.Counter(path.rpartition(".")[2] for path in all_keys())
    return frozenset(leaf for leaf, count in counts.items() if count > 1)


def flatten(config: RunConfig) -> dict[str, Any]:
    """All settings as short name -> value: the hyperparameter columns of the results."""
    return {name: getattr(getattr(config, section) if section else config, leaf) for name, section, leaf in _places()}


@functools.cache
def _places() -> tuple[tuple[str, str, str], ...]:
    """(short name, section or '', name there) of every setting."""
    return tuple((short_name(path), path.rpartition(".")[0], path.rpartition(".")[2]) for path in all_keys())


# --- reading ---------------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from `path`, read safely."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Check the path, or see search_spaces/ for ready files") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error}). Give a YAML file") from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{path}: is not valid YAML ({problem}). Mend the line it names") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {type(content).__name__}, not a mapping. Write 'key: value' lines")
    return content


def build_run(settings: dict[str, Any], *, source: str) -> RunConfig:
    """A checked `RunConfig` from nested settings; raises `ConfigError` naming `source` and the key."""
    config = parse(RunConfig, settings, source=source)
    for key, given, rule, remedy in broken_rules(config):
        raise rule_broken(source=source, key=key, given=given, rule=rule, remedy=remedy)
    return config


def load_run(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """A run from a YAML file and `key=value` overrides (short names allowed)."""
    settings = nest(read_yaml(path), source=str(path))
    for item in overrides or []:
        key, value = parse_override(item)
        set_path(settings, resolve_key(key), value)
    return build_run(settings, source=str(path))


def parse_override(item: str) -> tuple[str, Any]:
    """`alpha=0.5` -> ("alpha", 0.5); values are read as YAML."""
    key, separator, value = item.partition("=")
    if not separator or not key:
        raise ConfigError(f"command line: {item!r} is not an override. Write key=value, for example alpha=0.5")
    try:
        return key.strip(), as_number(yaml.safe_load(value))
    except yaml.YAMLError:
        raise ConfigError(f"command line: {item!r}: the value is not valid YAML. Quote it") from None


def nest(settings: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Settings in any mix of sections, dotted paths and short names, as sections only."""
    nested: dict[str, Any] = {}
    sections = {name for name, field in RunConfig.model_fields.items() if isinstance(field.default, Section)}
    for key, value in settings.items():
        if key in sections and isinstance(value, dict):
            for leaf, leaf_value in value.items():
                set_path(nested, f"{key}.{leaf}", as_number(leaf_value))
        elif key in sections:
            raise ConfigError(f"{source}: {key}={value!r}: is a section. Write its settings indented below it")
        else:
            set_path(nested, resolve_key(str(key), source=source), as_number(value))
    return nested


def set_path(settings: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path of at most two parts in nested settings."""
    section, _, leaf = path.rpartition(".")
    (settings.setdefault(section, {}) if section else settings)[leaf] = value


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with `changes` laid over `base`; neither is modified."""
    merged = dict(base)
    for key, value in changes.items():
        merged[key] = merge(base.get(key, {}), value) if isinstance(value, dict) else value
    return merged


def parse(model: type[SectionT], settings: dict[str, Any], *, source: str) -> SectionT:
    """Validate `settings`, turning the first problem into one line for people."""
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(model, error)}") from None


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"]) or "the file"
    if problem["type"] == "extra_forbidden":
        siblings = _siblings(model, problem["loc"])
        return f"unknown key {key!r}.{_nearest(str(problem['loc'][-1]), siblings)}"
    given = "" if isinstance(problem["input"], dict) else f"={problem['input']!r}"
    more = len(error.errors()) - 1
    also = f" ({more} more problem{'s' if more > 1 else ''} in this file)" if more else ""
    return f"{key}{given}: {problem['msg'].removeprefix('Value error, ')}.{also}"


def _siblings(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    current: Any = model
    for part in location[:-1]:
        field = current.model_fields.get(part) if hasattr(current, "model_fields") else None
        current = field.annotation if field else None
    return list(getattr(current, "model_fields", {}))


def _nearest(name: str, candidates: list[str]) -> str:
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" Known keys: {', '.join(sorted(set(candidates)))}"


def as_number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as a string; people mean the number."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return number if math.isfinite(number) else value
    if isinstance(value, list):
        return [as_number(item) for item in value]
    return value
