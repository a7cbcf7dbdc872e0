"""The feature service in its actor: the contract, sharing, the cache's figures, and what happens when it is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from ebft_study import actors
from ebft_study.config import build_run, nest
from ebft_study.data import Batch
from ebft_study.errors import ModelError, ServiceError
from ebft_study.features import NetworkOptions
from ebft_study.features.keys import FeatureSpec
from ebft_study.features.service import ServiceFeatures, start_service
from ebft_study.training.recorded import Services
from tests.contracts.features import DEPTHS, FeatureContract, Make, anchors_in, random_completions
from tests.small_models import small_batch, small_model
from tests.tiny_run import WORDS, run_tiny, tiny_config, train_tokenizer

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EBFT_STUDY_CACHE", str(tmp_path_factory.mktemp("cache")))
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def options(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetworkOptions]:
    folder = tmp_path_factory.mktemp("network")
    small_model().save_pretrained(folder)  # type: ignore[operator]
    train_tokenizer([" ".join(WORDS)] * 20, 300).save_pretrained(folder)
    options = NetworkOptions(str(folder), None, False, "float32", "cpu", "auto", 2**24, 2**26)
    handle = start_service(options)
    yield options
    ray.kill(handle)


def features(options: NetworkOptions, **spec: Any) -> ServiceFeatures:
    given = FeatureSpec(DEPTHS, spec.get("pooling", "last_token"), spec.get("normalize", "per_layer"))
    return ServiceFeatures(options, given, timeout_seconds=spec.get("timeout_seconds", 30.0))


class TestServiceFeatures(FeatureContract):
    @pytest.fixture
    def make(self, options: NetworkOptions) -> Make:
        return lambda **spec: features(options, **spec)


def new_batch(seed: int, T: int = 16) -> Batch:
    return small_batch([[0] * T, [0] * T], seed=seed)


def rate(backend: ServiceFeatures, name: str) -> float:
    total, count = backend.drain_usage()[name]
    return total / count


def test_the_ground_truth_of_the_second_epoch_is_found_whoever_asks(options: NetworkOptions) -> None:
    batch = new_batch(100)
    anchors = anchors_in(batch, 4)
    first, second = features(options), features(options)
    first.embed(batch, anchors, random_completions(anchors, 2, 4, seed=5))
    assert rate(first, "ground_truth_hit_rate") == 0.0
    second.embed(batch, anchors, random_completions(anchors, 2, 4, seed=6))
    usage = second.drain_usage()
    assert usage["ground_truth_hit_rate"] == (6.0, 6.0)
    assert usage["sample_hit_rate"][0] == 0
    second.embed(batch, anchors, random_completions(anchors, 2, 4, seed=5))
    usage = second.drain_usage()
    assert usage["sample_hit_rate"] == (12.0, 12.0)
    assert usage["feature_tokens_embedded"][0] == 0
    assert usage["feature_tokens_saved"][0] == 2 * 16 + 12 * 4


def test_requests_that_wait_are_embedded_together_and_each_gets_its_own(options: NetworkOptions) -> None:
    batches = [new_batch(200 + i, T=12 + 4 * (i % 2)) for i in range(12)]
    backends = [features(options) for _ in batches]
    found: dict[int, Any] = {}

    def ask(i: int) -> None:
        anchors = anchors_in(batches[i], 4)
        found[i] = backends[i].embed(batches[i], anchors, random_completions(anchors, 2 + i % 3, 4, seed=i))[0]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = [rate(backend, "feature_batch_requests") for backend in backends]
    assert max(together) > 1
    for i, batch in enumerate(batches):
        anchors = anchors_in(batch, 4)
        alone = features(options).embed(batch, anchors, random_completions(anchors, 2 + i % 3, 4, seed=i))[0]
        torch.testing.assert_close(found[i].phi, alone.phi, atol=1e-6, rtol=0)
        torch.testing.assert_close(found[i].psi, alone.psi, atol=1e-6, rtol=0)


def test_a_request_that_fails_spoils_no_other_in_its_pass(options: NetworkOptions) -> None:
    batches = [new_batch(500 + i) for i in range(8)]
    backends = [features(options) for _ in batches]
    outcomes: dict[int, Any] = {}

    def ask(i: int) -> None:
        anchors = anchors_in(batches[i], 4)
        completions = random_completions(anchors, 2, 4, seed=i)
        try:
            outcomes[i] = backends[i].embed(batches[i], anchors, completions + (10**6 if i == 3 else 0))
        except Exception as error:
            outcomes[i] = error

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [i for i, outcome in outcomes.items() if isinstance(outcome, Exception)] == [3]


def test_a_run_with_the_service_computes_what_one_without_computes(cluster: None, tmp_path: Path) -> None:
    local = tiny_config(tmp_path, steps=4)
    remote = tiny_config(tmp_path, steps=4, **{"features.backend": "service"})
    handle = start_service(NetworkOptions.from_config(remote, device=torch.device("cpu")))
    one, here = run_tiny(local, services=Services("a"))
    other, there = run_tiny(remote, services=Services("b"))
    ray.kill(handle)
    assert one.status == other.status == "finished"
    for name in ("reward", "cfm_loss", "ce_loss", "grad_norm"):
        assert there.curve(name) == pytest.approx(here.curve(name), rel=1e-3, abs=1e-4)
    assert there.curve("feature_tokens_embedded")
    assert not here.curve("feature_tokens_embedded")


def test_without_a_service_the_error_names_it(cluster: None) -> None:
    absent = NetworkOptions("none", None, False, "float32", "cpu", "auto", 0, 0)
    with pytest.raises(ServiceError, match=r"features-.*not found after 0 seconds"):
        ServiceFeatures(absent, FeatureSpec(DEPTHS, "mean", "joint"), timeout_seconds=0.3)


def test_what_the_service_cannot_load_is_told_to_those_who_ask(cluster: None, tmp_path: Path) -> None:
    absent = NetworkOptions(str(tmp_path / "absent"), None, False, "float32", "cpu", "auto", 0, 0)
    handle = start_service(absent)
    for _ in range(2):
        with pytest.raises(ModelError, match="no usable model in this folder"):
            ServiceFeatures(absent, FeatureSpec(DEPTHS, "mean", "joint"), timeout_seconds=60)
    ray.kill(handle)


def test_a_killed_service_comes_back_while_callers_wait_and_knows_what_was_on_disk(options: NetworkOptions) -> None:
    backend, batch = features(options), new_batch(300)
    anchors = anchors_in(batch, 4)
    completions = random_completions(anchors, 2, 4)
    before = backend.embed(batch, anchors, completions)[0]
    handle = actors.find(options.service_name, seconds=60)
    backend.drain_usage()
    first = ray.get(handle.process_id.remote())
    os.kill(first, signal.SIGKILL)
    started = time.monotonic()
    after = backend.embed(batch, anchors, completions)[0]
    assert time.monotonic() - started < 60
    assert ray.get(handle.process_id.remote()) != first
    assert torch.equal(before.psi, after.psi)
    torch.testing.assert_close(before.phi, after.phi, atol=1e-6, rtol=0)
    usage = backend.drain_usage()
    # Six of ground truth; samples are in memory only.
    assert usage["feature_hit_rate_disk"] == (6.0, 18.0)
    assert usage["ground_truth_hit_rate"] == (6.0, 6.0)


def test_a_service_that_is_too_slow_is_an_error_with_the_setting(options: NetworkOptions) -> None:
    backend, batch = features(options, timeout_seconds=30.0), new_batch(400, T=24)
    backend.timeout_seconds = 0.001
    anchors = anchors_in(batch, 4)
    with pytest.raises(ServiceError, match=r"service_timeout_seconds"):
        backend.embed(batch, anchors, random_completions(anchors, 8, 4))


def test_services_are_shared_by_all_that_need_the_same_network_and_only_by_them() -> None:
    def name(**changes: Any) -> str:
        run = build_run(nest({"device": "cpu"} | changes, source="test"), source="test")
        return NetworkOptions.from_config(run, device=torch.device("cpu")).service_name

    assert name() == name(depths=[0.5]) == name(pooling="mean") == name(alpha=0.5, n_samples=8)
    assert len({name(), name(random_weights=True), name(model="tiny-4m"), name(precision="bfloat16")}) == 4
