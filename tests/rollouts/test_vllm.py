"""The vLLM engine in its actor, on a CPU, with weights from a trainer in this process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from torch import nn

from ebft_study import actors
from ebft_study.algorithm.anchors import find_anchors
from ebft_study.errors import ConfigError, ServiceError
from ebft_study.networks.loading import load_model
from ebft_study.rollouts import Rollouts
from ebft_study.rollouts.answers import Answers, AnswerSampler, InProcessAnswers, Sampling
from ebft_study.rollouts.vllm import VllmAnswers, VllmRollouts, options_of, shared_name, start_engine
from ebft_study.rollouts.vllm.engine import EngineOptions
from ebft_study.rollouts.vllm.weights import SHARED_MEMORY
from ebft_study.training import RunResult
from ebft_study.training.recorded import Services
from tests import commands
from tests.contracts.answers import AnswersContract
from tests.contracts.rollouts import LONGEST, RolloutContract
from tests.evaluation.downstream import files
from tests.references import naive_model
from tests.small_models import small_batch, small_model
from tests.tiny_run import MemoryRecorder, answered, run_tiny, tiny_config, write_data, write_model

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),  # its import takes seconds
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    yield
    ray.shutdown()


def trained_model(seed: int = 0) -> nn.Module:
    """vLLM has no kernels for heads of less than 32 numbers."""
    return small_model(head_dim=32, layers=2, seed=seed)


def options(folder: Path, **changes: Any) -> EngineOptions:
    trained_model().config.save_pretrained(folder)  # type: ignore[operator]
    given: dict[str, Any] = {
        "model": str(folder), "revision": None, "dtype": "float32", "device": "cpu", "longest_tokens": LONGEST + 16,
        "tensor_parallel_size": 1, "gpu_memory_utilization": 0.3, "kv_cache_bytes": 2**26,
    }  # fmt: skip
    return EngineOptions(**given | changes)


@pytest.fixture(scope="module")
def engine(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmRollouts]:
    rollouts = VllmRollouts(options(tmp_path_factory.mktemp("model")), policy="p", engine_name="engine")
    yield rollouts
    rollouts.close()


class Following:
    """Hands the model over before each sample, as the training loop does before each update."""

    def __init__(self, rollouts: VllmRollouts) -> None:
        self.rollouts = rollouts

    def update_weights(self, model: nn.Module, version: int) -> None:
        self.rollouts.update_weights(model, version)

    def close(self) -> None:
        self.rollouts.close()

    def sample(self, model: nn.Module, *arguments: Any, **keywords: Any) -> Rollouts:
        self.update_weights(model, (self.rollouts.version or 0) + 1)
        return self.rollouts.sample(model, *arguments, **keywords)


class TestVllmRollouts(RolloutContract):
    @pytest.fixture
    def backend(self, engine: VllmRollouts) -> Following:
        return Following(engine)

    @pytest.fixture
    def model(self) -> nn.Module:
        return trained_model()

    def test_new_weights_leave_nothing_of_the_old_ones(self, backend: Following) -> None:
        """Neither a packed copy of a tied head nor cached keys and values of the same prompts."""
        batch = small_batch([[0] * LONGEST])
        anchors = find_anchors(batch.document_ids, completion_length=4, stride=4, first_context_length=4)
        noise = torch.rand(*anchors.positions.shape, 2, 4)

        def sampled(seed: int) -> Rollouts:
            return backend.sample(trained_model(seed), batch, anchors, noise=noise, temperature=1.0)

        first, other, again = sampled(0), sampled(1), sampled(0)
        assert torch.equal(first.completions, again.completions)
        torch.testing.assert_close(first.log_probs, again.log_probs, atol=1e-6, rtol=0)
        assert not torch.equal(first.completions, other.completions)

    def test_rollouts_say_which_version_sampled_them(self, backend: Following) -> None:
        batch = small_batch([[0] * 8])
        anchors = find_anchors(batch.document_ids, completion_length=2, stride=4, first_context_length=4)
        noise = torch.rand(*anchors.positions.shape, 2, 2)
        versions = [
            backend.sample(trained_model(), batch, anchors, noise=noise, temperature=1.0).policy_version
            for _ in range(2)
        ]
        assert versions == [backend.rollouts.version - 1, backend.rollouts.version]  # type: ignore[operator]

    def test_no_weights_stay_in_shared_memory_under_a_name(self, engine: VllmRollouts) -> None:
        engine.update_weights(trained_model(), (engine.version or 0) + 1)
        # Another engine of this machine may be mapping its own at this moment.
        left = set(SHARED_MEMORY.glob("ebft-weights-*"))
        for _ in range(20):
            time.sleep(0.1)
            left &= set(SHARED_MEMORY.glob("ebft-weights-*"))
        assert not left


class FollowingAnswers:
    """Hands the model over before each sample where it is another one."""

    def __init__(self, rollouts: VllmRollouts) -> None:
        self.rollouts, self.sampler = rollouts, VllmAnswers(rollouts)

    def sample(self, model: nn.Module, *arguments: Any, **keywords: Any) -> Answers:
        self.rollouts.update_weights(model, (self.rollouts.version or 0) + 1)
        return self.sampler.sample(model, *arguments, **keywords)


class TestVllmAnswers(AnswersContract):
    @pytest.fixture
    def sampler(self, engine: VllmRollouts) -> FollowingAnswers:
        return FollowingAnswers(engine)

    @pytest.fixture
    def model(self) -> nn.Module:
        return trained_model()


def greedy(sampler: AnswerSampler, model: nn.Module) -> list[list[int]]:
    prompts = [[3, 1, 4], [1], [5, 9, 2, 6, 5], [3, 5]]
    answers = sampler.sample(model, prompts, Sampling(1, 12, 0.0, frozenset({7})), key=(0,), ids=range(4))
    return [answers.tokens[s, 0, : int(answers.lengths[s, 0])].tolist() for s in range(4)]


def test_benchmarks_get_the_greedy_answers_of_the_model_as_it_is_now(engine: VllmRollouts) -> None:
    """And training samples from the weights that it was sent, as if nothing had been asked in between."""
    batch = small_batch([[0] * 16])
    anchors = find_anchors(batch.document_ids, completion_length=4, stride=4, first_context_length=4)
    noise = torch.rand(*anchors.positions.shape, 2, 4)
    engine.update_weights(trained_model(), (engine.version or 0) + 1)
    before = engine.sample(trained_model(), batch, anchors, noise=noise, temperature=1.0)
    answers = []
    for seed in (1, 2, 1):  # nothing is sampled in between that could make the engine read weights
        model = trained_model(seed)
        with engine.answers_of(model) as sampler:
            answers.append(greedy(sampler, model))
            assert answers[-1] == greedy(InProcessAnswers(), model)
    assert answers[0] == answers[2] != answers[1]
    after = engine.sample(trained_model(), batch, anchors, noise=noise, temperature=1.0)
    assert torch.equal(before.completions, after.completions)
    assert before.policy_version == after.policy_version
    with pytest.raises(ray.exceptions.RayTaskError, match="p/answers"):  # the engine has forgotten them
        greedy(sampler, model)
    ended = VllmRollouts(engine.options, policy="ended", engine_name="engine", shared=True)
    with ended.answers_of(model) as sampler:  # a trial that ends in an evaluation leaves nothing either
        ray.get(actors.find("engine", seconds=60).evict_weights.remote("ended"))
        with pytest.raises(ray.exceptions.RayTaskError, match="ended/answers"):
            greedy(sampler, model)


@pytest.mark.parametrize(("wanted", "longest"), [({}, 24 + 3), ({"longest_request_tokens": 500}, 128)])
def test_no_engine_takes_more_tokens_than_its_model_has_positions(
    tmp_path: Path, wanted: dict[str, Any], longest: int
) -> None:
    chosen = tiny_config(tmp_path, **{"rollout.backend": "vllm"}, **wanted)
    assert options_of(chosen, source=chosen.model, device=torch.device("cpu")).longest_tokens == longest


# --- training with an engine that several runs share -------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Model and data of small runs, and an engine for all of them."""
    folder = tmp_path_factory.mktemp("runs")
    write_model(folder / "model", head_dim=32)
    write_data(folder / "data.jsonl")
    chosen = config(folder)
    wanted = options_of(chosen, source=chosen.model, device=torch.device("cpu"))
    engine = start_engine(wanted, shared_name(wanted))
    yield folder
    ray.kill(engine)


