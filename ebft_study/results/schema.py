"""Schema of the results tables: every column with its type, unit and meaning.

Five tables, each a folder of Parquet files below `<study folder>/results/`:

    trials       a row per trial: its settings (one typed column each), state, cost, final metrics
    metrics      a row per report of a trial at a step; null where a metric was not measured at that step
    evaluations  a row per held-out measurement: benchmark, metric, and position where the metric is a profile
    samples      a row per sampled completion that was kept, with its texts and rewards
    events       a row per start, stop, retry, error

Types are written as strings so that importing this module imports neither pyarrow nor pandas.
A change that older files do not satisfy raises SCHEMA_VERSION; the reader fills absent columns with nulls.
"""

from __future__ import annotations

import difflib
import functools
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ebft_study.config import RunConfig, Section, short_name
from ebft_study.errors import ResultsError

if TYPE_CHECKING:
    import pyarrow

SCHEMA_VERSION = 1
STATUSES = ("pending", "running", "finished", "stopped", "failed", "interrupted")
TABLES = ("trials", "metrics", "evaluations", "samples", "events")


@dataclass(frozen=True)
class Metric:
    """One measured quantity; `direction` says which way is better, None where neither is."""

    name: str
    unit: str
    description: str
    direction: Literal["min", "max"] | None = None


@dataclass(frozen=True)
class Column:
    """One column of a table. `type` is one of the keys of `_arrow_types`, or `list<key>`."""

    name: str
    type: str
    description: str
    required: bool = False


def _by_name(*metrics: Metric) -> dict[str, Metric]:
    return {entry.name: entry for entry in metrics}


METRICS: dict[str, Metric] = _by_name(
    # On evaluation steps, on the validation split.
    Metric("ce_loss", "nats/token", "cross-entropy of all ground-truth tokens at temperature 1", "min"),
    Metric("ce_answer_loss", "nats/token", "cross-entropy of the answer's tokens at temperature 1", "min"),
    Metric("perplexity", "", "exp(ce_loss)", "min"),
    Metric("cfm_loss", "squared feature norm", "unbiased conditional feature-matching loss, unwhitened, at G", "min"),
    Metric("cfm_standard_error", "squared feature norm", "standard error of cfm_loss over contexts"),
    Metric("evaluation_seconds", "s", "duration of the evaluation", "min"),
    # On training steps, on the training batch.
    Metric("loss", "", "differentiated: policy_loss + gamma * cross-entropy + kl_coefficient * kl (* G with sum)"),
    Metric("policy_loss", "", "-advantage * log-probability, mean over contexts and samples"),
    Metric("train_ce_loss", "nats/token", "cross-entropy of the batch's ground-truth tokens", "min"),
    Metric("kl", "nats/token", "KL divergence of completions from the base model over G, by the value of kl_estimator"),
    Metric("reward", "", "alignment - alpha * diversity, mean over contexts and samples", "max"),
    Metric("alignment", "", "reward's agreement with the ground truth's features", "max"),
    Metric("diversity", "", "agreement with the other samples of the context, which the reward subtracts alpha times"),
    Metric("advantage_std", "", "standard deviation of the advantages"),
    Metric("zero_variance_fraction", "", "fraction of contexts whose samples all have the same reward", "min"),
    Metric("duplicate_rate", "", "fraction of samples equal to another sample of their context", "min"),
    Metric("policy_entropy", "nats/token", "entropy of the tempered policy at sampled positions"),
    Metric("train_cfm_loss", "squared feature norm", "cfm_loss of the batch's rollouts", "min"),
    Metric("fm_whitened", "", "whitened feature-matching objective with the sign of a loss", "min"),
    Metric("grad_norm", "", "global norm of the gradient before clipping"),
    Metric("learning_rate", "", "learning rate of this update"),
    Metric("tokens_per_second", "tokens/s", "training tokens, prefix and sampled, per second", "max"),
    Metric("step_seconds", "s", "duration of the optimizer step", "min"),
    Metric("rollout_seconds", "s", "part of step_seconds spent sampling", "min"),
    Metric("feature_seconds", "s", "part of step_seconds spent in the feature network and on rewards", "min"),
    Metric("scoring_seconds", "s", "part of step_seconds spent on log-probabilities and the backward pass", "min"),
    Metric("optimizer_seconds", "s", "part of step_seconds spent on the update", "min"),
    Metric(
        "sync_seconds",
        "s",
        "time to hand new weights to the rollout engine, its reading of them included",
        "min",
    ),
    # With rollouts from an engine.
    Metric("policy_lag", "updates", "updates by which the sampling weights were behind, mean over contexts", "min"),
    Metric("parity_mean_difference", "nats/token", "mean |log-probability of the engine - of the trainer|", "min"),
    Metric("parity_max_difference", "nats/token", "largest such difference since the row before", "min"),
    Metric("importance_ratio", "", "probability of a completion under the trainer over that under the engine, mean"),
    Metric("importance_ratio_min", "", "smallest such ratio since the row before"),
    Metric("importance_ratio_max", "", "largest such ratio since the row before"),
    Metric("importance_weight", "", "mean ratio after truncation at importance_ratio_clip"),
    Metric("importance_clipped_fraction", "", "completions whose ratio was truncated", "min"),
    Metric("effective_sample_fraction", "", "effective over actual number of completions, by their ratios", "max"),
    # With features from a service; a feature counts once per request, however often the request contains it.
    Metric("feature_hit_rate_memory", "", "features that the service had in memory", "max"),
    Metric("feature_hit_rate_disk", "", "features that the service had on disk", "max"),
    Metric("sample_hit_rate", "", "features of samples that the service had", "max"),
    Metric("ground_truth_hit_rate", "", "features of the ground truth that the service had", "max"),
    Metric("feature_tokens_embedded", "tokens", "run through the service's network since the row before", "min"),
    Metric("feature_tokens_saved", "tokens", "that the cache, or another trial's request, made unnecessary", "max"),
    Metric("feature_queue_seconds", "s", "wait for the service's turn, mean over requests", "min"),
    Metric("feature_batch_requests", "requests", "requests that the service embedded in one pass, mean"),
    Metric("feature_cache_bytes", "B", "size of the service's cache, both tiers"),
    Metric("peak_memory_bytes", "B", "largest memory of the process so far (of the device, on a GPU)", "min"),
    Metric("sequences_seen", "sequences", "training sequences consumed so far"),
    Metric("tokens_seen", "tokens", "ground-truth training tokens consumed so far"),
)

