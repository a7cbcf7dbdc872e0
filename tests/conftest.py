"""Small models, tokenizers and batches that many tests share."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def s3_query() -> Iterator[str]:
    """The query that makes `s3://studies/...` mean a server of this test session's own."""
    from tests.s3_server import s3_server

    with s3_server() as query:
        yield query


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests stay in the report as skipped where there is no GPU."""
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_tests:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
