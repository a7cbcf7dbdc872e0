"""Settings of a benchmark, and those that targets are stated for. Imports no torch, so that --help is instant."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from ebft_study.cost import StepShape, keeps_graph

if TYPE_CHECKING:
    from ebft_study.config import RunConfig

Precision = Literal["float32", "bfloat16"]
Attention = Literal["sdpa", "eager"]
Model = Literal["7m", "50m", "1.5b", "3b", "7b"]

DEPTHS = (0.25, 0.5, 0.75)
GAMMA = 0.03
"""Weight of cross-entropy, one of the paper's, so that a step contains every term."""


class Section(StrEnum):
    """Parts of the benchmark of one step, in the order in which they run."""

    agreement = "agreement"
    rollouts = "rollouts"
    features = "features"
    step = "step"
    whitening = "whitening"
    memory = "memory"
    growth = "growth"
    profile = "profile"
    launches = "launches"


def _shape(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, *, tied: bool = True
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": tied,
    }


MODELS: dict[str, dict[str, Any]] = {
    "7m": _shape(256, 1024, 6, 4, 2, 4096),
    "50m": _shape(512, 2048, 11, 8, 4, 16384),
    "1.5b": _shape(1536, 8960, 28, 12, 2, 151936),
    "3b": _shape(2048, 11008, 36, 16, 2, 151936),
    "7b": _shape(3584, 18944, 28, 28, 4, 152064, tied=False),
}
"""Qwen2 shapes: two small ones, Qwen2.5-1.5B, Qwen2.5-3B, Qwen2.5-7B."""


def ladder() -> dict[str, dict[str, Any]]:
    """Shapes of the tiny models that this package pretrains; none where what pretraining needs is not installed."""
    try:
        from ebft_study.pretraining.ladder import LADDER
    except ImportError:
        return {}
    return {
        name: _shape(r.hidden_size, r.intermediate_size, r.n_layers, r.n_heads, r.n_heads // 2, r.vocabulary_size)
        for name, r in LADDER.items()
    }


# The settings of a run that a step reads, under their names there. They need no pydantic, so that a step can be
# measured on a machine without it; a test compares them with the run of the same benchmark.


@dataclass(frozen=True)
class RolloutSettings:
    temperature: float = 0.6
    max_policy_lag: int = 0
    importance_ratio_clip: float = 2.0


@dataclass(frozen=True)
class FeatureSettings:
    depths: tuple[float, ...] = DEPTHS
    pooling: Literal["last_token"] = "last_token"
    normalize: Literal["per_layer"] = "per_layer"


@dataclass(frozen=True)
class RewardSettings:
    alpha: float = 1.0
    whitening: Literal["variant_i"] = "variant_i"
    baseline: Literal["rloo", "none"] = "rloo"


@dataclass(frozen=True)
class LossSettings:
    gamma: float = GAMMA
    aggregation: Literal["token_mean"] = "token_mean"
    ce_region: Literal["all"] = "all"
    kl_coefficient: float = 0.0
    kl_estimator: Literal["sequence"] = "sequence"


@dataclass(frozen=True)
class LoraSettings:
    lora_rank: int = 0
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = ("all-linear",)


@dataclass(frozen=True)
class TrainingSettings:
    attention: Literal["auto"] = "auto"
    log_every_steps: int = 5


@dataclass(frozen=True)
class StepConfig:
    """The settings that a step reads."""

    rollout: RolloutSettings = RolloutSettings()
    features: FeatureSettings = FeatureSettings()
    reward: RewardSettings = RewardSettings()
    loss: LossSettings = LossSettings()
    lora: LoraSettings = LoraSettings()
    training: TrainingSettings = TrainingSettings()
    uses_engine: bool = False


@dataclass(frozen=True)
class Settings:
    """Settings of a benchmark. A step has the first of the sequence lengths; `at` chooses another one."""

    device: str = "cpu"
    model: str = "7m"
    """A name in `MODELS` or in the ladder."""
    sequence_lengths: tuple[int, ...] = (512, 1024)
    n_samples: int = 4
    completion_length: int = 8
    stride: int = 8
    batch_size: int = 1
    micro_batch_size: int | None = None
    """Sequences and anchors at a time in our step; None: see `workload.micro_batch_plan`."""
    anchors_at_once: int | None = None
    naive_attention: Attention = "sdpa"
    """Attention of the naive contender: PyTorch's fused kernel, or the published code's matrices."""
    repeats: int = 5
    precision: Precision = "float32"
    weight_dtype: Precision = "float32"
    activation_checkpointing: bool = False
    lora_rank: int = 0
    """0: all weights are trained."""
    threads: int | None = None
    """None: PyTorch's choice."""
    contexts: int = 2048
    """Number of contexts whose features are whitened."""
    feature_size: int = 4608

    @property
    def sequence_length(self) -> int:
        return self.sequence_lengths[0]

    @property
    def device_type(self) -> str:
        """`cpu` or `cuda`."""
        return self.device.partition(":")[0]

    def at(self, sequence_length: int) -> Settings:
        """The same settings with another sequence length."""
        return replace(self, sequence_lengths=(sequence_length,))

    @property
    def config(self) -> StepConfig:
        """What the measured step reads, whitened as in the paper."""
        return StepConfig(lora=LoraSettings(self.lora_rank))

    @property
    def shape(self) -> StepShape:
        """The sizes of the measured step."""
        return StepShape(
            method="ebft",
            sequence_length=self.sequence_length,
            stride=self.stride,
            completion_length=self.completion_length,
            context_length=self.stride,
            n_samples=self.n_samples,
            batch_size=self.batch_size,
            depths=DEPTHS,
            gamma=GAMMA,
            precision=self.precision,
            weight_dtype=self.weight_dtype,
            activation_checkpointing=self.activation_checkpointing,
            differentiable_rollouts=keeps_graph(self.completion_length),
            shared_features=self.lora_rank > 0,
        )

    def run(self) -> RunConfig:
        """The run whose step is measured; needs pydantic.

        Raises:
            ConfigError: settings that no run could have.
        """
        from ebft_study.config import build_run

        training = {
            "batch_size": self.batch_size,
            "precision": self.precision,
            "weight_dtype": self.weight_dtype,
            "activation_checkpointing": self.activation_checkpointing,
        }
        rollout = {"n_samples": self.n_samples, "completion_length": self.completion_length, "stride": self.stride}
        settings = {
            "data": {"sequence_length": self.sequence_length},
            "rollout": rollout,
            "features": {"depths": DEPTHS},
            "reward": {"whitening": "variant_i"},
            "loss": {"gamma": GAMMA},
            "training": training,
            "lora": {"lora_rank": self.lora_rank},
            "evaluation": {"profile_lengths": (1,)},
        }
        return build_run(settings, source="bench")

    def same_work(self, other: Settings) -> bool:
        """Whether a token costs the same on the same kind of machine, however many sequences, repeats and threads."""
        names = (
            *("device", "model", "n_samples", "completion_length", "stride"),
            *("precision", "weight_dtype", "activation_checkpointing", "lora_rank"),
        )
        return all(getattr(self, name) == getattr(other, name) for name in names)


SMALL = Settings()
"""Settings that comparisons are judged at."""
PAPER = Settings(device="cuda", model="1.5b", sequence_lengths=(1024,), batch_size=16, precision="bfloat16")
"""Settings that a step on a GPU is judged at."""
