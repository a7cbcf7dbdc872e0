"""Measurements of a run: training metrics, losses on held-out data, and samples of its completions.

Evaluations see the averaged weights, if there is an average. Every worker takes part in each of these functions and
gets the same numbers, which are those of all workers.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ebft_study import evaluation
from ebft_study.algorithm.advantages import feature_matching_advantages
from ebft_study.algorithm.anchors import Anchors, completions_at
from ebft_study.algorithm.rewards import feature_matching_rewards
from ebft_study.algorithm.sampling import uniforms
from ebft_study.data import Batch
from ebft_study.errors import NonFiniteError
from ebft_study.evaluation import Measured, base
from ebft_study.methods import MetricAccumulator, Observations
from ebft_study.methods.judging import Judgements
from ebft_study.methods.rlvr import Rlvr, prompts_of
from ebft_study.networks.loading import LoadedModel, fingerprint
from ebft_study.networks.sharding import is_sharded, unsharded
from ebft_study.results.metrics import QUANTITIES
from ebft_study.rollouts import anchors_of, answer_anchors
from ebft_study.rollouts.answers import InProcessAnswers
from ebft_study.training import vanishing
from ebft_study.training.distributed import max_over_workers
from ebft_study.training.update import Run

SAMPLED_SEQUENCES, SAMPLED_CONTEXTS = 2, 2
"""Sequences, and contexts of each, whose completions are shown."""


# --- training --------------------------------------------------------------------------------------------------


def training_metrics(run: Run) -> dict[str, float]:
    """Metrics of the steps since the last call, over all workers."""
    steps = run.accumulated_steps
    row = _over_workers(run).row(steps=steps, workers=run.world_size)
    tokens = run.tokens_seen - run.latest.get("tokens_seen", 0.0)
    row |= {
        "learning_rate": run.latest.get("learning_rate", float("nan")),
        "tokens_per_second": tokens / max(row["step_seconds"] * steps, 1e-9),
        "peak_memory_bytes": float(peak_memory_bytes(run.device)),
        "sequences_seen": float(run.step * run.config.training.batch_size),
        "tokens_seen": float(run.tokens_seen),
    }
    run.latest |= row
    run.accumulator, run.accumulated_steps = MetricAccumulator(), 0
    return row


def vanishing_updates(run: Run, row: dict[str, float]) -> str:
    """What to say, once, of a run most of whose updates vanish; '' otherwise, and while the learning rate is low.

    Rounded stochastically few weights change in a step, too, but nothing is lost on average.
    """
    fraction, rate = row.get(vanishing.METRIC, 0.0), row["learning_rate"]
    if run.has_warned or run.config.optimizer.rounding == "stochastic":
        return ""
    if fraction <= vanishing.MOST or rate < run.peak_learning_rate / 2:
        return ""
    run.has_warned = True
    return vanishing.warning(fraction, learning_rate=rate, weight_dtype=run.config.training.weight_dtype)


def cost(run: Run) -> dict[str, float]:
    """The cost of the run so far, over all workers."""
    seconds, joules = run.sum_over_workers(run.meter.lap())
    run.spent.cpu_seconds += seconds
    run.spent.energy_joules += joules
    return run.spent.row()


def _over_workers(run: Run) -> MetricAccumulator:
    """The observations of all workers, which exchange them in the order of the registry."""
    own = [run.accumulator.of(name) for name in QUANTITIES]
    sums = run.sum_over_workers(number for o in own for number in (o.count, o.total, o.squares))
    peaks = max_over_workers([number for o in own for number in (o.largest, -o.smallest)], run.world_size, run.device)
    moments = zip(QUANTITIES, sums[::3], sums[1::3], sums[2::3], peaks[::2], peaks[1::2], strict=True)
    return MetricAccumulator(
        {
            name: Observations(count, total, squares, largest, -negated)
            for name, count, total, squares, largest, negated in moments
        }
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: of the device on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- evaluation ------------------------------------------------------------------------------------------------


def validate(run: Run) -> tuple[dict[str, float], Measured]:
    """Losses on the validation split: as a row of metrics, and as measured.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    started = time.perf_counter()
    measured = measure_validation(run)
    return _validation_row(run, measured, started), measured


