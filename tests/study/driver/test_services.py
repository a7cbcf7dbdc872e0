"""Where features are embedded and what a study's services take, decided before anything starts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from ebft_study.config import RunConfig, build_run, nest
from ebft_study.errors import ConfigError
from ebft_study.study.cluster.capacity import ClusterCapacity, Node
from ebft_study.study.driver.services import needs_ray
from ebft_study.study.resolving.service_plan import SERVICE_PROCESS_BYTES, check_cache, plan_services
from ebft_study.study.spec.study_spec import ResourcesSpec, StudySpec
from tests.studies import resolved
from tests.tiny_run import write_model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A configuration of about 1.5 billion parameters: plans read no weights."""
    from transformers import Qwen2Config

    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 151936}
    Qwen2Config(num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True, **sizes).save_pretrained(
        folder
    )
    return str(folder)


def run(model: str, **changes: Any) -> RunConfig:
    return build_run(nest({"model": model, "device": "cpu"} | changes, source="test"), source="test")


ONE_CPU = ResourcesSpec(workers_per_trial=0)


def test_small_networks_stay_in_their_trials(small: str) -> None:
    plan = plan_services([run(small)], ONE_CPU, concurrency=4)
    assert plan.backend == "local"
    assert "less memory" in plan.reason
    assert plan.travelling_bytes == 0.0


def test_large_networks_are_shared_and_the_plan_says_what_that_saves(large: str) -> None:
    plan = plan_services([run(large), run(large, depths=[0.5])], ONE_CPU, concurrency=3)
    assert plan.backend == "service"
    # 28 layers cut at depth 0.75, in float32: 21 x 46.8M + 233M parameters in each trial; 1.54G in a service, and its
    # half GiB of cache.
    assert "3 networks of 4.53 GiB" in plan.reason
    assert f"1 in services with {(1543714304 * 4 + SERVICE_PROCESS_BYTES) / 2**30 + 0.5:.2f} GiB" in plan.reason


def test_a_service_that_trials_would_wait_for_is_not_worth_its_memory(large: str) -> None:
    plan = plan_services([run(large)], ONE_CPU, concurrency=16)
    assert plan.backend == "local"
    assert "times its share of work" in plan.reason


def test_one_trial_at_a_time_shares_with_nobody(large: str) -> None:
    assert plan_services([run(large)], ONE_CPU, concurrency=1).backend == "local"


def test_many_different_networks_are_not_worth_a_service_each(large: str, small: str) -> None:
    several = [run(large, random_weights=flag, precision=p) for flag in (False, True) for p in ("float32", "bfloat16")]
    assert plan_services(several, ONE_CPU, concurrency=2).backend == "local"


def test_adapters_need_no_network_of_their_own(large: str) -> None:
    adapted = run(large, lora_rank=8)
    plan = plan_services([adapted], ONE_CPU, concurrency=3)
    assert plan.settled(adapted).features.backend == "local"
    mixed = plan_services([adapted, run(large)], ONE_CPU, concurrency=3)
    assert mixed.backend == "service"
    assert mixed.settled(adapted).features.backend == "local"
    assert mixed.settled(run(large)).features.backend == "service"


def test_on_gpus_a_service_needs_a_gpu(large: str) -> None:
    on_gpus = {"workers_per_trial": 1, "gpus_per_worker": 1}
    without = plan_services([run(large)], ResourcesSpec(**on_gpus), concurrency=3)
    assert (without.backend, "feature_gpus" in without.reason) == ("local", True)
    assert plan_services([run(large)], ResourcesSpec(**on_gpus, feature_gpus=1), concurrency=3).backend == "service"


def test_what_is_asked_for_is_what_is_done(small: str, large: str) -> None:
    plan = plan_services([run(large)], ONE_CPU, concurrency=8)
    assert plan.settled(run(small, **{"features.backend": "local"})).features.backend == "local"
    assert plan_services([run(small, **{"features.backend": "service"})], ONE_CPU, concurrency=2).reason == ""


