"""Settings of a run, one pydantic model per section. Names are those of the paper."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

from ebft_study import plugins

Whitening = Literal["none", "variant_i", "variant_ii", "variant_iii", "reference_code"]
Pooling = Literal["last_token", "mean", "concat"]
Normalization = Literal["per_layer", "joint", "token_per_layer", "token_joint"]


def _check_depths(depths: tuple[float, ...]) -> tuple[float, ...]:
    for depth in depths:
        if not 0.0 < depth <= 1.0:
            raise ValueError(f"every depth must lie in (0, 1], but got {depth}")
    if len(set(depths)) != len(depths):
        raise ValueError("depths must differ from each other")
    return depths


def _listed(value: object) -> object:
    """A text with commas as a list."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Depths = Annotated[tuple[float, ...], Field(min_length=1), AfterValidator(_check_depths)]
OneOrMore = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
DATASETS = (
    *("stdlib", "unstructured", "qa", "mini_functions", "mini_unstructured", "mini_translation", "mini_pretraining"),
    *("open_code_instruct", "swallow_code", "alma_human_parallel"),
)
"""Names that no entry point has another meaning for."""
VERIFIERS = ("unit_tests", "bleu", "exact_match", "comet")


def _built_in_or_plugin(names: tuple[str, ...]) -> AfterValidator:
    """The name of an entry point becomes its import path; other names are judged elsewhere."""
    return AfterValidator(lambda name: name if name in names else plugins.expanded(name))