def config(folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "rollout.backend": "vllm", "engine_scope": "study", "kv_cache_gib": 0.1, "eval_every_steps": 100,
        "checkpoint_every_steps": 100, "engine_timeout_seconds": 60,
    }  # fmt: skip
    return tiny_config(folder, **settings | changes)


def trained(folder: Path, owner: str, **changes: Any) -> tuple[RunResult, MemoryRecorder]:
    return run_tiny(config(folder, **changes), services=Services(owner))


def test_without_learning_engine_and_trainer_stay_equal_for_fifty_steps(folder: Path) -> None:
    outcome, recorder = trained(folder, "still", learning_rate=0.0, steps=50)
    curve = list(recorder.curve("parity_max_difference").values())
    assert outcome.status == "finished"
    assert len(curve) == 50
    assert max(curve) < 1e-4
    assert max(curve[40:]) < 3 * max(curve[:10])
    assert set(recorder.curve("policy_lag").values()) == {0.0}


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}], ids=["all weights", "adapters"])
def test_the_engine_follows_what_is_learned(folder: Path, changes: dict[str, Any]) -> None:
    outcome, recorder = trained(folder, "learning", learning_rate=1e-2, steps=6, **changes)
    assert outcome.status == "finished"
    assert max(recorder.curve("parity_max_difference").values()) < 1e-4
    assert min(recorder.curve("effective_sample_fraction").values()) > 0.999
    assert min(recorder.curve("grad_norm").values()) > 0


