"""Settings of a benchmark, and those that targets are stated for. Imports no torch, so that --help is instant."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Literal

from ebft_study.config import RunConfig, build_run

Precision = Literal["float32", "bfloat16"]
Attention = Literal["sdpa", "eager"]
Model = Literal["7m", "50m", "1.5b", "7b"]

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
    "7b": _shape(3584, 18944, 28, 28, 4, 152064, tied=False),
}
"""Qwen2 shapes: two small ones, Qwen2.5-1.5B, Qwen2.5-7B."""


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

    def run(self) -> RunConfig:
        """The run whose step is measured, whitened as in the paper.

        Raises:
            ConfigError: settings that no run could have.
        """
        rollout = {"n_samples": self.n_samples, "completion_length": self.completion_length, "stride": self.stride}
        settings = {
            "data": {"sequence_length": self.sequence_length},
            "rollout": rollout,
            "features": {"depths": DEPTHS},
            "reward": {"whitening": "variant_i"},
            "loss": {"gamma": GAMMA},
            "training": {"batch_size": self.batch_size, "precision": self.precision},
            "evaluation": {"profile_lengths": (1,)},
        }
        return build_run(settings, source="bench")

    def same_work(self, other: Settings) -> bool:
        """Whether a token costs the same on the same kind of machine, however many sequences, repeats and threads."""
        names = ("device", "model", "n_samples", "completion_length", "stride", "precision")
        return all(getattr(self, name) == getattr(other, name) for name in names)


SMALL = Settings()
"""Settings that comparisons are judged at."""
PAPER = Settings(device="cuda", model="1.5b", sequence_lengths=(1024,), batch_size=16, precision="bfloat16")
"""Settings that a step on a GPU is judged at."""
