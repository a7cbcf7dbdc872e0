"""The registry: what training accumulates and evaluations measure is in it, and comes out as its lines say."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ebft_study import config
from ebft_study.errors import ResultsError
from ebft_study.evaluation import quantities
from ebft_study.methods import MetricAccumulator
from ebft_study.results import METRICS, metric
from ebft_study.results.metrics import AGGREGATED, QUANTITIES, Aggregation
from ebft_study.training.validation import _over_workers

EVERYTHING = torch.ones(2, 3, dtype=torch.bool)
STEPS, WORKERS = 4, 3


def by_definition(how: Aggregation, values: np.ndarray) -> float:
    return {
        "mean": values.mean,
        "std": values.std,
        "effective_fraction": lambda: values.mean() ** 2 / (values**2).mean(),
        "min": values.min,
        "max": values.max,
        "sum": values.sum,
        "per_step": lambda: values.sum() / STEPS,
        "per_worker": lambda: values.sum() / STEPS / WORKERS,
    }[how]()


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_every_metric_of_a_quantity_is_that_of_all_its_observations(quantity: str) -> None:
    """However they are cut into micro-batches; anchors that are not valid do not count."""
    parts = torch.rand(5, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.3
    accumulator, valid = MetricAccumulator(), EVERYTHING.clone()
    valid[1, 2] = False
    for part in parts:
        accumulator.add_valid(quantity, part, valid)
    accumulator.add_valid(quantity, parts[0], ~EVERYTHING)
    row, values = accumulator.row(steps=STEPS, workers=WORKERS), parts[:, valid].numpy()
    assert row == {
        entry.name: pytest.approx(by_definition(entry.aggregation, values)) for entry in QUANTITIES[quantity]
    }


def test_a_column_is_measured_or_accumulated() -> None:
    accumulator = MetricAccumulator()
    for quantity in QUANTITIES:
        accumulator.add_valid(quantity, torch.rand(2, 3), EVERYTHING)
    measured = {name for name, entry in METRICS.items() if entry.aggregation == "measured"}
    assert accumulator.row().keys() == METRICS.keys() - measured
    assert all(entry.tables == ("metrics",) for entry in AGGREGATED)


def test_workers_exchange_all_moments_of_all_quantities() -> None:
    accumulator = MetricAccumulator()
    for quantity in QUANTITIES:
        accumulator.add_valid(quantity, torch.rand(2, 3) - 0.5, EVERYTHING)
    alone: Any = SimpleNamespace(accumulator=accumulator, sum_over_workers=list, world_size=1, device="cpu")
    assert _over_workers(alone).row() == accumulator.row()


def test_what_has_no_observation_is_in_no_row() -> None:
    accumulator = MetricAccumulator()
    accumulator.add_valid("importance_ratio", torch.rand(2, 3), ~EVERYTHING)
    assert accumulator.row() == {}
    assert math.isnan(accumulator.mean("importance_ratio"))


@pytest.mark.parametrize("name", ["rewards", "perplexity", "advantage_squared"])
def test_a_name_that_no_row_would_hold_is_refused_when_it_is_accumulated(name: str) -> None:
    accumulator = MetricAccumulator()
    said = rf"unknown metric '{name}'.*with their aggregation, in ebft_study/results/metrics\.py"
    with pytest.raises(ResultsError, match=said):
        accumulator.add(name, 1.0, 1.0)
    with pytest.raises(ResultsError, match=said):
        accumulator.add_valid(name, torch.ones(2, 3), EVERYTHING)


@pytest.mark.parametrize("name", ["advantage", "importance_ratio", "parity_mean_difference"])
def test_sums_are_refused_where_single_values_are_needed(name: str) -> None:
    with pytest.raises(ValueError, match="needs the single values"):
        MetricAccumulator().add(name, 1.0, 1.0)


def test_evaluations_measure_the_registered_metrics() -> None:
    assert quantities([1, 3], with_entropy=True) == [
        *[("ce_loss", None), ("ce_answer_loss", None), ("cfm_loss", 1), ("cfm_loss", 3)],
        *[("entropy", 1), ("entropy", 2), ("entropy", 3)],
    ]


def test_an_unknown_metric_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ResultsError, match="Did you mean 'cfm_loss'"):
        metric("cfm_los")


def test_metrics_are_compared_within_settings_that_exist() -> None:
    settings = config.flatten(config.RunConfig())
    assert all(name in settings for entry in METRICS.values() for name in entry.comparable_within)
    within = METRICS["cfm_loss"].comparable_within
    assert {"depths", "pooling", "normalize", "feature_network", "completion_length"} <= set(within)
    for own_temperature in (False, True):
        assert ("temperature" in METRICS["cfm_loss"].defined_by(own_temperature=own_temperature)) != own_temperature
        assert "temperature" in METRICS["reward"].defined_by(own_temperature=own_temperature)
    judged = set(METRICS["judge_cfm_loss"].comparable_within)
    its_own = {"judge", "judge_depths", "judge_pooling", "judge_normalize", "judge_completion_length"}
    of_training = {"model", "feature_network", "random_weights", "depths", "pooling", "normalize", "completion_length"}
    assert set(within) - of_training == judged - its_own
    assert its_own | {"temperature"} <= judged
    of_benchmarks = {name for name in settings if name.startswith("benchmark")} - {"benchmark_every_steps"}
    assert set(METRICS["benchmark_score"].comparable_within) == of_benchmarks
    assert METRICS["ce_loss"].comparable_within == ("dataset", "sequence_length", "packing")