def test_whole_answers_of_an_engine_train_a_run(folder: Path) -> None:
    """Sampled at once for all micro-batches, with weights that are up to a step old."""
    settings = answered(folder, learning_rate=1e-2, steps=4, micro_batch_size=2, sync_every_steps=2, max_policy_lag=1)
    outcome, recorder = trained(folder, "answers", **settings, engine_scope="trial")
    assert outcome.status == "finished"
    assert list(recorder.curve("policy_lag").values()) == [0.0, 1.0] * 2
    assert max(recorder.curve("parity_max_difference").values()) < 1e-4
    assert min(recorder.curve("grad_norm").values()) > 0
    assert recorder.rows[1]["importance_ratio_min"] == pytest.approx(1.0, abs=1e-3)
    assert recorder.rows[2]["importance_ratio_min"] < 0.99
    assert {row["answer_tokens"] <= 6 for row in recorder.rows.values() if "answer_tokens" in row} == {True}


@pytest.mark.slow
def test_benchmarks_by_an_engine_change_nothing_that_is_learned(folder: Path) -> None:
    """Also where training samples from older weights; the base model's greedy answers are those found in process."""
    settings = {"learning_rate": 1e-2, "steps": 4, "sync_every_steps": 2, "max_policy_lag": 1, "engine_scope": "trial"}
    named = {"benchmarks": [files.parallel(folder)], "benchmark_samples": 2, "benchmark_max_tokens": 6}
    asked = {**named, "benchmark_every_steps": 1, "longest_request_tokens": 80}
    _, without = trained(folder, "without", **settings)
    _, answered = trained(folder, "with", **settings, **asked)
    for name in ("loss", "policy_lag", "reward", "grad_norm"):
        assert answered.curve(name) == pytest.approx(without.curve(name), rel=1e-5)
    _, in_process = run_tiny(tiny_config(folder, steps=0, **named))

    def greedy_rows(recorder: MemoryRecorder, step: int) -> list[Any]:
        return [r["completion"] for r in recorder.sampled[step] if "benchmark" in r and r["sample"] == -1]

    assert greedy_rows(answered, 0) == greedy_rows(in_process, 0)
    assert len({str(greedy_rows(answered, step)) for step in range(5)}) > 1
    assert "benchmarks are sampled by vLLM" in answered.events[0][1]


