"""Schema of the results tables: every column with its type, unit and meaning.

Six tables, each a folder of Parquet files below `<study folder>/results/`:

    trials       a row per trial: its settings (one typed column each), state, cost, final metrics
    metrics      a row per report of a trial at a step, a column per metric; null where it was not measured there
    evaluations  a row per held-out measurement: benchmark, metric, and position where the metric is a profile
    scores       a row per measurement on a split of the data or a benchmark, with a value per sequence or problem
    samples      a row per sampled completion that was kept, with its texts and rewards
    events       a row per start, stop, retry, error

Types are written as strings so that importing this module imports neither pyarrow nor pandas.
A change that older files do not satisfy raises SCHEMA_VERSION; the reader fills absent columns with nulls.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ebft_study.results.metrics import COST, METRICS, Metric, in_table

if TYPE_CHECKING:
    import pyarrow

SCHEMA_VERSION = 1
STATUSES = ("pending", "running", "finished", "stopped", "failed", "interrupted", "skipped")
SKIPPED = "skipped"
"""Status of a trial that is not needed, because its configuration was not promoted to more seeds."""
TABLES = ("trials", "metrics", "evaluations", "scores", "samples", "events")


@dataclass(frozen=True)
class Column:
    """One column of a table. `type` is one of the keys of `_arrow_types`, or `list<key>`."""

    name: str
    type: str
    description: str
    required: bool = False


# --- columns ---------------------------------------------------------------------------------------------------

_WHO = (
    Column("study", "string", "name of the study", required=True),
    Column("trial_id", "string", "identifier of the trial, unique within the study", required=True),
    Column(
        "attempt",
        "int64",
        "which start of the trial wrote the row, from 1; 0: not started",
        required=True,
    ),
)
_AT_STEP = (
    *_WHO,
    Column("step", "int64", "optimizer updates done when the row was measured; 0 is the base model", required=True),
)
_WRITTEN_AT = Column("written_at", "timestamp", "when the row was written, UTC", required=True)

_COST_TYPES = {"sampled_tokens": "int64"}
_ALL = "of all attempts, with what was done twice"


def _with_unit(entry: Metric) -> str:
    return f"{entry.description} ({entry.unit})" if entry.unit else entry.description


_TRIAL_STATE = (
    *_WHO,
    Column("label", "string", "the trial's settings that vary, to display"),
    Column("configuration", "string", "label without the seed: equal for all seeds of one configuration"),
    Column("named_baseline", "string", "name of the baseline that the trial belongs to ('sft'), null on the axes"),
    Column("status", "string", " | ".join(STATUSES), required=True),
    Column("stop_reason", "string", "why a stopped trial stopped, or a skipped one is not needed"),
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
    Column("parameters", "int64", "parameters of the trained model, tied ones once, adapters included"),
    Column("trainable_parameters", "int64", "parameters that training changes"),
    Column("feature_parameters", "int64", "parameters of the feature network, up to its deepest layer, without a head"),
    *(Column(name, _COST_TYPES.get(name, "float64"), f"{_with_unit(METRICS[name])}; {_ALL}") for name in COST),
    Column("gpu_seconds", "float64", f"time of reserved GPUs: total_seconds x GPUs of the trial; {_ALL}"),
    Column("peak_memory_bytes", "int64", "largest memory of the training process"),
    Column("final_ce_loss", "float64", "last ce_loss on the validation split, nats/token"),
    Column("final_cfm_loss", "float64", "last cfm_loss on the validation split"),
    Column("best_cfm_loss", "float64", "lowest cfm_loss on the validation split"),
    Column("best_checkpoint", "string", "folder of the checkpoint with the best objective, below the study's folder"),
    Column("host", "string", "machine that ran the last attempt"),
    Column(
        "generation",
        "int64",
        "which driver of the study wrote the row, from 1; the latest counts. Null on a disk, whose lock is enough",
    ),
    Column("updated_at", "timestamp", "when this row was last replaced, UTC", required=True),
)

_EVALUATIONS = (
    *_AT_STEP,
    Column(
        "benchmark", "string", "what was evaluated: 'heldout', the split of the data set, or a benchmark", required=True
    ),
    Column("metric", "string", "name of the metric", required=True),
    Column("position", "int64", "completion length, token index, or k of the best of k; null for a scalar metric"),
    Column("value", "float64", "the measurement"),
    Column("standard_error", "float64", "standard error over sequences or problems, where estimated"),
    Column("count", "int64", "contexts measured (tokens, for cross-entropy; problems, of a benchmark)", required=True),
    _WRITTEN_AT,
)

_SCORES = (
    *_AT_STEP,
    Column("benchmark", "string", "'validation' or 'heldout', splits of the data set, or a benchmark", required=True),
    Column("metric", "string", "name of the metric", required=True),
    Column("position", "int64", "completion length of a profile, or k of the best of k; null for a scalar metric"),
    Column("sequences", "list<int32>", "rows of the tokenized split, or problems, that have a value", required=True),
    Column(
        "counts", "list<int32>", "contexts measured in each (tokens, for cross-entropy); 1 of a problem", required=True
    ),
    Column("values", "list<float32>", "mean over them; the measurement is the mean weighted by counts", required=True),
    _WRITTEN_AT,
)

_SAMPLES = (
    *_AT_STEP,
    Column("benchmark", "string", "the benchmark whose problem the context is; null for one of the data set"),
    Column("sequence", "int64", "row of the tokenized data that the context was cut from, or problem", required=True),
    Column("anchor", "int64", "where the completion starts in that row, in tokens", required=True),
    Column("sample", "int64", "which of the n completions of the context, from 0; -1: the greedy one", required=True),
    Column("context", "string", "text before the anchor"),
    Column("completion", "string", "sampled text"),
    Column("ground_truth", "string", "text that follows in the data"),
    Column("reward", "float64", "alignment - alpha * diversity; of a benchmark's answer, its verifier's score"),
    Column("alignment", "float64", "agreement with the ground truth's features"),
    Column("diversity", "float64", "agreement with the other samples of the context"),
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


def columns(table: str) -> tuple[Column, ...]:
    """The columns of `table` in order."""
    return _columns(table, tuple(METRICS))


@functools.cache
def _columns(table: str, _metrics: tuple[str, ...]) -> tuple[Column, ...]:
    if table == "trials":
        return (*_TRIAL_STATE, *hyperparameters())
    if table == "metrics":
        measured = (Column(m.name, "float64", _with_unit(m)) for m in in_table("metrics").values())
        return (*_AT_STEP, *measured, _WRITTEN_AT)
    return {"evaluations": _EVALUATIONS, "scores": _SCORES, "samples": _SAMPLES, "events": _EVENTS}[table]


@functools.cache
def hyperparameters() -> tuple[Column, ...]:
    """Every setting of a run as a typed column under its short name (`alpha`, not `reward.alpha`)."""
    from ebft_study.config import short_name

    return tuple(
        Column(short_name(path), _type_name(annotation), f"setting {path}: {text}" if text else f"setting {path}")
        for path, annotation, text in _settings()
    )


def _settings() -> Iterator[tuple[str, Any, str | None]]:
    # Needs pydantic, which what only counts metrics may not have.
    from ebft_study.config import RunConfig, Section

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


def arrow_schema(table: str) -> pyarrow.Schema:
    """The pyarrow schema of `table`; descriptions are in the fields' metadata, the version in the schema's."""
    return _arrow_schema(table, tuple(METRICS))


@functools.cache
def _arrow_schema(table: str, _metrics: tuple[str, ...]) -> pyarrow.Schema:
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
        "int32": pa.int32(),
        "float32": pa.float32(),
        "bool": pa.bool_(),
        "timestamp": pa.timestamp("us", tz="UTC"),
    }[name]
