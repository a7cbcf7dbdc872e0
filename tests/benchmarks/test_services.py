"""The benchmarks that need Ray: what they count, what they compare, what they say. No test here looks at a time."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import cli, engines, measure, services
from benchmarks.rows import Row
from benchmarks.settings import Settings
from benchmarks.workload import random_inputs, random_model
from ebft_study.errors import ServiceError
from ebft_study.features.local import LocalFeatures
from ebft_study.paths import cache_folder
from ebft_study.rollouts import Rollouts
from tests.benchmarks import assert_refused, run_command
from tests.rollout_backends import WithoutGraph

TINY = Settings(model="tiny-1m", sequence_lengths=(24,), n_samples=2, completion_length=4, stride=4, repeats=2)
GRID = services.Grid(replace(TINY, batch_size=2, threads=1), trials=3, steps=2, shared_completions=0.5)


def by_name(rows: Sequence[Row]) -> dict[str, Row]:
    found = {row.name: row for row in rows}
    assert len(found) == len(rows), "names are unique"
    return found


# --- which length vLLM is faster from --------------------------------------------------------------------------


def speedups(stage: str, values: dict[int, float]) -> list[Row]:
    return [Row(f"rollouts/G={G}/{stage}/speedup", value, "x") for G, value in values.items()]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({8: 0.2, 32: 0.5, 128: 1.0}, "at none of these lengths"),
        ({8: 1.1, 32: 2.0, 128: 3.0}, "at all of these lengths"),
        ({128: 2.0, 8: 0.5, 32: 1.2}, "from G=32 on"),
        ({8: 0.5, 32: 1.2, 128: 0.9}, "only at G=32"),
        ({8: 1.5, 32: 0.9, 128: 2.0}, "only at G=8, 128"),
    ],
)
def test_the_sentence_says_from_which_length_on_vllm_is_faster(values: dict[int, float], said: str) -> None:
    rows = [
        *speedups("with_gradient", {8: 0.5, 32: 0.9, 128: 0.5}),
        *speedups("sampling", values),
        *speedups("sampling_and_scoring", {8: 0.5, 32: 0.5, 128: 1.5}),
    ]
    assert engines.crossover(rows) == (
        f"vLLM is faster than strided rollouts {said} for sampling alone, from G=128 on for sampling plus scoring, and "
        "at none of these lengths for both and their gradient."
    )


def test_without_all_comparisons_there_is_no_sentence() -> None:
    assert engines.crossover([Row("setting/model", "7m"), *speedups("sampling", {8: 2.0})]) == ""


# --- rollouts --------------------------------------------------------------------------------------------------


class Pretended(WithoutGraph):
    """Strided rollouts that behave like an engine: no gradients, and seconds spent on weights."""

    def __init__(self, error: float = 0.0) -> None:
        super().__init__()
        self.error, self.versions = error, list[int]()

    def update_weights(self, model: nn.Module, version: int) -> None:
        self.versions.append(version)

    def sample(self, *arguments: Any, **keywords: Any) -> Rollouts:
        drawn = super().sample(*arguments, **keywords)
        return replace(drawn, log_probs=drawn.log_probs + self.error, policy_version=1, sync_seconds=0.25)


def comparison(engine: Pretended) -> engines.Comparison:
    return engines.Comparison(TINY, random_model(TINY), engine)


@pytest.mark.parametrize(("error", "failed"), [(0.0, False), (2e-4, True), (float("nan"), True)])
def test_an_engine_with_other_log_probabilities_fails_the_benchmark(error: float, failed: bool) -> None:
    assert engines.agreement_row(comparison(Pretended(error))).failed is failed


def test_the_engine_gets_new_weights_before_every_batch() -> None:
    engine = Pretended()
    for _ in range(2):
        engines.compare(comparison(engine))
    # A round to warm up, two timed ones, and one for the agreement, of both comparisons.
    assert len(engine.versions) == len(set(engine.versions)) == 8


def test_time_for_weights_is_not_time_for_sampling_and_scoring_comes_on_top() -> None:
    compared = comparison(Pretended())
    compared.sync_seconds = [9.0, 0.5, 1.0]
    times = {
        "strided": [1.0, 2.0],
        "strided_with_gradients": [3.0, 6.0],
        "strided_backward": [4.0, 4.0],
        "engine": [2.5, 2.0],
        "scoring": [1.0, 2.0],
        "scoring_backward": [1.0, 1.0],
    }
    rows = by_name(engines.time_rows(compared, times))
    expected = {
        "sampling/strided": 1.5, "sampling/vllm": 1.5, "sampling/speedup": 1.25,
        "sampling_and_scoring/strided": 4.5, "sampling_and_scoring/vllm": 3.0, "sampling_and_scoring/speedup": 1.5,
        "with_gradient/strided": 8.5, "with_gradient/vllm": 4.0, "with_gradient/speedup": (7 / 4 + 10 / 4) / 2,
        "with_gradient/strided_graph_kept": 8.5, "with_gradient/strided_scored_again": 4.0, "scoring": 1.5,
        "transfer": 0.75, "contexts": 5,
    }  # fmt: skip
    assert {name: row.value for name, row in rows.items()} == {
        f"rollouts/G=4/{name}": value for name, value in expected.items()
    }
    assert (rows["rollouts/G=4/sampling/speedup"].low, rows["rollouts/G=4/sampling/speedup"].high) == (0.5, 2.0)


def test_both_ways_draw_without_and_differentiate_with_gradients() -> None:
    compared = comparison(Pretended())
    assert not compared.strided().log_probs.requires_grad
    with_gradients = compared.strided_with_gradients()
    drawn, scored = compared.from_engine(), compared.scoring()
    assert with_gradients.log_probs.requires_grad
    assert scored.requires_grad
    assert torch.equal(drawn.completions, with_gradients.completions)
    torch.testing.assert_close(scored, with_gradients.log_probs, atol=1e-5, rtol=0)


def test_both_ways_have_the_same_gradient_which_is_then_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = comparison(Pretended())
    compared.from_engine()
    found: list[list[torch.Tensor]] = []
    weights = list(compared.model.parameters())
    keep = compared.model.zero_grad

    def kept(set_to_none: bool) -> None:
        found.append([weight.grad.clone() for weight in weights if weight.grad is not None])
        keep(set_to_none)

    monkeypatch.setattr(compared.model, "zero_grad", kept)
    for score in (compared.strided_with_gradients, compared.scoring):
        score()
        compared.backward()
        assert all(weight.grad is None for weight in weights)
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-4)
    assert len(found[0]) == len(weights)


def test_without_vllm_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert_refused("rollouts", "vllm is not installed. Run make setup, or pip install 'ebft-study[vllm]'")


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_engine_is_compared_and_timed_from_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    monkeypatch.setattr(engines, "STARTED", ())
    rows = by_name([row for _, own in engines.tables(replace(TINY, threads=1), [2, 4]) for row in own])
    for G in (2, 4):
        agreement = rows[f"agreement/G={G}/log_probs"]
        assert not agreement.failed
        assert 0 < float(agreement.value) < 1e-4
        for stage in engines.STAGES:
            assert {f"rollouts/G={G}/{stage}/{column}" for column in ("strided", "vllm", "speedup")} <= set(rows)
        assert float(rows[f"rollouts/G={G}/transfer"].value) > 0
    assert engines.crossover(list(rows.values())).startswith("vLLM is faster than strided rollouts ")


def test_starting_is_timed_apart_from_later_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Pretended()

    @contextlib.contextmanager
    def pretended(settings: Settings, *, longest_tokens: int) -> Iterator[Any]:
        assert settings.sequence_length == longest_tokens
        assert random_inputs(settings).anchors.valid.sum() == 1
        yield random_model(settings), engine

    monkeypatch.setattr(engines, "running_engine", pretended)
    rows = by_name(engines.start_rows("tiny-1m", repeats=3))
    assert len(engine.versions) == 4
    assert rows["engine/tiny-1m/transfer"].value == 0.25
    assert float(rows["engine/tiny-1m/start_to_first_token"].value) > 0
    assert 0.9e6 < float(rows["engine/tiny-1m/parameters"].value) < 1.3e6


# --- features --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both() -> tuple[services.Contender, services.Contender, list[str]]:
    """Both contenders on a small grid, and what the service left in the cache folder."""
    with services.network_folder(GRID.settings) as folder, measure.empty_cache() as cache:
        local = services.run_local(GRID, folder)
        with measure.local_ray():
            service = services.run_service(GRID, folder)
        left = [path.name for path in cache.iterdir()]
    return local, service, left


@pytest.mark.integration
@pytest.mark.timeout(1800)
class TestFeatures:
    def test_both_contenders_compute_the_same(self, both: Any) -> None:
        local, service, _ = both
        row = services.agreement_row(local.features, service.features)
        assert len(local.features) == 2 * 3 * 2
        assert not row.failed

    @pytest.mark.parametrize(("error", "part"), [(1e-4, "phi"), (1e-4, "psi"), (float("nan"), "phi")])
    def test_wrong_features_fail_the_benchmark(self, both: Any, error: float, part: str) -> None:
        local, service, _ = both
        wrong = [replace(features) for features in service.features]
        spoilt = getattr(wrong[-1], part).clone()
        spoilt[-1, -1] += error
        wrong[-1] = replace(wrong[-1], **{part: spoilt})
        assert services.agreement_row(local.features, wrong).failed

    def test_the_second_epoch_finds_all_ground_truth_and_no_more_samples_than_are_shared(self, both: Any) -> None:
        local, service, _ = both
        rows = by_name(list(services.epoch_rows(local, service)))
        assert rows["features/epoch_2/ground_truth_hit_rate"].value == 1.0
        assert float(rows["features/epoch_1/ground_truth_hit_rate"].value) < 1.0
        for epoch in (1, 2):
            assert float(rows[f"features/epoch_{epoch}/sample_hit_rate"].value) <= 0.5

    def test_tokens_embedded_and_saved_are_all_tokens(self, both: Any) -> None:
        local, service, _ = both
        rows = by_name(list(services.epoch_rows(local, service)))
        # Trials x steps x sequences x (sequence + contexts x samples x tokens); random completions hardly ever repeat.
        everything = 3 * 2 * 2 * (24 + 5 * 2 * 4)
        for epoch in (1, 2):
            counted = [int(rows[f"features/epoch_{epoch}/tokens_{what}"].value) for what in ("embedded", "saved")]
            assert sum(counted) == everything
            assert counted[1] > 0

    def test_networks_are_counted_once_per_trial_and_once_for_the_service(self, both: Any) -> None:
        local, service, _ = both
        rows = by_name(services.total_rows(local, service))
        whole, cut = random_model(TINY), LocalFeatures(random_model(TINY), **services.SPEC.__dict__)
        # The rotary frequencies, and their original values, are the only buffers.
        buffers = sum(buffer.nbytes for buffer in whole.buffers())
        assert rows["features/network_bytes/service"].value == 4 * 1_050_752 + buffers
        layer = 4 * sum(p.numel() for p in whole.get_decoder().layers[-1].parameters())
        norm = 4 * whole.get_decoder().norm.weight.numel()
        assert services.tensor_bytes(cut.network) == 4 * 1_050_752 + buffers - layer - norm
        assert rows["features/network_bytes/local"].value == 3 * services.tensor_bytes(cut.network)
        assert service.resident_bytes > service.network_bytes

    def test_cpu_seconds_of_trials_that_wait_count_as_the_services(self, both: Any) -> None:
        local, service, _ = both
        rows = by_name(services.total_rows(local, service))
        together = float(rows["features/cpu/service"].value)
        assert together == pytest.approx(sum(service.cpu_seconds) + sum(service.client_seconds))
        assert rows["features/cpu/saved"].value == pytest.approx(float(rows["features/cpu/local"].value) / together)

    def test_the_cache_is_a_folder_of_its_own(self, both: Any) -> None:
        assert both[2] == ["features"]


def test_the_cache_folder_of_before_is_back_afterwards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EBFT_STUDY_CACHE", str(tmp_path))
    with measure.empty_cache() as folder:
        assert cache_folder() == folder != tmp_path
    assert cache_folder() == tmp_path
    assert not folder.exists()


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0.0, 0.0), (0.25, 0.15, 0.35), (1.0, 1.0, 1.0)])
def test_a_share_of_completions_is_the_same_in_all_trials(share: float, low: float, high: float) -> None:
    settings = replace(TINY, sequence_lengths=(256,), n_samples=4)
    grid = services.Grid(settings, trials=2, steps=1, shared_completions=share)
    inputs = grid.batches()[0]
    first, other, again = (grid.completions(0, trial, 0, inputs) for trial in (0, 1, 0))
    same = (first == other).all(dim=-1).double().mean()
    assert low <= float(same) <= high
    assert torch.equal(first, again)
    later = grid.completions(1, 0, 0, inputs)
    assert not (later == first).all(dim=-1).any()


def test_the_second_epoch_has_the_batches_of_the_first_as_new_objects() -> None:
    first, second = GRID.batches(), GRID.batches()
    assert len(first) == GRID.steps + 1
    for one, other in zip(first, second, strict=True):
        assert one.batch is not other.batch
        assert torch.equal(one.batch.tokens, other.batch.tokens)
    assert not torch.equal(first[0].batch.tokens, first[1].batch.tokens)


# --- the command line ------------------------------------------------------------------------------------------


def test_help_mentions_both_commands_and_each_has_its_own() -> None:
    overview = run_command("--help").stdout
    assert "Strided rollouts in process against" in overview
    assert "The feature networks of a grid" in overview
    for name, option in (("rollouts", "--lengths"), ("features", "--shared-completions")):
        result = run_command(f"{name} --help")
        assert result.exit_code == 0
        assert option in result.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("rollouts --lengths 0", "Invalid value for '--lengths'"),
        ("rollouts --trials 3", "No such option: --trials"),
        ("rollouts --lengths 8 400", "a sequence of 512 tokens"),
        ("features --shared-completions 1.5", "Invalid value for '--shared-completions'"),
        ("features --sequence-length 12", "a sequence of 12 tokens"),
        ("features --n-samples 1", "rollout.n_samples=1"),
    ],
)
def test_mistakes_are_named(arguments: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_require", lambda *_: None)
    assert_refused(arguments, part)


def test_rows_are_written_and_the_conclusion_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_require", lambda *_: None)
    monkeypatch.setattr(engines, "tables", lambda *_: iter([("one", [Row("a", 1.0)])]))
    monkeypatch.setattr(engines, "crossover", lambda rows: f"{len(rows)} rows")
    file = tmp_path / "new" / "rows.json"
    result = run_command(f"rollouts --json {file}")
    assert result.exit_code == 0
    assert [row["name"] for row in json.loads(file.read_text())] == ["a"]
    assert result.stdout.splitlines()[-1] == "1 rows"


def test_a_lost_service_and_a_disagreement_fail_the_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def lost(_: Any) -> Iterator[tuple[str, list[Row]]]:
        yield "one", [Row("a", 1.0)]
        raise ServiceError("the feature service\nis gone")

    file = tmp_path / "rows.json"
    monkeypatch.setattr(services, "tables", lost)
    assert run_command(f"features --json {file}").exit_code == 1
    assert [row["value"] for row in json.loads(file.read_text())] == [1.0, "the feature service is gone"]
    monkeypatch.setattr(services, "tables", lambda _: iter([("x", [Row("x", 1.0, failed=True)])]))
    assert run_command("features").exit_code == 1


def test_the_other_benchmark_needs_neither_ray_nor_vllm() -> None:
    code = (
        "import sys; sys.modules['ray'] = sys.modules['vllm'] = None\n"
        "from benchmarks.cli import app\n"
        "assert 'torch' not in sys.modules\n"
        "import benchmarks.sections\n"
        "from ebft_study.errors import ConfigError\n"
        "try: app(['features'])\n"
        "except ConfigError as error: assert 'ray is not installed. Run make setup' in str(error), error\n"
        "else: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