def test_late_weights_are_weighted_within_the_allowed_lag(folder: Path) -> None:
    settings = {"learning_rate": 1e-2, "steps": 6, "sync_every_steps": 3, "max_policy_lag": 2}
    outcome, recorder = trained(folder, "late", importance_ratio_clip=1.05, **settings)
    assert outcome.status == "finished"
    assert list(recorder.curve("policy_lag").values()) == [0.0, 1.0, 2.0] * 2
    lagged = [recorder.rows[step] for step in (2, 3, 5, 6)]
    assert all(row["importance_ratio_max"] > 1.01 for row in lagged)
    assert all(row["effective_sample_fraction"] < 0.9999 for row in lagged)
    assert any(row["importance_clipped_fraction"] > 0 for row in lagged)
    assert all(row["importance_weight"] <= 1.05 for row in lagged)
    assert "parity_max_difference" not in lagged[0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_engine_that_misses_an_update_stops_the_run_with_the_numbers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    update_weights = VllmRollouts.update_weights

    def forgetful(self: VllmRollouts, model: nn.Module, version: int) -> None:
        if version == 0:
            update_weights(self, model, version)
        self.version = version

    monkeypatch.setattr(VllmRollouts, "update_weights", forgetful)
    # The engine takes a new version for a reason to read the segment again, which still holds the old weights.
    scope = "study" if precision == "float32" else "trial"
    outcome, _ = trained(folder, "stale", learning_rate=1e-2, steps=6, precision=precision, engine_scope=scope)
    assert (outcome.status, outcome.step) == ("stopped", 1)
    assert "differ from the trainer's by" in outcome.reason
    assert "rollout.parity_threshold" in outcome.reason


def test_in_bfloat16_the_engine_follows_as_closely_as_rounding_lets_it(folder: Path) -> None:
    outcome, recorder = trained(
        folder, "rounded", learning_rate=1e-2, steps=4, precision="bfloat16", engine_scope="trial"
    )
    assert outcome.status == "finished"
    assert 1e-3 < max(recorder.curve("parity_mean_difference").values()) < 0.2
    engine, itself = (sum(recorder.curve(f"{name}_mean_difference").values()) for name in ("parity", "rechunk"))
    assert engine < 6 * itself  # 2 to 4 times; 10 times is refused


@pytest.mark.slow
def test_a_killed_engine_of_a_study_comes_back_for_the_next_attempt(cluster: None, tmp_path: Path) -> None:
    wanted = options(tmp_path)
    handle = start_engine(wanted, shared_name(wanted), restarts=True)
    batch = small_batch([[0] * 16])
    anchors = find_anchors(batch.document_ids, completion_length=4, stride=4, first_context_length=4)
    sampled = []
    for attempt in ("1", "2"):
        rollouts = VllmRollouts(wanted, policy=attempt, engine_name=shared_name(wanted), shared=True)
        rollouts.update_weights(trained_model(), 0)
        noise = torch.rand(1, 3, 2, 4, generator=torch.Generator().manual_seed(0))
        sampled.append(rollouts.sample(trained_model(), batch, anchors, noise=noise, temperature=0.7).completions)
        if attempt == "1":
            os.kill(ray.get(handle.process_id.remote()), signal.SIGKILL)
            with pytest.raises(ServiceError):
                rollouts.sample(trained_model(), batch, anchors, noise=noise, temperature=0.7)
        rollouts.close()
    assert torch.equal(*sampled)
    ray.kill(handle)


def test_a_model_without_kernels_is_refused_when_the_engine_starts(cluster: None, tmp_path: Path) -> None:
    small_model(head_dim=8).config.save_pretrained(tmp_path)  # type: ignore[operator]
    rollouts = VllmRollouts(replace(options(tmp_path / "other"), model=str(tmp_path)), policy="p", engine_name="heads")
    with pytest.raises(ConfigError, match=r"head_dim=8.*backend=strided"):
        rollouts.update_weights(trained_model(), 0)
    rollouts.close()


def test_an_engine_too_small_for_one_sequence_is_refused_with_the_remedy(cluster: None, tmp_path: Path) -> None:
    rollouts = VllmRollouts(options(tmp_path, kv_cache_bytes=2**10), policy="p", engine_name="small")
    with pytest.raises(ConfigError, match=r"kv_cache_gib"):
        rollouts.update_weights(trained_model(), 0)
    rollouts.close()


def test_an_engine_of_two_processes_follows_too_and_ends_with_all_its_processes(cluster: None, tmp_path: Path) -> None:
    before = set(SHARED_MEMORY.glob("psm_*"))
    rollouts = VllmRollouts(options(tmp_path, tensor_parallel_size=2), policy="p", engine_name="two")
    batch = small_batch([[0] * 16])
    anchors = find_anchors(batch.document_ids, completion_length=4, stride=4, first_context_length=4)
    for version in (0, 1):
        model = trained_model(version)
        rollouts.update_weights(model, version)
        sampled = rollouts.sample(model, batch, anchors, noise=torch.rand(1, 3, 2, 4), temperature=0.7)
        with torch.no_grad():
            expected = naive_model.completion_log_probs(model, batch.tokens[0, :4], sampled.completions[0, 0, 1], 0.7)
        torch.testing.assert_close(sampled.log_probs[0, 0, 1], expected, atol=1e-4, rtol=0)
    process = psutil.Process(ray.get(actors.find("two", seconds=60).process_id.remote()))
    family = [process, *process.children(recursive=True)]
    assert len(family) >= 3
    rollouts.close()
    assert not commands.outlived(family, 25)
    # The messages between vLLM's processes; the few megabytes of its collectives (`vllm_dist_*`) it never frees.
    assert set(SHARED_MEMORY.glob("psm_*")) <= before


def test_a_killed_engine_is_noticed_at_once_and_leaves_nothing(folder: Path) -> None:
    rollouts = Services("killed").rollouts(config(folder), torch.device("cpu"))
    assert isinstance(rollouts, VllmRollouts)
    rollouts.update_weights(load_model(str(folder / "model")).model, 0)
    handle = actors.find(rollouts.engine_name, seconds=60)
    process = psutil.Process(ray.get(handle.process_id.remote()))
    family = [process, *process.children(recursive=True)]
    batch = small_batch([[0] * 16])
    anchors = find_anchors(batch.document_ids, completion_length=4, stride=4, first_context_length=4)
    os.kill(process.pid, signal.SIGKILL)
    before = time.monotonic()
    with pytest.raises(ServiceError, match="is gone"):
        rollouts.sample(trained_model(), batch, anchors, noise=torch.rand(1, 3, 2, 4), temperature=1.0)
    assert time.monotonic() - before < 30
    assert not commands.outlived(family, 20)