def test_a_single_run_needs_ray_only_for_services(small: str) -> None:
    assert not needs_ray(run(small))
    assert needs_ray(run(small, **{"features.backend": "service"}))
    assert needs_ray(run(small, **{"rollout.backend": "vllm"}))
    assert not needs_ray(run(small, method="sft", **{"rollout.backend": "vllm"}))


@pytest.mark.parametrize(
    ("settings", "own", "shared"),
    [
        ({}, 2.0, 0.5),
        ({"rollout.backend": "vllm"}, 3.0, 0.5),
        ({"rollout.backend": "vllm", "tensor_parallel_size": 4}, 6.0, 0.5),
        ({"rollout.backend": "vllm", "placement": "colocated"}, 2.0, 0.5),
        ({"rollout.backend": "vllm", "engine_scope": "study", "tensor_parallel_size": 2}, 2.0, 2.5),
        ({"rollout.backend": "vllm", "method": "sft"}, 2.0, 0.5),
        ({"rollout.backend": "vllm", "engine_scope": "study", "completion_length": 4}, 2.0, 1.5),
    ],
)
def test_gpus_of_engines_and_services_are_counted(
    small: str, settings: dict[str, Any], own: float, shared: float
) -> None:
    asked = spec(small, settings, workers_per_trial=2, gpus_per_worker=1, feature_gpus=0.5)
    study = resolved(asked, ClusterCapacity((Node(8, 8),)))
    assert [request.all_gpus for request in study.requests] == [own]
    assert study.shared_gpus == shared


def test_a_cache_that_cannot_be_written_is_found_before_anything_starts(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EBFT_STUDY_CACHE", str(tmp_path / "file"))
    served, local = (run(small, **{"features.backend": backend}) for backend in ("service", "local"))
    plan = plan_services([served], ONE_CPU, concurrency=2)
    with pytest.raises(ConfigError, match=r"EBFT_STUDY_CACHE.*features.cache_disk_gib=0"):
        check_cache([served], plan, ONE_CPU)
    check_cache([local], plan, ONE_CPU)
    check_cache([run(small, **{"features.backend": "service", "cache_disk_gib": 0})], plan, ONE_CPU)


def spec(small: str, settings: dict[str, Any], **resources: Any) -> StudySpec:
    chosen = nest({"model": small, **settings}, source="test")
    return StudySpec(study="s", question="?", run=chosen, resources=ResourcesSpec(**resources))


def test_vllm_that_is_not_installed_is_found_before_anything_starts(
    small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"rollout.backend='vllm': vLLM is not installed here.*make setup"):
        resolved(spec(small, {"rollout.backend": "vllm"}))


def test_a_service_without_a_gpu_for_trials_on_gpus_is_refused(small: str) -> None:
    asked = spec(small, {"features.backend": "service"}, gpus_per_worker=1)
    with pytest.raises(ConfigError, match=r"resources.feature_gpus=0: .*feature_gpus: 1"):
        resolved(asked)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"rollout.backend": "vllm", "sync_every_steps": 3, "max_policy_lag": 1}, "rollout.sync_every_steps=3"),
        ({"max_policy_lag": 1}, "rollout.max_policy_lag=1"),
        ({"rollout.backend": "vllm", "temperature": 3.0}, "rollout.temperature=3.0"),
        ({"placement": "colocated", "tensor_parallel_size": 2}, "vllm.tensor_parallel_size=2"),
        ({"placement": "colocated", "engine_scope": "study"}, "vllm.engine_scope='study'"),
        ({"features.backend": "service", "lora_rank": 4}, "features.backend='service'"),
    ],
)
def test_combinations_that_cannot_work_are_refused_when_they_are_read(
    small: str, settings: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError, match=key):
        run(small, **settings)


def test_two_settings_of_one_name_go_with_their_sections(tmp_path: Path, small: str) -> None:
    from ebft_study.config import flatten, short_names

    flat = flatten(run(small, rollout={"backend": "vllm"}))
    assert (flat["rollout_backend"], flat["features_backend"]) == ("vllm", "auto")
    assert short_names()["rollout_backend"] == "rollout.backend"
    with pytest.raises(ConfigError, match="unknown key 'backend'"):
        run(small, backend="vllm")
