"""Metrics of users: functions of held-out sequences and sampled completions, named by `evaluation.extra_metrics`.

    @metric(direction="min", unit="tokens")
    def distinct_tokens(evaluated: Evaluated) -> Tensor: ...

Their values are kept sequence by sequence, as those of our own metrics are: they have standard errors, are compared in
pairs, and may be objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ebft_study import plugins
from ebft_study.algorithm.anchors import Anchors
from ebft_study.config import RunConfig, short_names
from ebft_study.data import Batch
from ebft_study.errors import ConfigError, EbftError, ResultsError
from ebft_study.results.metrics import CONTEXTS, Metric, register

KEY = "evaluation.extra_metrics"
_DECLARED = "declared_metric"


@dataclass(frozen=True)
class Evaluated:
    """Some held-out sequences, and what the model makes of them. Without gradients, the model in evaluation mode."""

    model: nn.Module
    tokenizer: Any
    config: RunConfig
    batch: Batch
    """S sequences: `tokens` [S, T], `document_ids` [S, T] (-1: padding), `answer_mask` [S, T]."""
    log_probs: Tensor
    """[S, T-1] of the tokens from the second one on, at temperature 1; those in front of padding mean nothing."""
    anchors: Anchors
    """`positions` [S, B] at which completions begin, and `valid` [S, B]."""
    completions: Tensor
    """[S, B, n, G] sampled with common random numbers; those of contexts that are not valid mean nothing."""
    ground_truth: Tensor
    """[S, B, G]."""


class MetricFunction(Protocol):
    """A value of each sequence [S], or of each context [S, B]; NaN: it has none. The metric is the mean of all values.

    Depends on what it is given alone: sequences are evaluated in parts, and in other parts on another machine.
    """

    def __call__(self, evaluated: Evaluated, /) -> Tensor: ...


FunctionT = TypeVar("FunctionT", bound=Callable[[Evaluated], Tensor])


def metric(
    *,
    direction: Literal["min", "max"],
    unit: str = "",
    description: str = "",
    comparable_within: Sequence[str] = CONTEXTS,
) -> Callable[[FunctionT], FunctionT]:
    """Declare a function as a metric of its name.

    Args:
        direction: the better side.
        comparable_within: settings that two configurations must share for their values to be compared; by default all
            that change texts, contexts or completions. `TEXT` of `ebft_study.results.metrics` where there are no
            completions in it.
    """

    def declare(function: FunctionT) -> FunctionT:
        declared = {
            "direction": direction,
            "unit": unit,
            "description": description or "a metric of the user",
            "comparable_within": comparable_within,
        }
        setattr(function, _DECLARED, declared)
        return function

    return declare


@dataclass(frozen=True)
class ExtraMetric:
    """A loaded metric."""

    entry: Metric
    function: MetricFunction
    tokenizer: Any

    @property
    def name(self) -> str:
        return self.entry.name

    def values(self, evaluated: Evaluated) -> tuple[Tensor, Tensor]:
        """Values [S, ...] and which of them count.

        Raises:
            ConfigError: the function has raised, or returned something else.
        """
        path, valid = self.entry.plugin, evaluated.anchors.valid
        try:
            values = self.function(evaluated)
        except EbftError:
            raise
        except Exception as error:
            raise plugins.raised(KEY, path, error) from error
        if not isinstance(values, Tensor) or values.shape not in (valid.shape[:1], valid.shape):
            given = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            shapes = f"[S] = {tuple(valid.shape[:1])} or [S, B] = {tuple(valid.shape)}"
            raise plugins.refused(KEY, path, f"it has returned {given}", f"Return a tensor of shape {shapes}")
        if values.ndim == 1:
            values = values[:, None]
            valid = torch.ones_like(values, dtype=torch.bool)
        return values, valid & ~values.isnan()


def load_metrics(paths: Sequence[str], tokenizer: Any = None) -> tuple[ExtraMetric, ...]:
    """Import the metrics of a run, and register them.

    Raises:
        ConfigError: one of them cannot be imported or is not declared, or two have one name.
    """
    loaded = tuple(_load(path, tokenizer) for path in paths)
    names = [each.name for each in loaded]
    for each in loaded:
        if names.count(each.name) > 1:
            raise plugins.refused(KEY, each.entry.plugin, f"another one is called {each.name!r}, too", "Rename it")
    return loaded


def _load(path: str, tokenizer: Any) -> ExtraMetric:
    function = plugins.load(path, key=KEY)
    declared = getattr(function, _DECLARED, None)
    if declared is None:
        remedy = "Decorate it with ebft_study.evaluation.extra_metrics.metric(direction=...)"
        raise plugins.refused(KEY, path, "its unit and direction are not declared", remedy)
    plugins.check_arguments(function, path, key=KEY, arguments=["evaluated"], options={})
    try:
        entry = Metric.of_plugin(path, **declared)
        register(entry)
    except ResultsError as error:
        raise ConfigError(f"{KEY}={path!r}: {error.message.removeprefix('results: ')}") from None
    for setting in entry.comparable_within:
        if setting not in short_names():
            raise plugins.refused(KEY, path, f"comparable_within has {setting!r}, which is no setting", "Drop it")
    return ExtraMetric(entry, function, tokenizer)
