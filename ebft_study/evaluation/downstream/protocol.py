"""How answers to benchmarks are sampled and scored, and by which verifiers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ebft_study.config import EvaluationConfig, VerifierConfig
from ebft_study.errors import ConfigError
from ebft_study.evaluation.downstream.benchmarks import Benchmark
from ebft_study.evaluation.downstream.foreign import ForeignTests
from ebft_study.evaluation.downstream.metrics import best_of_first_k, best_of_k
from ebft_study.verifiers import Judgement, Problem, Verifier, load_verifier

KS = (1, 4, 16)
AUTHORS_TOP_P, AUTHORS_CPU_SECONDS = 0.95, 3.0


@dataclass(frozen=True)
class Protocol:
    """How answers are sampled and scored.

    `is_authors`: as the paper's evaluation does it. The best of k is that of the first k samples; the best translation
    is the one that COMET prefers, and BLEU is that of the corpus of these.
    """

    temperature: float
    top_p: float
    max_tokens: int
    samples: int
    seed: int
    is_authors: bool

    @classmethod
    def from_config(cls, config: EvaluationConfig) -> Protocol:
        is_authors = config.benchmark_protocol == "authors"
        top_p = config.benchmark_top_p
        return cls(
            config.benchmark_temperature,
            (AUTHORS_TOP_P if is_authors else 1.0) if top_p is None else top_p,
            config.benchmark_max_tokens,
            config.benchmark_samples,
            config.evaluation_seed,
            is_authors,
        )

    @property
    def ks(self) -> list[int]:
        return [k for k in KS if k <= self.samples]

    @property
    def best(self) -> Callable[[Sequence[float], int], float]:
        return best_of_first_k if self.is_authors else best_of_k


@dataclass
class Judges:
    """The verifiers of a benchmark: the first one decides, COMET is beside it where it is installed."""

    verifier: Verifier
    comet: Verifier | None = None

    def close(self) -> None:
        for verifier in (self.verifier, self.comet):
            if verifier is not None:
                verifier.close()


def judges_of(benchmark: Benchmark, config: VerifierConfig, protocol: Protocol) -> Judges:
    """The verifiers of a benchmark, which decides their kind; `config` has their other settings.

    Raises:
        ConfigError: the authors' protocol without COMET.
    """
    settings: dict[str, Any] = {"parse_rule": benchmark.parse_rule, "stop_strings": (), "partial_reward": False}
    if benchmark.kind == "foreign code":
        return Judges(ForeignTests(benchmark.language, benchmark.items, config))
    if benchmark.kind == "code":
        if protocol.is_authors:
            settings["test_cpu_seconds"] = AUTHORS_CPU_SECONDS
        return Judges(load_verifier(config.model_copy(update={**settings, "verifier": "unit_tests"})))
    bleu = config.model_copy(update={**settings, "verifier": "bleu", "bleu_tokenizer": benchmark.bleu_tokenizer})
    if config.comet_python is None:
        if protocol.is_authors:
            raise ConfigError(
                f"evaluation.benchmark_protocol='authors': it chooses translations of {benchmark.name} by COMET, which "
                "has no environment. Set verifier.comet_python, or use benchmark_protocol=unbiased"
            )
        return Judges(load_verifier(bleu))
    return Judges(load_verifier(bleu), load_verifier(config.model_copy(update={**settings, "verifier": "comet"})))


def failing_references(benchmark: Benchmark, judges: Judges) -> dict[str, str]:
    """The problems whose own reference fails its tests, with the reason."""
    items = [item for item in benchmark.items if item.problem.reference]
    judgements = judged(judges.verifier, [(item.problem, item.problem.reference) for item in items])
    passes = judges.verifier.highest
    return {
        item.id: judgement.reason
        for item, judgement in zip(items, judgements, strict=True)
        if judgement.reward is None or judgement.reward < passes
    }


def judged(verifier: Verifier, answers: Sequence[tuple[Problem, str]]) -> list[Judgement]:
    """The judgement of each answer to its problem."""
    return verifier.judge([problem for problem, _ in answers], [text for _, text in answers])