class Section(BaseModel):
    """Base of all configuration models: refuses unknown keys; frozen once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """Data that the model is fine-tuned on."""

    dataset: Annotated[str, _built_in_or_plugin(DATASETS)] = Field(
        "qa",
        description="stdlib | unstructured | qa | mini_functions | mini_unstructured | mini_translation | a preset | "
        "a .jsonl/.parquet path | a hub id | package.module:name",
    )
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
    """Anchors, and the sampling of completions at them."""

    n_samples: PositiveInt = Field(4, description="n, completions per context")
    completion_length: PositiveInt = Field(8, description="G, tokens per completion")
    stride: PositiveInt = Field(8, description="s, distance between anchors")
    first_context_length: PositiveInt | None = Field(None, description="C, shortest context; default: stride")
    temperature: float = Field(0.6, gt=0.0, description="tau of the sampling policy")
    anchor_region: Literal["all", "answer"] = "all"
    backend: Literal["strided", "vllm"] = Field("strided", description="strided: in process; vllm: an inference engine")
    sync_every_steps: PositiveInt = Field(1, description="vllm: updates between two weight transfers")
    max_policy_lag: int = Field(0, ge=0, description="vllm: updates by which the sampling weights may be older")
    importance_ratio_clip: float = Field(
        2.0, ge=1.0, description="vllm: largest importance weight of a completion, pi_trainer / pi_engine"
    )
    max_answer_tokens: PositiveInt | None = Field(
        None, description="whole answers: L, most tokens, end token included; default: half of sequence_length"
    )
    overlong: Literal["verify", "mask"] = Field(
        "verify", description="whole answers: one that is cut at L is judged as it is, or left out of the step"
    )
    parity_threshold: float | None = Field(
        None,
        gt=0.0,
        description="vllm: largest mean difference of log-probabilities between engine and trainer after a transfer; "
        "default: 0.0001, or in bfloat16 10 times that between two of the trainer's own passes",
    )

    @property
    def context_length(self) -> int:
        return self.first_context_length or self.stride


class FeaturesConfig(Section):
    """The frozen feature network."""

    feature_network: str = Field("base", description="'base' (the generator before any training), a name, or a path")
    random_weights: bool = Field(False, description="same architecture, random weights (an ablation)")
    depths: Depths = Field((0.25, 0.5, 0.75), description="relative depths in (0, 1]")
    pooling: Pooling = "last_token"
    normalize: Normalization = Field(
        "per_layer", description="divide by the L2 norm of each layer or of all; token_*: each token's, before pooling"
    )
    backend: Literal["auto", "local", "service"] = Field(
        "auto",
        description="local: a network per trial; service: one for all trials; auto: the better one by the plan",
    )
    cache_memory_gib: float = Field(0.5, ge=0.0, description="service: feature cache in memory")
    cache_disk_gib: float = Field(2.0, ge=0.0, description="service: feature cache on disk, reused by later studies")
    service_timeout_seconds: float = Field(120.0, gt=0.0, description="service: longest wait for an answer")

    @property
    def is_base(self) -> bool:
        """Whether the network is the generator as it was before training."""
        return self.feature_network == "base" and not self.random_weights


class VllmConfig(Section):
    """The engine of `rollout.backend: vllm`."""

    engine_scope: Literal["trial", "study"] = Field(
        "trial", description="trial: one engine per trial; study: one for all trials, which loads their weights in turn"
    )
    placement: Literal["own", "colocated"] = Field(
        "own", description="own: GPUs of its own; colocated: on the trainer's GPU, asleep during training"
    )
    tensor_parallel_size: PositiveInt = Field(
        1, description="GPUs (processes, on a CPU) that share the engine's weights"
    )
    longest_request_tokens: PositiveInt | None = Field(
        None, description="prompt and completion; default: the longest of the trials that use the engine"
    )
    gpu_memory_utilization: float = Field(0.3, gt=0.0, le=1.0, description="fraction of its GPU's memory to reserve")
    kv_cache_gib: float = Field(1.0, gt=0.0, description="on a CPU: size of the KV cache")
    engine_timeout_seconds: float = Field(600.0, gt=0.0, description="longest wait for a batch of rollouts")


class RewardConfig(Section):
    """Rewards and their baseline."""

    alpha: float = Field(1.0, ge=0.0, le=1.0, description="weight of the diversity term; 1 is the proper scoring rule")
    whitening: Whitening = "none"
    baseline: Literal["rloo", "naive", "mean", "group_norm", "none"] = Field(
        "rloo", description="rlvr: group_norm is GRPO's, mean Dr. GRPO's"
    )
    verifier_weight: float = Field(
        0.0, ge=0.0, description="ebft: added rewards of a verifier, times this; completions are whole answers then"
    )


class LossConfig(Section):
    """Combination of rewards and cross-entropy into one loss."""

    gamma: float = Field(0.0, ge=0.0, description="weight of the cross-entropy term")
    aggregation: Literal["token_mean", "sum", "constant"] = Field(
        "token_mean", description="over a completion's tokens; constant: sum / max_answer_tokens (Dr. GRPO)"
    )
    clip_range: float = Field(
        0.2, gt=0.0, lt=1.0, description="rlvr with an engine: bound of |pi_trainer / pi_engine - 1| of a token (PPO)"
    )
    kl_coefficient: float = Field(0.0, ge=0.0, description="weight of the KL term to the base model, 1/beta of (10)")
    kl_estimator: Literal["sequence", "k1", "k2", "k3"] = Field(
        "sequence", description="sequence: gradient of the KL of completions; k1, k2, k3: of single tokens, biased"
    )
    ce_region: Literal["all", "answer"] = Field("all", description="tokens in the cross-entropy, in SFT too")


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
    rounding: Literal["nearest", "stochastic"] = Field(
        "nearest",
        description="of bfloat16 weights and optimizer states; stochastic: at random, so that small steps are not lost",
    )


class TrainingConfig(Section):
    """Steps, batches, memory and precision of a run."""

    steps: int = Field(100, ge=0, description="optimizer updates by the method, after any warm start")
    batch_size: PositiveInt = Field(8, description="sequences per optimizer update, over all workers")
    micro_batch_size: PositiveInt | None = Field(None, description="sequences per pass; default: as many as fit")
    anchors_at_once: PositiveInt | None = Field(None, description="anchors per pass; default: as many as fit")
    memory_budget_gib: float | None = Field(
        None,
        gt=0.0,
        description="memory that one worker may use; default: 90 % of its GPU, or 4 GiB (more if needed) on a CPU",
    )
    warm_start_steps: int = Field(0, ge=0, description="SFT updates before the method starts")
    warm_start_learning_rate: float | None = Field(None, gt=0.0, description="default: learning_rate")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="type of computation; frozen networks are stored in it"
    )
    weight_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="type of trained weights, their gradients and optimizer states; bfloat16 saves memory"
    )
    sharding: Literal["none", "fsdp"] = Field(
        "none",
        description="fsdp: divide weights, optimizer states and frozen networks among workers; none: repeat them",
    )
    activation_checkpointing: bool | None = Field(
        None,
        description="recompute activations in the backward pass instead of storing them; "
        "default: on a GPU, where a step takes less time so",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["auto", "chunked", "flex"] = Field("auto", description="auto: flex on a GPU, chunked elsewhere")
    log_every_steps: PositiveInt = 5
    sample_every_steps: PositiveInt = Field(50, description="steps between two samples of rollouts with their rewards")


class LoraConfig(Section):
    """Low-rank adapters: only they are trained, so the model's own weights also serve as feature network."""

    lora_rank: int = Field(0, ge=0, description="rank of the adapters; 0 trains all weights instead")
    lora_alpha: float = Field(32.0, gt=0.0, description="adapters are scaled by lora_alpha / lora_rank")
    lora_targets: Annotated[tuple[str, ...], OneOrMore] = Field(
        ("all-linear",), min_length=1, description="names of linear layers; all-linear: all but the head"
    )

    @model_validator(mode="after")
    def _all_or_some(self) -> LoraConfig:
        if "all-linear" in self.lora_targets and len(self.lora_targets) > 1:
            raise ValueError("lora_targets must be all-linear alone, or names of layers without it")
        return self