EVALUATION_METRICS: dict[str, Metric] = _by_name(
    METRICS["ce_loss"],
    METRICS["ce_answer_loss"],
    Metric("cfm_loss", "squared feature norm", "as in `metrics`; position is the completion length in tokens", "min"),
    Metric("entropy", "nats/token", "entropy of the k-th generated token's distribution; position is k, from 1"),
)


def metric(name: str, registry: dict[str, Metric] | None = None) -> Metric:
    """The registered metric `name`; refuses others with the nearest name."""
    known = EVALUATION_METRICS | METRICS if registry is None else registry
    if name not in known:
        raise unknown("metric", name, known, "Register new metrics in ebft_study/results/schema.py")
    return known[name]


def unknown(what: str, name: str, known: typing.Iterable[str], remedy: str) -> ResultsError:
    """The error for a name that no schema holds: one line with the nearest known name."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names)}."
    return ResultsError(f"results: unknown {what} {name!r}. {hint} {remedy}")


# --- columns ---------------------------------------------------------------------------------------------------

_WHO = (
    Column("study", "string", "name of the study", required=True),
    Column("trial_id", "string", "identifier of the trial, unique within the study", required=True),
    Column("attempt", "int64", "which start of the trial wrote the row, from 0", required=True),
)
_AT_STEP = (
    *_WHO,
    Column("step", "int64", "optimizer updates done when the row was measured; 0 is the base model", required=True),
)
_WRITTEN_AT = Column("written_at", "timestamp", "when the row was written, UTC", required=True)

_TRIAL_STATE = (
    *_WHO,
    Column("label", "string", "the trial's settings that vary, to display"),
    Column("configuration", "string", "label without the seed: equal for all seeds of one configuration"),
    Column("named_baseline", "string", "name of the baseline that the trial belongs to ('sft'), null on the axes"),
    Column("status", "string", " | ".join(STATUSES), required=True),
    Column("stop_reason", "string", "why a stopped trial stopped"),
    Column("error", "string", "why a failed trial failed"),
    Column("started_at", "timestamp", "start of the first attempt, UTC"),
    Column("finished_at", "timestamp", "end of the last attempt, UTC"),
    Column("startup_seconds", "float64", "from the trial's start to its first optimizer step: the overhead"),
    Column("train_seconds", "float64", "in the training loop, evaluations included"),
    Column("total_seconds", "float64", "wall-clock of the trial, start-up included"),
    Column("steps_done", "int64", "optimizer updates done"),
    Column("steps_saved", "int64", "optimizer updates that an early stop saved; null without one"),
    Column("seconds_saved", "float64", "what they would have taken at the trial's throughput, evaluations included"),
    Column("sequences_seen", "int64", "training sequences consumed"),
    Column("tokens_seen", "int64", "ground-truth training tokens consumed"),
    Column("peak_memory_bytes", "int64", "largest memory of the training process"),
    Column("final_ce_loss", "float64", "last ce_loss on the validation split, nats/token"),
    Column("final_cfm_loss", "float64", "last cfm_loss on the validation split"),
    Column("best_cfm_loss", "float64", "lowest cfm_loss on the validation split"),
    Column("best_checkpoint", "string", "folder of the checkpoint with the best objective, below the study's folder"),
    Column("host", "string", "machine that ran the last attempt"),
    Column("updated_at", "timestamp", "when this row was last replaced, UTC", required=True),
)

_EVALUATIONS = (
    *_AT_STEP,
    Column("benchmark", "string", "what was evaluated; 'heldout' is the data set's held-out split", required=True),
    Column("metric", "string", "name of the metric", required=True),
    Column("position", "int64", "completion length or token index of a profile; null for a scalar metric"),
    Column("value", "float64", "the measurement"),
    Column("standard_error", "float64", "standard error over contexts, where estimated"),
    Column("count", "int64", "contexts measured (tokens, for cross-entropy)", required=True),
    _WRITTEN_AT,
)

_SAMPLES = (
    *_AT_STEP,
    Column("sequence", "int64", "row of the tokenized data that the context was cut from", required=True),
    Column("anchor", "int64", "where the completion starts in that row, in tokens", required=True),
    Column("sample", "int64", "which of the n completions of the context, from 0", required=True),
    Column("context", "string", "text before the anchor"),
    Column("completion", "string", "sampled text"),
    Column("ground_truth", "string", "text that follows in the data"),
    Column("reward", "float64", "alignment + diversity term"),
    Column("alignment", "float64", "agreement with the ground truth's features"),
    Column("diversity", "float64", "penalty for agreement with the other samples"),
    Column("advantage", "float64", "reward minus its baseline, as used in the update"),
    _WRITTEN_AT,
)

_EVENTS = (
    Column("study", "string", "name of the study", required=True),
    Column("event_id", "string", "unique identifier of the event", required=True),
    Column("trial_id", "string", "trial concerned; null for the study as a whole"),
    Column("attempt", "int64", "attempt concerned"),
    Column("time", "timestamp", "when it happened, UTC", required=True),
    Column("kind", "string", "type of the event, in one word", required=True),
    Column("message", "string", "the event, in one sentence", required=True),
    Column("details", "string", "further values, as JSON"),
    Column("host", "string", "machine that it happened on"),
)


@functools.cache
def columns(table: str) -> tuple[Column, ...]:
    """The columns of `table` in order."""
    if table == "trials":
        return (*_TRIAL_STATE, *hyperparameters())
    if table == "metrics":
        measured = (Column(m.name, "float64", _with_unit(m)) for m in METRICS.values())
        return (*_AT_STEP, *measured, _WRITTEN_AT)
    return {"evaluations": _EVALUATIONS, "samples": _SAMPLES, "events": _EVENTS}[table]


def _with_unit(entry: Metric) -> str:
    return f"{entry.description} ({entry.unit})" if entry.unit else entry.description


@functools.cache
def hyperparameters() -> tuple[Column, ...]:
    """Every setting of a run as a typed column under its short name (`alpha`, not `reward.alpha`)."""
    return tuple(
        Column(short_name(path), _type_name(annotation), f"setting {path}: {text}" if text else f"setting {path}")
        for path, annotation, text in _settings()
    )


def _settings() -> Iterator[tuple[str, Any, str | None]]:
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.default, Section):
            for leaf, inner in type(field.default).model_fields.items():
                yield f"{name}.{leaf}", inner.annotation, inner.description
        else:
            yield name, field.annotation, field.description


def _type_name(annotation: Any) -> str:
    """The column type of a setting's annotation: Optional and Annotated are looked through."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin in (typing.Union, types.UnionType):
        (inner,) = {_type_name(a) for a in arguments if a is not type(None)}
        return inner
    if origin is tuple:
        (inner,) = {_type_name(a) for a in arguments if a is not Ellipsis}
        return f"list<{inner}>"
    if origin is Literal:
        (inner,) = {_type_name(type(value)) for value in arguments}
        return inner
    return {bool: "bool", int: "int64", float: "float64", str: "string"}[annotation]


# --- arrow -----------------------------------------------------------------------------------------------------


@functools.cache
def arrow_schema(table: str) -> pyarrow.Schema:
    """The pyarrow schema of `table`; descriptions are in the fields' metadata, the version in the schema's."""
    import pyarrow as pa

    fields = [
        pa.field(c.name, _arrow_type(c.type), nullable=not c.required, metadata={"description": c.description})
        for c in columns(table)
    ]
    return pa.schema(fields, metadata={"schema_version": str(SCHEMA_VERSION), "table": table})


def _arrow_type(name: str) -> pyarrow.DataType:
    import pyarrow as pa

    if name.startswith("list<"):
        return pa.list_(_arrow_type(name[5:-1]))
    return {
        "string": pa.string(),
        "int64": pa.int64(),
        "float64": pa.float64(),
        "bool": pa.bool_(),
        "timestamp": pa.timestamp("us", tz="UTC"),
    }[name]
