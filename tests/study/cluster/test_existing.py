"""What joining a cluster asks and refuses, without a cluster; `integration/test_study_joined.py` has one."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebft_study.errors import ConfigError
from ebft_study.study.cluster import existing
from ebft_study.study.cluster.capacity import ClusterCapacity, Node


def test_an_address_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert existing.address_of(None) is None
    assert existing.address_of("auto") == "auto"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert existing.address_of(None) == "10.0.0.1:6379"
    assert existing.address_of("local") is None


def test_a_driver_outside_the_cluster_is_told_to_send_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="ray job submit") as refused:
        existing.address_of("ray://head:10001")
    assert "--address='ray://head:10001'" in str(refused.value)
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(ConfigError, match="RAY_ADDRESS"):
        existing.address_of(None)


def test_no_secret_of_the_driver_is_shown_on_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
    for name in (*secrets, "PYTHONPATH"):
        monkeypatch.setenv(name, f"value of {name}")
    travels = existing._environment()
    assert travels["PYTHONPATH"] == "value of PYTHONPATH"
    assert not set(secrets) & set(travels)
    assert travels["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.2"


@pytest.mark.parametrize(("memory_gib", "concurrency"), [((64, 64), 16), ((1, 1), 16), ((0.25,), 4)])
def test_places_leave_half_of_the_memory_and_fit_on_a_machine(memory_gib: tuple[float, ...], concurrency: int) -> None:
    capacity = ClusterCapacity(tuple(Node(8, 0, gib * 2**30) for gib in memory_gib))
    claim = existing.trial_request(capacity, concurrency)["memory"]
    assert 1 <= claim <= existing.TRIAL_PROCESS_BYTES
    assert concurrency * claim <= sum(memory_gib) * 2**30 / 2
    assert sum(int(gib * 2**30 / claim) for gib in memory_gib) >= concurrency


def answered(**changes: object) -> dict[str, object]:
    import importlib.metadata

    return {"host": "node-7", "version": importlib.metadata.version("ebft-study"), "missing": [], **changes}


def test_a_machine_that_does_not_see_the_study_is_named(tmp_path: Path) -> None:
    studies, cache = tmp_path / "studies", existing.cache_folder()
    existing._check_answer("10.0.0.7", answered(), [studies, cache])
    for folder, remedy in ((studies, "--storage"), (cache, "EBFT_STUDY_CACHE")):
        with pytest.raises(ConfigError, match="not visible on machine node-7") as refused:
            existing._check_answer("10.0.0.7", answered(missing=[str(folder / ".probe-1")]), [studies, cache])
        assert remedy in str(refused.value)
        assert "NFS" in str(refused.value)


@pytest.mark.parametrize("answer", [answered(version="0.0.1"), "ModuleNotFoundError: No module named 'ebft_study'"])
def test_a_machine_with_another_package_is_named(tmp_path: Path, answer: dict[str, object] | str) -> None:
    with pytest.raises(ConfigError, match=r"machine 10\.0\.0\.7 of the cluster cannot run ebft-study"):
        existing._check_answer("10.0.0.7", answer, [tmp_path])


def test_the_probe_sees_what_is_there_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(existing, "_PATIENCE_SECONDS", 0.0)
    with existing._probe(tmp_path / "new") as probe:
        elsewhere = str(tmp_path / "other" / probe.name)
        assert existing._look([str(probe), elsewhere])["missing"] == [elsewhere]
    assert list((tmp_path / "new").iterdir()) == []