class EvaluationConfig(Section):
    """Evaluation during the run (split `validation`), and before and after it (split `heldout`)."""

    eval_every_steps: PositiveInt = 50
    validation_sequences: PositiveInt = 64
    heldout_sequences: PositiveInt = 256
    cfm_samples: int = Field(4, ge=2, description="completions per context when estimating cfm_loss")
    profile_lengths: tuple[PositiveInt, ...] = Field((1, 2, 4, 8, 16, 32), min_length=1)
    evaluation_temperature: float | None = Field(None, gt=0.0, description="default: temperature")
    evaluation_seed: int = Field(0, ge=0, description="common random numbers, the same in every trial of a study")
    judge: str | None = Field(
        None, description="one pretrained network that measures judge_cfm_loss in all trials: a name, or a path"
    )
    judge_depths: Depths = Field((0.25, 0.5, 0.75), description="depths of the judge")
    judge_pooling: Pooling = Field("last_token", description="pooling of the judge")
    judge_normalize: Normalization = Field("per_layer", description="normalize of the judge")
    judge_completion_length: PositiveInt = Field(8, description="tokens per completion that the judge is given")
    extra_metrics: Annotated[tuple[str, ...], AfterValidator(plugins.as_paths), BeforeValidator(_listed)] = Field(
        (), description="metrics of your own, package.module:name: see docs/plugins.md"
    )
    benchmarks: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        (), description="name | name:file | name:hub of humaneval, mbpp, wmt22, mini, ...: see docs/downstream.md"
    )
    benchmark_every_steps: PositiveInt | None = Field(
        None, description="default: the base model, the end of the warm start, and the end"
    )
    benchmark_problems: PositiveInt | None = Field(None, description="at most this many, evenly spread; default: all")
    benchmark_samples: PositiveInt = Field(16, description="answers per problem besides the greedy one")
    benchmark_temperature: float = Field(0.6, gt=0.0, description="of these answers")
    benchmark_top_p: float | None = Field(
        None, gt=0.0, le=1.0, description="probability of their nucleus; default: 1, or 0.95 by the authors' protocol"
    )
    benchmark_max_tokens: PositiveInt = Field(512, description="longest answer")
    benchmark_protocol: Literal["unbiased", "authors"] = Field(
        "unbiased",
        description="unbiased: the best of k by all samples; authors: of the first k, translations chosen by COMET",
    )

    @property
    def of_benchmarks(self) -> dict[str, Any]:
        """The settings that the scores on each of the benchmarks depend on."""
        moot = {"benchmarks", "benchmark_every_steps"}
        return {name: value for name, value in self if name.startswith("benchmark") and name not in moot}


