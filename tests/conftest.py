"""Small models, tokenizers and batches that many tests share."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import pytest

LONGEST = (
    *(
        "integration/test_study_engine.py",
        "integration/test_study_services.py",
        "integration/",
        "rollouts/test_vllm.py",
    ),
    *("benchmarks/test_services.py", "training/test_sharding.py", "training/test_sharded_memory.py"),
    *("benchmarks/test_gpu.py", "benchmarks/test_realsize.py", "features/test_service.py"),
)
"""Files that take longest, which come first: no worker of `make test` shall have one left when the others are done."""


@pytest.fixture(scope="session")
def s3_query() -> Iterator[str]:
    """The query that makes `s3://studies/...` mean a server of this test session's own."""
    from tests.s3_server import s3_server

    with s3_server() as query:
        yield query


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first; GPU tests stay in the report as skipped where there is no GPU."""

    def place(item: pytest.Item) -> int:
        file = item.path.as_posix()
        return next((number for number, name in enumerate(LONGEST) if f"/tests/{name}" in file), len(LONGEST))

    items.sort(key=place)
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_tests:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
