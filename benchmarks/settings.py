"""What a user may choose, and the settings that targets are stated for. Imports no torch, so that --help is instant."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from ebft_study.config import RunConfig, build_run

Precision = Literal["float32", "bfloat16"]

SECTIONS = ("agreement", "rollouts", "features", "step", "whitening", "memory", "growth", "profile")
DEPTHS = (0.25, 0.5, 0.75)
GAMMA = 0.03
"""Weight of cross-entropy, one of the paper's, so that a step contains every term."""


def _shape(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    }


MODELS: dict[str, dict[str, Any]] = {
    "7m": _shape(256, 1024, 6, 4, 2, 4096),
    "50m": _shape(512, 2048, 11, 8, 4, 16384),
    "1.5b": _shape(1536, 8960, 28, 12, 2, 151936),
    "7b": {**_shape(3584, 18944, 28, 28, 4, 152064), "tie_word_embeddings": False},
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
    """A benchmark. A step has the first of the sequence lengths; `at` chooses another one."""

    device: str = "cpu"
    model: str = "7m"
    """A name in `MODELS` or in the ladder."""
    sequence_lengths: tuple[int, ...] = (512, 1024)
    n_samples: int = 4
    completion_length: int = 8
    stride: int = 8
    batch_size: int = 1
    micro_batch_size: int | None = None
    """Sequences and anchors at a time in our step; None: see `shapes.split_of`."""
    anchors_at_once: int | None = None
    naive_attention: Literal["sdpa", "eager"] = "sdpa"
    """Of the naive side: PyTorch's fused one, or the published code's."""
    repeats: int = 5
    precision: Precision = "float32"
    threads: int | None = None
    """None: PyTorch's choice."""
    contexts: int = 2048
    """How many are whitened, and their features' size."""
    feature_size: int = 4608

    @property
    def sequence_length(self) -> int:
        return self.sequence_lengths[0]

    def at(self, sequence_length: int) -> Settings:
        """The same with another sequence length."""
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

    def is_like(self, other: Settings) -> bool:
        """The same work per token on the same kind of machine, however many sequences, repeats and threads."""
        names = ("device", "model", "n_samples", "completion_length", "stride", "precision")
        return all(getattr(self, name) == getattr(other, name) for name in names)


SMALL = Settings()
"""What comparisons are judged at."""
PAPER = Settings(device="cuda", model="1.5b", sequence_lengths=(1024,), batch_size=16, precision="bfloat16")
"""What a step on a GPU is judged at."""