class VerifierConfig(Section):
    """The verifier, which judges whole completions."""

    verifier: Annotated[str, _built_in_or_plugin(VERIFIERS)] | None = Field(
        None, description="unit_tests | bleu | exact_match | comet | package.module:name; default: none"
    )
    parse_rule: Literal["auto", "code_block", "statement", "text"] = Field(
        "auto",
        description="where the answer is: code_block: first ```python block; statement: up to the next top-level "
        "statement; text: all of it; auto: unit_tests: code_block where there is one, else statement; others: text",
    )
    stop_strings: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], OneOrMore] = Field(
        (), description="a completion ends before the first of these"
    )
    partial_reward: bool = Field(False, description="unit_tests: reward the share of tests passed, not all or nothing")
    verifier_workers: PositiveInt = Field(2, description="unit_tests: programs that run at the same time")
    test_cpu_seconds: float = Field(3.0, gt=0.0, description="unit_tests: processor time of a program and its tests")
    test_memory_mib: PositiveInt = Field(512, description="unit_tests: memory of a program")
    bleu_tokenizer: Literal["13a", "intl", "char", "zh", "none"] = Field("13a", description="bleu: that of sacrebleu")
    comet_python: str | None = Field(None, description="comet: absolute path of the Python of its own environment")
    comet_model: str = Field("Unbabel/wmt22-comet-da", description="comet: a hub id, a local folder or checkpoint")
    comet_timeout_seconds: float = Field(600.0, gt=0.0, description="comet: longest wait for a batch, or for the model")


class CheckpointConfig(Section):
    """Checkpoints that a trial writes and keeps."""

    checkpoint_every_steps: PositiveInt = 50
    keep_checkpoints: PositiveInt = Field(2, description="number of newest ones to keep")
    keep_best: int = Field(1, ge=0, description="number of best ones to keep, by the study's objective")
    keep_every_steps: PositiveInt | None = Field(None, description="checkpoints at multiples of this are never removed")


class TrackingConfig(Section):
    """Weights & Biases; nothing is sent unless asked for."""

    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "ebft-study"
    wandb_entity: str | None = Field(None, description="user or team; default: that of the login")


class RunConfig(Section):
    """One run: method, model, data and all settings. A study varies these keys."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    method: Literal["ebft", "sft", "rlvr"] = "ebft"
    model: str = Field("tiny-1m", description="tiny-250k .. tiny-60m | mini-1m | a hub id | a local folder")
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
    verifier: VerifierConfig = VerifierConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def uses_engine(self) -> bool:
        """Whether rollouts come from an inference engine."""
        return self.method != "sft" and self.rollout.backend == "vllm"

    @property
    def samples_answers(self) -> bool:
        """Whether training samples whole answers to prompts, which a verifier judges."""
        return self.method == "rlvr" or (self.method == "ebft" and self.reward.verifier_weight > 0)

    @property
    def max_answer_tokens(self) -> int:
        """L, most tokens of an answer."""
        return self.rollout.max_answer_tokens or self.data.sequence_length // 2

    @property
    def feature_model(self) -> tuple[str, str | None]:
        """Name and revision of the model behind the feature network."""
        if self.features.feature_network == "base":
            return self.model, self.model_revision
        return self.features.feature_network, None

    @property
    def judge_is_feature_network(self) -> bool:
        """Whether the judge has the weights of the feature network."""
        return not self.features.random_weights and self.feature_model == (self.evaluation.judge, None)

    @property
    def longest_request(self) -> int:
        """Most tokens, prompt and completion, of one request to an engine.

        Prompt and answer fit into the sequence; the prompt of a benchmark counts as one without its answer.
        """
        completion = 0 if self.samples_answers else self.rollout.completion_length
        answer = self.evaluation.benchmark_max_tokens if self.evaluation.benchmarks else 0
        return self.data.sequence_length + max(completion, answer)

    @property
    def longest_completion(self) -> int:
        """Tokens of the longest completion, in training or evaluation."""
        judged = self.evaluation.judge_completion_length if self.evaluation.judge else 0
        answers = self.max_answer_tokens if self.samples_answers else 0
        return max(self.rollout.completion_length, *self.evaluation.profile_lengths, judged, answers)

    @property
    def total_steps(self) -> int:
        """Optimizer updates of the whole run; `step` counts up to this."""
        return self.training.warm_start_steps + self.training.steps