def evaluate_shared(run: Run, model: LoadedModel | None) -> tuple[dict[str, float], Measured, Measured]:
    """A row of validation metrics, and what was measured on the validation and the held-out split.

    For the `shared_model`, the base model or that of one warm start: measured once per machine.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    started, parts = time.perf_counter(), run.parts
    key = base.key(run.config, model, parts.evaluator, parts.text, parts.data) if model else None
    measured = base.get(key) if key and run.world_size == 1 else None
    if measured is None:
        measured = measure_validation(run), measure_heldout(run)
        if key:
            base.put(key, measured)
    return _validation_row(run, measured[0], started), *measured


def shared_model(run: Run) -> LoadedModel | None:
    """The model as it is evaluated now, with its fingerprint, which is a pass over all weights.

    None where it is that of this run alone, and on all workers but the first, which stores its numbers. Sharded weights
    are gathered in the type of the passes, which may round otherwise than one worker does.
    """
    if run.rank > 0 or is_sharded(run.model):
        return None
    with run.average.applied(run.model):
        return replace(run.parts.base, fingerprint=fingerprint(run.model)) if run.step else run.parts.base


def _validation_row(run: Run, measured: Measured, started: float) -> dict[str, float]:
    row = evaluation.summary(measured, run.config.rollout.completion_length)
    row["evaluation_seconds"] = time.perf_counter() - started
    extra = [each.name for each in run.parts.evaluator.extra]
    for name in (evaluation.CE, evaluation.CFM, evaluation.JUDGE_CFM, *extra):
        if name in row and not math.isfinite(row[name]):
            raise NonFiniteError(name, row[name], run.step)
    run.latest |= row | {"evaluated_step": float(run.step)}
    return row


def measure_validation(run: Run) -> Measured:
    lengths = [run.config.rollout.completion_length]
    return _measure(run, "validation", run.config.evaluation.validation_sequences, lengths, with_entropy=False)


def measure_heldout(run: Run) -> Measured:
    lengths = sorted({*run.config.evaluation.profile_lengths, run.config.rollout.completion_length})
    return _measure(run, "heldout", run.config.evaluation.heldout_sequences, lengths, with_entropy=True)


def _measure(run: Run, split: str, sequences: int, lengths: Sequence[int], *, with_entropy: bool) -> Measured:
    with run.average.applied(run.model), unsharded(*run.parts.networks), run.autocast():
        measured = run.parts.evaluator.measure(
            run.model,
            run.parts.data[split],
            sequences=sequences,
            lengths=lengths,
            with_entropy=with_entropy,
            rank=run.rank,
            world_size=run.world_size,
        )
    rows = min(len(run.parts.data[split]), sequences)
    run.spent.evaluation_flops += run.meter.evaluation(sequences=rows, completion_length=max(lengths))
    parts = [(scores, name) for scores in measured.values() for name in ("sums", "counts")]
    total = run.sum_over_workers(number for scores, name in parts for number in getattr(scores, name).tolist())
    for k, (scores, name) in enumerate(parts):
        n = len(scores.sequences)
        setattr(scores, name, torch.tensor(total[k * n : (k + 1) * n], dtype=torch.float64))
    return {key: scores for key, scores in measured.items() if scores.count}


# --- samples ---------------------------------------------------------------------------------------------------


def sample_rows(run: Run) -> list[dict[str, Any]]:
    """Rows of the `samples` table: completions of a few contexts with their rewards, as text.

    Contexts of the validation split and noise are always the same; the model is the current one. All workers gather
    the weights, the first one samples.
    """
    with unsharded(*run.parts.networks), run.autocast():
        if run.rank > 0:
            return []
        run.model.eval()
        rows = _sample_rows(run)
        run.model.train()
    return rows


@torch.no_grad()
def _sample_rows(run: Run) -> list[dict[str, Any]]:
    parts, rollout, reward = run.parts, run.config.rollout, run.config.reward
    data = parts.data["validation"]
    batch = data.rows(evaluation.spread_rows(len(data), SAMPLED_SEQUENCES)).to(run.device)
    if isinstance(parts.method, Rlvr):
        return _answer_rows(run, parts.method, batch)
    anchors = anchors_of(batch, rollout)
    if anchors.positions.shape[1] == 0:
        return []
    noise = uniforms(
        (run.config.evaluation.evaluation_seed,),
        batch.indices.tolist(),
        n_anchors=anchors.positions.shape[1],
        n_samples=rollout.n_samples,
        length=rollout.completion_length,
    )
    sampled = parts.evaluator.rollouts.sample(run.model, batch, anchors, noise=noise, temperature=rollout.temperature)
    features = parts.features.embed(batch, anchors, sampled.completions)[0]
    rewards = feature_matching_rewards(features.phi, features.psi, alpha=reward.alpha, whitening=reward.whitening)
    advantages = feature_matching_advantages(
        rewards.alignment, rewards.diversity, alpha=reward.alpha, baseline=reward.baseline
    )
    truth = completions_at(batch.tokens, anchors, rollout.completion_length)
    decode = parts.base.tokenizer.decode
    rows: list[dict[str, Any]] = []
    for s in range(len(batch.tokens)):
        valid = anchors.valid[s].nonzero()[:, 0]
        for b in valid[:: max(1, len(valid) // SAMPLED_CONTEXTS)][:SAMPLED_CONTEXTS].tolist():
            position = int(anchors.positions[s, b])
            for j in range(rollout.n_samples):
                rows.append(
                    {
                        "sequence": int(batch.indices[s]),
                        "anchor": position,
                        "sample": j,
                        "context": decode(batch.tokens[s, :position]),
                        "completion": decode(sampled.completions[s, b, j]),
                        "ground_truth": decode(truth[s, b]),
                        "reward": float(rewards.reward[s, b, j]),
                        "alignment": float(rewards.alignment[s, b, j]),
                        "diversity": float(rewards.diversity[s, b, j]),
                        "advantage": float(advantages[s, b, j]),
                    }
                )
    return rows


def _answer_rows(run: Run, method: Rlvr, batch: Batch) -> list[dict[str, Any]]:
    """The same of whole answers, which are sampled in process, as evaluations are."""
    anchors, tokenizer = answer_anchors(batch, run.config.max_answer_tokens), run.parts.base.tokenizer
    chosen = batch.select(anchors.valid[:, 0])
    rows, prompts = chosen.indices.tolist(), prompts_of(batch, anchors)
    key = (run.config.evaluation.evaluation_seed,)
    answers = method.sample(run.model, prompts, rows, key=key, sampler=InProcessAnswers())
    submitted, judged = method.judge("validation", rows, answers)
    own = Anchors(*(tensor[anchors.valid[:, 0]] for tensor in anchors))
    judgements = Judgements(*(part.to(run.device) for part in judged.result()))
    rewarded = method.rewarded(chosen, own, answers, submitted, judgements)
    texts, truths = answers.texts(tokenizer), chosen.tokens.where(chosen.answer_mask, -1).tolist()
    return [
        {
            "sequence": rows[s],
            "anchor": len(prompts[s]),
            "sample": j,
            "context": tokenizer.decode(prompts[s]),
            "completion": texts[s][j],
            "ground_truth": tokenizer.decode([token for token in truths[s] if token >= 0]),
            "reward": float(rewarded.reward[s, j]) if judgements.judged[s, j] else None,
            "advantage": float(rewarded.advantages[s, j]),
        }
        for s in range(len(rows))
        for j in range(run.config.rollout.n_samples)
    ]
